"""Augmentations: reproducible by seed, anatomically safe, and silent where a brain was cut out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose, RandFlipd, RandGibbsNoised, RandRicianNoised

from scripts.transforms import (
    KeepZeroBackgroundd,
    RandContrastCurved,
    RandThickSlicesd,
    apply_contrast_curve,
    thicken_slices,
)

SIZE = (18, 20, 16)
NOISE = {"keys": "image", "prob": 1.0, "std": 0.1}


def brain(air: float = 0.0) -> torch.Tensor:
    """A bright box in air, (1, 18, 20, 16); the box fills 14 % of it."""
    volume = torch.full((1, *SIZE), air)
    volume[0, 4:14, 5:15, 4:12] = torch.rand(10, 10, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.4
    return volume


def all_random() -> Compose:
    """Every transform of the module with MONAI's noise between."""
    return Compose(
        [
            RandFlipd(keys="image", prob=0.5, spatial_axis=0),
            KeepZeroBackgroundd(
                keys="image",
                transforms=[
                    RandContrastCurved(keys="image", prob=0.7),
                    RandThickSlicesd(keys="image", prob=0.7),
                    RandGibbsNoised(keys="image", prob=0.7, alpha=(0.3, 0.6)),
                    RandRicianNoised(**{**NOISE, "prob": 0.7}),
                ],
            ),
        ]
    )


def run(transform: Compose, seed: int, n_volumes: int = 4) -> torch.Tensor:
    """Some volumes after seeding."""
    transform.set_random_state(seed)
    return torch.stack([torch.as_tensor(transform({"image": brain()})["image"]) for _ in range(n_volumes)])


def test_same_seed_same_volumes():
    """Seeding repeats all volumes to the last bit, in one object and in another."""
    first, second = all_random(), all_random()
    expected = run(first, 11)
    assert torch.equal(run(first, 11), expected)
    assert torch.equal(run(second, 11), expected)
    assert not torch.equal(run(first, 12), expected)


def test_volumes_of_one_seed_differ():
    """The transforms draw anew for every volume."""
    volumes = run(all_random(), 3)
    assert not torch.equal(volumes[0], volumes[1])


def test_first_axis_of_ras_is_left_right():
    """A mark on the right, low and behind, is on the left after the flip, as low and as far behind."""
    volume = torch.zeros(1, *SIZE)
    volume[0, 15, 3, 2] = 1.0
    flipped = RandFlipd(keys="image", prob=1.0, spatial_axis=0)({"image": volume})["image"]
    assert np.argwhere(np.asarray(flipped[0])).tolist() == [[SIZE[0] - 1 - 15, 3, 2]]


def test_stripped_background_stays_zero():
    """Noise changes the brain and nothing else where the air was cut away."""
    transform = KeepZeroBackgroundd(keys="image", transforms=[RandRicianNoised(**NOISE)]).set_random_state(0)
    volume = brain()
    noisy = transform({"image": volume.clone()})["image"]
    assert (noisy[volume == 0] == 0).all()
    assert (noisy[volume > 0] != volume[volume > 0]).float().mean() > 0.99


def test_air_of_a_whole_head_takes_noise():
    """A scan with its air gets noise there too, also in air that the scanner rounded to 0 (a third of the voxels)."""
    transform = KeepZeroBackgroundd(keys="image", transforms=[RandRicianNoised(**NOISE)]).set_random_state(0)
    volume = brain(air=0.01)
    volume[:, :, ::3] = 0.0
    noisy = transform({"image": volume.clone()})["image"]
    assert (noisy[volume <= 0.01] != volume[volume <= 0.01]).float().mean() > 0.99


def test_other_keys_pass_and_input_is_unchanged():
    """Only the image is touched, and not in place."""
    volume = brain()
    kept = volume.clone()
    item = all_random().set_random_state(1)({"image": volume, "label": "depr"})
    assert item["label"] == "depr"
    assert torch.equal(volume, kept)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_thicken_along_one_axis(axis):
    """A pattern along another axis stays; a fast one along this axis is averaged away."""
    ramp = torch.arange(16.0)
    slow = torch.movedim(ramp.expand(16, 16, 16), -1, (axis + 1) % 3)[None]
    torch.testing.assert_close(thicken_slices(slow, axis, 4.0), slow)
    fast = torch.movedim((ramp % 2).expand(16, 16, 16), -1, axis)[None]
    torch.testing.assert_close(thicken_slices(fast, axis, 2.0), torch.full_like(fast, 0.5))


@settings(max_examples=20, deadline=None)
@given(voxels=st.floats(1.0, 5.0), seed=st.integers(0, 99))
def test_thick_slices_stay_within_range(voxels, seed):
    """Averages and interpolations invent no new extremes, and one voxel thick is the volume itself."""
    volume = torch.rand(1, 11, 12, 13, generator=torch.Generator().manual_seed(seed))
    thick = thicken_slices(volume, seed % 3, voxels)
    assert thick.shape == volume.shape
    assert volume.min() - 1e-6 <= thick.min()
    assert thick.max() <= volume.max() + 1e-6
    torch.testing.assert_close(thicken_slices(volume, 0, 1.0), volume)


def test_straight_curve_is_the_identity():
    """Knots on the diagonal change nothing, below 0 and above 1 either; 1e-6 is float32."""
    volume = torch.linspace(-0.5, 2.5, 1000).reshape(1, 10, 10, 10)
    torch.testing.assert_close(apply_contrast_curve(volume, np.linspace(0, 1, 6)), volume, atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_curves_keep_air_dark(seed):
    """Zero stays zero, nothing in the head gets darker than air, and without flat parts the curve rises."""
    volume = torch.linspace(0, 2, 513).reshape(1, 27, 19, 1)
    transform = RandContrastCurved(keys="image", prob=1.0, strength=0.7, flat_prob=1.0).set_random_state(seed)
    curved = transform({"image": volume})["image"].flatten()
    assert curved[0] == 0
    assert (curved[1:] > 0).all()
    rising = RandContrastCurved(keys="image", prob=1.0, strength=0.7, flat_prob=0.0).set_random_state(seed)
    assert (rising({"image": volume})["image"].flatten().diff() > 0).all()


def test_meta_survives():
    """A volume with an affine keeps it."""
    affine = torch.diag(torch.tensor([1.5, 1.5, 1.5, 1.0], dtype=torch.float64))
    image = MetaTensor(brain(), affine=affine)
    for transform in (RandThickSlicesd(keys="image", prob=1.0), RandContrastCurved(keys="image", prob=1.0)):
        torch.testing.assert_close(transform({"image": image})["image"].affine, affine)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: RandThickSlicesd(keys="image", thickness=(0.5, 2.0)), "thickness"),
        (lambda: RandThickSlicesd(keys="image", thickness=(3.0, 2.0)), "thickness"),
        (lambda: RandContrastCurved(keys="image", strength=0.9), "strength"),
    ],
)
def test_bad_arguments_are_refused(build, name):
    """The message names the argument."""
    with pytest.raises(ValueError, match=name):
        build()


def test_crops_are_treated_one_by_one() -> None:
    """Of a list, as MONAI's crops are, the stripped crop keeps its zeros and the other does not."""
    stripped, full = torch.zeros(1, 4, 4, 4), torch.ones(1, 4, 4, 4)
    add = KeepZeroBackgroundd("image", [lambda data: {"image": data["image"] + 1}])
    results = add([{"image": stripped}, {"image": full}])
    assert [result["image"].unique().tolist() for result in results] == [[0], [2]]
