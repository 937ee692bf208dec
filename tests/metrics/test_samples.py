"""Distances between sets of volumes: none where there is no difference, and a copy is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import head

from scripts.metrics import VolumeSet, compare, nearest_among, nearest_neighbours, split_half
from scripts.run import InputError


def volumes(n: int, brightness: float = 1.0) -> VolumeSet:
    """Heads in model space's unit."""
    made = VolumeSet(slice_step=8)
    for seed in range(n):
        made.add(f"head {seed}", torch.from_numpy(head(seed) / 1100.0).float() * brightness)
    return made


@pytest.fixture(scope="module")
def real() -> VolumeSet:
    """Eight heads."""
    return volumes(8)


def test_mmd_is_grettons_estimator(real: VolumeSet) -> None:
    """Equation 3 pair by pair, with the median squared distance as the kernel's width, sets of unequal size; real scans
    among themselves are the yardstick."""
    some = volumes(3, brightness=0.9)
    x, y = (torch.stack(one.features).double().numpy() for one in (some, real))
    pooled = np.concatenate([x, y])
    squared = ((pooled[:, None] - pooled[None]) ** 2).sum(2)
    kernel = np.exp(-squared / (2 * np.median(squared[~np.eye(11, dtype=bool)])))
    within_x = np.mean([kernel[i, j] for i in range(3) for j in range(3) if i != j])
    within_y = np.mean([kernel[i, j] for i in range(3, 11) for j in range(3, 11) if i != j])
    assert compare(some, real)["mmd"] == pytest.approx(within_x + within_y - 2 * kernel[:3, 3:].mean(), abs=1e-6)
    halves = VolumeSet(), VolumeSet()
    for number in range(8):
        for key in ("names", "histograms", "features"):
            getattr(halves[number % 2], key).append(getattr(real, key)[number])
    assert split_half(real) == compare(*halves)["mmd"]
    assert math.isnan(split_half(some))  # two halves of three volumes cannot be compared


def test_the_histogram_distance_is_in_units_of_intensity(real: VolumeSet) -> None:
    """Heads at 80 % of the brightness are 20 % of the mean intensity away, to a bin's width. An empty foreground has no
    distance, not 0, also where it is one volume of several; and one volume is no set."""
    mean = np.mean([one @ ((np.arange(64) + 0.5) / 64) for one in real.histograms])
    found = compare(volumes(8, brightness=0.8), real)["histogram_distance"]
    assert math.isclose(found, 0.2 * mean, abs_tol=1 / 64)
    assert compare(real, real)["histogram_distance"] == 0
    empty = volumes(1, brightness=0.0)
    with pytest.raises(InputError, match="got 1 samples"):
        compare(empty, real)
    empty.add("head", torch.from_numpy(head(0) / 1100.0))
    assert math.isnan(compare(empty, real)["histogram_distance"])


def test_a_volume_that_does_not_fit_is_refused() -> None:
    """With its name, and the set is as before."""
    made, flat = VolumeSet(slice_step=8), torch.zeros(2, 1, 32, 32, 32)
    for volume, message in ((flat[0, 0, 2:], "30 x 32 x 32"), (flat[:1] * math.nan, "not finite"), (flat, "must be")):
        with pytest.raises(ValueError, match=f"flat .*{message}"):  # an InputError is one
            made.add("flat", volume)
    assert (made.names, made.histograms, made.features) == ([], [], [])


def test_a_copy_is_found() -> None:
    """Distance 0 and its name; the others have the distance of independent noise, sqrt 2."""
    generator = torch.Generator().manual_seed(0)
    training = [(f"t{number}", torch.randn(4, 6, 6, 6, generator=generator)) for number in range(5)]
    new = ("new", torch.randn(4, 6, 6, 6, generator=generator))
    rows = nearest_neighbours(iter([("copy", training[3][1]), new]), iter(training))
    assert rows[0] == {"name": "copy", "nearest": "t3", "distance": 0.0}
    assert math.isclose(rows[1]["distance"], math.sqrt(2), rel_tol=0.1)


def test_the_yardstick_is_the_median_of_the_nearest() -> None:
    """Against all pairs one by one, with an offset in which float32's matrix product would drown the differences."""
    means = 1000 + torch.randn(7, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    pairs = (means[:, None] - means[None]).square().flatten(2).mean(2).sqrt()
    expected = float(np.median(pairs.fill_diagonal_(math.inf).min(1).values))
    training = [(str(number), mu) for number, mu in enumerate(means)]
    assert math.isclose(nearest_among(training), expected, rel_tol=1e-4)
    assert math.isnan(nearest_among(training[:1]))
    for few in ([], [("t", means[0][:1])]):  # the names are given
        with pytest.raises(InputError, match="new has no neighbour|of new and t are"):
            nearest_neighbours([("new", means[0])], few)
