"""Intensities on one scale: a scan is divided by its 99.5th percentile, and what is above 5 % of it is head.

`ScaleByPercentiled` leaves MONAI's trace, so that `Invertd` takes a reconstruction back to the scanner's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import InvertibleTransform, MapTransform
from monai.utils import TraceKeys, convert_to_tensor

from scripts.conventions import FOREGROUND, PERCENTILE
from scripts.run import InputError

__all__ = ["FACTOR_KEY", "ScaleByPercentile", "ScaleByPercentiled", "foreground_mask", "percentile_of"]

FACTOR_KEY = "intensity_factor"  # meta key: multiply by it to come back to the scanner's unit


class ScaleByPercentile(InvertibleTransform):
    """Divide a volume by its percentile, background included, without clipping; the inverse multiplies.

    The factor stands in the meta under `FACTOR_KEY` (the product, where applied twice).

    Args:
        percentile: 0 to 100, linear between ranks as in `numpy.percentile`.

    Raises:
        InputError: on call, where the percentile is not a positive number.
    """

    def __init__(self, percentile: float = PERCENTILE) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile must lie within 0 and 100, got {percentile!r}")
        self.percentile = percentile

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        """Scale `img`, any shape."""
        img = convert_to_tensor(img, track_meta=get_track_meta())
        factor = percentile_of(img, self.percentile)
        scaled = img / factor
        if isinstance(scaled, MetaTensor):
            scaled.meta = {**scaled.meta, FACTOR_KEY: float(scaled.meta.get(FACTOR_KEY, 1.0)) * factor}
            self.push_transform(scaled, extra_info={"factor": factor})
        return scaled

    def inverse(self, img: torch.Tensor) -> torch.Tensor:
        """Multiply by the factor of the trace."""
        factor = self.pop_transform(img)[TraceKeys.EXTRA_INFO]["factor"]
        restored = img * factor
        if isinstance(restored, MetaTensor) and FACTOR_KEY in restored.meta:
            restored.meta = {**restored.meta, FACTOR_KEY: float(restored.meta[FACTOR_KEY]) / factor}
        return restored


class ScaleByPercentiled(MapTransform, InvertibleTransform):
    """Dictionary version of `ScaleByPercentile`."""

    def __init__(self, keys: KeysCollection, percentile: float = PERCENTILE, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleByPercentile(percentile)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Scale each key's volume."""
        return {**data, **{key: self.scaler(data[key]) for key in self.key_iterator(data)}}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring each key's volume back to its unit."""
        return {**data, **{key: self.scaler.inverse(data[key]) for key in self.key_iterator(data)}}


def percentile_of(volume: torch.Tensor, percentile: float) -> float:
    """A volume's percentile, which has to be a positive number to serve as its scale."""
    values = convert_to_tensor(volume, track_meta=False).detach().cpu().numpy()
    rank = np.asarray(percentile, dtype=np.float64)  # as a plain number numpy would round the rank to float32
    value = float(np.percentile(values, rank))  # `torch.quantile` stops at 16 million values
    if not (math.isfinite(value) and value > 0):
        name = volume.meta.get("filename_or_obj", "the volume") if isinstance(volume, MetaTensor) else "the volume"
        raise InputError(
            f"{name}: the {percentile}th percentile of its intensities is {value:g}, so there is no head to scale by; "
            "look at the file and leave it out if it is empty."
        )
    return value


def foreground_mask(
    volume: torch.Tensor, threshold: float = FOREGROUND, percentile: float = PERCENTILE
) -> torch.Tensor:
    """Voxels above the share `threshold` of the percentile, as a plain bool tensor."""
    return convert_to_tensor(volume, track_meta=False) > threshold * percentile_of(volume, percentile)
