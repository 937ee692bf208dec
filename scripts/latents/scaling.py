"""From raw latents to what a diffusion model is trained on, and back: z' = (z - shift) * scale, padded by choice.

`LatentDataset` applies it, decoding undoes it. Shift and scale come from the whole cohort
(`latent_stats.json`), so that the scaled latent has mean 0 and standard deviation 1, per channel or over all of them.

Source: Karras et al., https://arxiv.org/abs/2312.02696 (whitening per channel); Rombach et al.,
https://arxiv.org/abs/2112.10752 (one factor for all channels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import SpatialPad

from scripts.run import InputError

__all__ = ["SCALINGS", "LatentScaling", "padded_shape"]

SCALINGS = ("channel", "overall", "raw")
MULTIPLE = 4  # a UNet with two downsamplings halves twice


def padded_shape(sides: Sequence[int], multiple: int = MULTIPLE) -> list[int]:
    """Each side rounded up to a multiple: 28 x 34 x 28 becomes 28 x 36 x 28."""
    return [multiple * math.ceil(side / multiple) for side in sides]


class LatentScaling:
    """Scaling of latents and its inverse.

    Args:
        kind: `channel` or `overall` (by the statistics), or `raw` (nothing is changed).
        statistics: content of `latent_stats.json`; not needed for `raw`.
        pad: whether the sides are padded with zeros to multiples of 4, as MONAI's `LatentDiffusionInferer` does; the
            padding comes after the scaling, so that it is the cohort's mean.

    Raises:
        InputError: the kind is none of its values, or statistics are missing.
    """

    def __init__(self, kind: str, statistics: Mapping[str, Any] | None = None, pad: bool = False) -> None:
        if kind not in SCALINGS:
            raise InputError(f"'scaling' is {kind!r}; give one of {', '.join(SCALINGS)}.")
        if kind != "raw" and statistics is None:
            raise InputError(
                f"scaling '{kind}' needs the latent_stats.json of the cohort's latents: give it as 'latent_stats'."
            )
        scale, shift = [1.0], [0.0]
        if statistics is not None and kind != "raw":
            scale, shift = (_as_list(statistics[key][kind]) for key in ("scale_factor", "shift"))
        self.kind, self.pad = kind, pad
        self.scale, self.shift = (torch.tensor(values).view(-1, 1, 1, 1) for values in (scale, shift))

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """Scale, then pad.

        Args:
            z: raw (C, D, H, W).
        """
        scaled = (z - self.shift.to(z)) * self.scale.to(z)
        return _plain(SpatialPad(padded_shape(scaled.shape[1:]))(scaled)) if self.pad else scaled

    def undo(self, z: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
        """Crop about the centre to `sides`, then unscale.

        Args:
            z: scaled (C, D, H, W), padded or not.
            sides: of the raw latent, (D, H, W).
        """
        for axis, side in enumerate(sides, start=1):
            # The exact inverse of SpatialPad; MONAI's CenterSpatialCrop is off by one where an odd number was padded.
            z = z.narrow(axis, (z.shape[axis] - side) // 2, side)
        return z / self.scale.to(z) + self.shift.to(z)


def _as_list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def _plain(z: torch.Tensor) -> torch.Tensor:
    return z.as_subclass(torch.Tensor)
