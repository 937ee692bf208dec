"""Augmentations that MONAI lacks, for scans of other scanners, protocols and resolutions.

The training config mixes them with MONAI's own random transforms: `RandContrastCurved` bends tissue contrast,
`RandThickSlicesd` imitates 2D acquisitions, and `KeepZeroBackgroundd` holds a stripped background at zero while noise
and artefacts are added to the brain. All draw from MONAI's `self.R`: `Compose.set_random_state` repeats them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandomizableTransform
from monai.utils import convert_to_tensor, ensure_tuple
from scipy.interpolate import PchipInterpolator

from scripts.run import InputError

__all__ = ["KeepZeroBackgroundd", "RandContrastCurved", "RandThickSlicesd", "apply_contrast_curve", "thicken_slices"]


class KeepZeroBackgroundd(Compose):
    """Apply transforms that keep the grid; where a scan is brain-extracted, its background stays exactly zero.

    Noise, ringing, blur and bias belong to the measured head. In a scan stripped afterwards they end at the brain's
    edge; in a whole head they go on in air. Brain-extracted is a volume that is exactly zero in more than `share`.

    Args:
        keys: volumes to treat so.
        transforms: dictionary transforms, applied in this order.
        share: of voxels that are exactly zero, above which the background counts as removed.
    """

    def __init__(self, keys: KeysCollection, transforms: Sequence[Callable], share: float = 0.5) -> None:
        super().__init__(transforms)
        self.keys = ensure_tuple(keys)
        self.share = share

    def __call__(
        self, input_: Any, start: int = 0, end: int | None = None, threading: bool = False, lazy: bool | None = None
    ) -> Any:
        """Transform the dictionary `input_`, or each of a list of crops."""
        if isinstance(input_, list):
            return [self(item, start=start, end=end, threading=threading, lazy=lazy) for item in input_]
        zero = {key: input_[key] == 0 for key in self.keys}
        output = dict(super().__call__(input_, start=start, end=end, threading=threading, lazy=lazy))
        for key, mask in zero.items():
            if mask.float().mean() > self.share:
                output[key] = output[key].masked_fill(_plain(mask), 0)
        return output


class RandThickSlicesd(RandomizableTransform, MapTransform):
    """Make slices along one random axis as thick as a 2D sequence's, `thickness` (range) voxels, on the same grid."""

    def __init__(self, keys: KeysCollection, prob: float = 0.1, thickness: Sequence[float] = (1.5, 3.0)) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if len(thickness) != 2 or not 1 <= thickness[0] <= thickness[1]:
            raise InputError(
                f"thickness must be two rising numbers of voxels, 1 or more, got {thickness!r}; "
                "correct min_slice_mm and max_slice_mm."
            )
        self.thickness = thickness

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Treat all keys alike."""
        self.randomize(None)
        if not self._do_transform:
            return dict(data)
        axis, voxels = int(self.R.randint(3)), float(self.R.uniform(self.thickness[0], self.thickness[1]))
        return {**data, **{key: thicken_slices(data[key], axis, voxels) for key in self.key_iterator(data)}}


class RandContrastCurved(RandomizableTransform, MapTransform):
    """Another sequence's contrast: a random rising curve of intensity, at times flat or mildly falling somewhere.

    The curve joins six equally spaced points from (0, 0) to (1, 1). Air stays 0 and darkest: the first and last
    steps always rise.

    Args:
        keys: volumes with their 99.5th percentile at 1.
        prob: probability of a new curve.
        strength: steps vary by factors within exp(-strength) and exp(strength), 0 to 0.7.
        flat_prob: share of the curves in which one inner step is flattened to 0.15 to 0.5 of itself or, one time in
            three, falls by that part of the step before it. A flatter step would print level lines into the tissue.
    """

    def __init__(self, keys: KeysCollection, prob: float = 0.1, strength: float = 0.5, flat_prob: float = 0.25) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        if not 0 <= strength <= 0.7:
            raise InputError(f"strength must lie within 0 and 0.7, got {strength!r}; correct contrast_strength.")
        self.strength = strength
        self.flat_prob = flat_prob

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Treat all keys alike."""
        self.randomize(None)
        if not self._do_transform:
            return dict(data)
        steps = np.exp(self.R.uniform(-self.strength, self.strength, 5))
        if self.R.rand() < self.flat_prob:
            inner, share = self.R.randint(1, 4), self.R.uniform(0.15, 0.5)
            steps[inner] = share * (-steps[inner - 1] if self.R.rand() < 1 / 3 else steps[inner])
        knots = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
        return {**data, **{key: apply_contrast_curve(data[key], knots) for key in self.key_iterator(data)}}


def thicken_slices(volume: torch.Tensor, axis: int, voxels: float) -> torch.Tensor:
    """Average `volume` (1, x, y, z) over slices of `voxels` along `axis` (0 to 2), then interpolate back."""
    size = list(volume.shape[1:])
    thick = list(size)
    thick[axis] = max(1, round(size[axis] / voxels))
    plain = _plain(volume)[None].float()
    back = F.interpolate(F.interpolate(plain, size=thick, mode="area"), size=size, mode="trilinear")[0]
    return _like(back, volume)


def apply_contrast_curve(volume: torch.Tensor, knots: np.ndarray) -> torch.Tensor:
    """Map intensities by the smooth curve through `knots`, which lie at equal steps from 0 to 1; straight beyond."""
    values = _plain(volume).cpu().numpy()
    inputs = np.linspace(0.0, 1.0, 257)
    curve = PchipInterpolator(np.linspace(0.0, 1.0, len(knots)), knots)(inputs)
    slopes = np.diff(knots) * (len(knots) - 1)
    mapped = np.interp(values, inputs, curve)
    mapped += slopes[0] * np.minimum(values, 0) + slopes[-1] * np.maximum(values - 1, 0)
    return _like(torch.from_numpy(mapped.astype(values.dtype)), volume)


def _like(values: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`values` with the meta of `reference`, where that has any."""
    return MetaTensor(values).copy_meta_from(reference) if isinstance(reference, MetaTensor) else values


def _plain(volume: torch.Tensor) -> torch.Tensor:
    """The same values without meta, so that no operation spends time on it."""
    return convert_to_tensor(volume, track_meta=False)
