"""Distances between sets of volumes: none where there is no difference, and a copy is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import head

from scripts.prior_figures import VolumeSet, compare, nearest_among, nearest_neighbours, split_half


def volumes(n: int, brightness: float = 1.0, noise: float = 0.0, first: int = 0) -> VolumeSet:
    """Heads in model space's unit."""
    made = VolumeSet(slice_step=8)
    for seed in range(first, first + n):
        volume = torch.from_numpy(head(seed) / 1100.0).float() * brightness
        generator = torch.Generator().manual_seed(seed)
        made.add(f"head {seed}", volume + noise * torch.randn(volume.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def real() -> VolumeSet:
    """Eight heads."""
    return volumes(8)


def test_other_heads_of_the_same_kind_are_near(real: VolumeSet) -> None:
    """As near as real ones are among themselves, and far nearer than noisy ones."""
    same = compare(volumes(8, first=20), real)
    noisy = compare(volumes(8, noise=0.3), real)
    assert same["histogram_distance"] < 0.02
    assert noisy["mmd"] > 5 * max(abs(same["mmd"]), abs(split_half(real)))


def test_the_histogram_distance_is_in_units_of_intensity(real: VolumeSet) -> None:
    """Heads at 80 % of the brightness are 20 % of the mean intensity away, to a bin's width."""
    mean = np.mean([one @ ((np.arange(64) + 0.5) / 64) for one in real.histograms])
    found = compare(volumes(8, brightness=0.8), real)["histogram_distance"]
    assert math.isclose(found, 0.2 * mean, abs_tol=1 / 64)


def test_an_empty_set_of_foregrounds_has_no_distance(real: VolumeSet) -> None:
    """NaN, not 0."""
    assert math.isnan(compare(volumes(2, brightness=0.0), real)["histogram_distance"])


@pytest.mark.parametrize("n", [0, 1])
def test_one_volume_is_no_set(n: int, real: VolumeSet) -> None:
    """An unbiased estimate needs two."""
    with pytest.raises(ValueError, match=f"got {n} samples"):
        compare(volumes(n), real)


def test_few_real_scans_have_no_yardstick() -> None:
    """Two halves of three volumes cannot be compared."""
    assert math.isnan(split_half(volumes(3)))


def test_features_are_the_means_of_the_whole_volume() -> None:
    """One value a channel of AlexNet's five layers, not negative (after ReLU)."""
    (features,) = volumes(1).features
    assert features.shape == (64 + 192 + 384 + 256 + 256,)
    assert (features >= 0).all() and features.sum() > 0


def test_a_copy_is_found() -> None:
    """Distance 0 and its name; the others have the distance of independent noise, sqrt 2."""
    generator = torch.Generator().manual_seed(0)
    training = [(f"t{number}", torch.randn(4, 6, 6, 6, generator=generator)) for number in range(5)]
    new = ("new", torch.randn(4, 6, 6, 6, generator=generator))
    rows = nearest_neighbours([("copy", training[3][1]), new], iter(training))
    assert rows[0] == {"name": "copy", "nearest": "t3", "distance": 0.0}
    assert math.isclose(rows[1]["distance"], math.sqrt(2), rel_tol=0.1)
    assert math.isclose(nearest_among(training), math.sqrt(2), rel_tol=0.1)
    assert math.isnan(nearest_among(training[:1]))
