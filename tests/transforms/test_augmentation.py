"""Augmentations: reproducible by seed, anatomically safe, and silent where a brain was cut out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose, RandFlipd, RandRicianNoised

from scripts.run import InputError
from scripts.transforms import KeepZeroBackgroundd, RandContrastCurved, RandThickSlicesd, thicken_slices

SIZE = (18, 20, 16)
NOISE = {"keys": "image", "prob": 1.0, "std": 0.1}


def brain(air: float = 0.0) -> torch.Tensor:
    """A bright box in air, (1, 18, 20, 16); the box fills 14 % of it."""
    volume = torch.full((1, *SIZE), air)
    volume[0, 4:14, 5:15, 4:12] = torch.rand(10, 10, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.4
    return volume


def all_random() -> Compose:
    """Every transform of the module with MONAI's noise between."""
    treated = [
        RandContrastCurved(keys="image", prob=0.7),
        RandThickSlicesd(keys="image", prob=0.7),
        RandRicianNoised(**{**NOISE, "prob": 0.7}),
    ]
    return Compose([RandFlipd("image", 0.5, spatial_axis=0), KeepZeroBackgroundd(keys="image", transforms=treated)])


def run(transform: Compose, seed: int, n_volumes: int = 3) -> torch.Tensor:
    """Some volumes after seeding."""
    transform.set_random_state(seed)
    return torch.stack([torch.as_tensor(transform({"image": brain()})["image"]) for _ in range(n_volumes)])


def test_same_seed_same_volumes() -> None:
    """Seeding repeats all volumes to the last bit, in one object and in another; each volume draws anew."""
    first = all_random()
    expected = run(first, 11)
    assert torch.equal(run(first, 11), expected) and torch.equal(run(all_random(), 11), expected)
    assert not torch.equal(run(first, 12), expected) and not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("is_stripped", [True, False])
def test_only_a_stripped_background_stays_zero(is_stripped: bool) -> None:
    """Noise ends where the air was cut away; a whole head takes it in its air, also where that was rounded to 0."""
    volume = brain(air=0.0 if is_stripped else 0.01)
    volume[:, :, ::3] *= is_stripped  # a third of the voxels, below the share that counts as stripped
    add_noise = KeepZeroBackgroundd(keys="image", transforms=[RandRicianNoised(**NOISE)]).set_random_state(0)
    noisy = add_noise({"image": volume.clone()})["image"]
    assert ((noisy == 0) == (volume == 0)).all() if is_stripped else (noisy != volume).float().mean() > 0.99
    assert (noisy != volume)[brain() > 0].float().mean() > 0.99


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices_thicken_along_one_axis(axis: int) -> None:
    """A pattern along another axis stays; a fast one along this axis is averaged away, one as thick as a slice not."""
    ramp = torch.arange(16.0)
    slow = torch.movedim(ramp.expand(16, 16, 16), -1, (axis + 1) % 3)[None]
    torch.testing.assert_close(thicken_slices(slow, axis, 4.0), slow)
    fast = torch.movedim((ramp % 2).expand(16, 16, 16), -1, axis)[None]
    torch.testing.assert_close(thicken_slices(fast, axis, 2.0), torch.full_like(fast, 0.5))
    pairs = torch.movedim((ramp // 2 % 2).expand(16, 16, 16), -1, axis)[None]  # thick slices of 0 and of 1
    assert thicken_slices(pairs, axis, 2.0).unique().tolist() == [0, 0.25, 0.75, 1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_curves_keep_air_dark(seed: int) -> None:
    """Zero stays zero, nothing in the head gets darker than air, and without flat parts the curve rises."""
    volume = torch.linspace(0, 2, 513).reshape(1, 27, 19, 1)
    transform = RandContrastCurved(keys="image", prob=1.0, strength=0.7, flat_prob=1.0).set_random_state(seed)
    curved = transform({"image": volume})["image"].flatten()
    assert curved[0] == 0
    assert (curved[1:] > 0).all()
    rising = RandContrastCurved(keys="image", prob=1.0, strength=0.7, flat_prob=0.0).set_random_state(seed)
    assert (rising({"image": volume})["image"].flatten().diff() > 0).all()


def test_wrong_ranges_are_refused() -> None:
    """The message names the config's key."""
    with pytest.raises(InputError, match="min_slice_mm and max_slice_mm"):
        RandThickSlicesd(keys="image", thickness=(3.0, 2.0))
    with pytest.raises(InputError, match="contrast_strength"):
        RandContrastCurved(keys="image", strength=0.9)
