"""Into model space and back: the steps of preprocessing that MONAI has not, their undoing, and what they leave outside.

Every config calls them after MONAI's loading, orientation and spacing. `ToModelSpaced` finds the head and cuts the box
of model space around it; `ScaleByPercentiled` brings every scanner's unit to one scale. Both leave MONAI's trace, so
that `Invertd` takes a reconstruction back to the scan's own grid and unit.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms import Compose, CropForeground, Invertd, InvertibleTransform, MapTransform
from monai.utils import TraceKeys, convert_to_tensor
from scipy import ndimage

from scripts.errors import InputError

__all__ = [
    "FACTOR_KEY",
    "Outside",
    "ScaleByPercentile",
    "ScaleByPercentiled",
    "ToModelSpace",
    "ToModelSpaced",
    "ZeroOutsided",
    "count_outside",
    "outside_model_space",
    "percentile_of",
]

FACTOR_KEY = "intensity_factor"  # meta key: multiply by it to come back to the scanner's unit


class ToModelSpace(CropForeground):
    """Cut or pad a scan to `spatial_size` around its head; the inverse pads what was cut with zeros.

    Expects RAS and the model's spacing. Foreground is what lies above `threshold` times the `percentile`th
    percentile. Air noise, ghosts and head holders reach that threshold in real scans of whole heads, so the box is
    that of the largest connected piece that survives a 3 x 3 x 3 erosion (then grown by that voxel again). z comes
    first: a head taller than the box keeps its top and loses neck; otherwise it is centred. Then x and y are centred
    on the foreground; in a head that fills the height, on the upper half of what is kept: chin, neck and shoulders
    would push the back of the head out of the box, and once cut off would shift it when the result comes back in.

    Args:
        spatial_size: shape of model space in voxels, (x, y, z).
        threshold: foreground's share of the percentile.
        percentile: of all voxels of the scan, 0 to 100.

    Raises:
        InputError: on call, where the percentile is not a positive number.
    """

    def __init__(self, spatial_size: Sequence[int], threshold: float = 0.05, percentile: float = 99.5) -> None:
        if len(spatial_size) != 3 or any(int(side) < 1 for side in spatial_size):
            raise ValueError(f"spatial_size must be three positive numbers, got {spatial_size!r}")
        super().__init__()
        self.spatial_size = tuple(int(side) for side in spatial_size)
        self.threshold = threshold
        self.percentile = percentile

    def compute_bounding_box(self, img: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of the box in voxels of `img` (1, x, y, z); it may reach out of the image."""
        if img.ndim != 4 or img.shape[0] != 1:
            raise ValueError(f"expected one channel and three axes, (1, x, y, z), got {tuple(img.shape)}")
        head = _main_piece(_foreground(img, self.threshold, self.percentile)[0].cpu())
        width, depth, height = self.spatial_size
        bottom, top = _extent(head, axis=2)
        z = top - height if top - bottom > height else _centred(bottom, top, height)
        has_neck = top - bottom >= height
        slab = head[:, :, z + height // 2 : z + height] if has_neck else head
        start = np.array([_centred(*_extent(slab, 0), width), _centred(*_extent(slab, 1), depth), z])
        return start, start + np.array(self.spatial_size)


class ToModelSpaced(MapTransform, InvertibleTransform):
    """Dictionary version of `ToModelSpace`, for every key by its own foreground."""

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int],
        threshold: float = 0.05,
        percentile: float = 99.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cropper = ToModelSpace(spatial_size, threshold, percentile)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Transform each key's volume."""
        return {**data, **{key: self.cropper(data[key]) for key in self.key_iterator(data)}}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring each key's volume back."""
        return {**data, **{key: self.cropper.inverse(data[key]) for key in self.key_iterator(data)}}


class ScaleByPercentile(InvertibleTransform):
    """Divide a volume by its percentile, background included, without clipping; the inverse multiplies.

    The factor stands in the meta under `FACTOR_KEY` (the product, where applied twice).

    Args:
        percentile: 0 to 100, linear between ranks as in `numpy.percentile`.

    Raises:
        InputError: on call, where the percentile is not a positive number.
    """

    def __init__(self, percentile: float = 99.5) -> None:
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

    def __init__(self, keys: KeysCollection, percentile: float = 99.5, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scaler = ScaleByPercentile(percentile)

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        """Scale each key's volume."""
        return {**data, **{key: self.scaler(data[key]) for key in self.key_iterator(data)}}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring each key's volume back to its unit."""
        return {**data, **{key: self.scaler.inverse(data[key]) for key in self.key_iterator(data)}}


class Outside(NamedTuple):
    """How many of the source scan's voxels model space does not hold."""

    voxels: int
    foreground_voxels: int


def outside_model_space(image: MetaTensor, preprocessing: Compose, key: str = "image") -> torch.Tensor:
    """Mask of the source scan's voxels that come back from model space as zero.

    A volume of ones takes the way back (one trilinear resample); what ends below one half lay outside.

    Args:
        image: preprocessed volume (1, x, y, z) with the trace and meta that `preprocessing` left on it.
        preprocessing: the transform that made it.
        key: the key under which it did.

    Returns:
        bool, (1, x, y, z) on the source's grid.
    """
    ones = torch.full(tuple(image.shape), 1.0 / float(image.meta.get(FACTOR_KEY, 1.0)))
    back = Invertd(keys="_ones", transform=preprocessing, orig_keys=key, nearest_interp=False)
    return back({key: image, "_ones": MetaTensor(ones)})["_ones"].as_tensor() < 0.5


class ZeroOutsided(MapTransform):
    """Set to zero what lay outside model space, after `Invertd` has brought a volume back; `outside` is the mask.

    Args:
        keys: volumes (1, x, y, z) on the scan's grid.
        transform: the preprocessing that made the image.
        orig_key: the key of the preprocessed image, with its trace.
    """

    def __init__(self, keys: KeysCollection, transform: Compose, orig_key: str = "image") -> None:
        super().__init__(keys)
        self.transform = transform
        self.orig_key = orig_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the volumes in place and add `outside`, bool, (1, x, y, z)."""
        result = dict(data)
        result["outside"] = outside_model_space(result[self.orig_key], self.transform, self.orig_key)
        for key in self.key_iterator(result):
            result[key][result["outside"].to(result[key].device)] = 0
        return result


def count_outside(source: torch.Tensor, outside: torch.Tensor) -> Outside:
    """Count the voxels of `outside` (from `outside_model_space`), and those that are the scan's foreground.

    Args:
        source: the scan as loaded, on the mask's grid; its foreground is what `ToModelSpace` takes for it, air noise
            above the threshold included.
        outside: bool, the same shape.
    """
    if source.shape != outside.shape:
        raise ValueError(f"source has shape {tuple(source.shape)}, outside has {tuple(outside.shape)}")
    return Outside(int(outside.sum()), int((outside & _foreground(source)).sum()))


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


def _foreground(volume: torch.Tensor, threshold: float = 0.05, percentile: float = 99.5) -> torch.Tensor:
    """Voxels above the share `threshold` of the percentile, as a plain bool tensor."""
    return convert_to_tensor(volume, track_meta=False) > threshold * percentile_of(volume, percentile)


def _main_piece(foreground: torch.Tensor) -> np.ndarray:
    """The foreground's largest connected piece after an opening by 3 x 3 x 3; all of it where nothing survives."""
    background = (~foreground).float()[None, None]
    core = (F.max_pool3d(background, 3, stride=1, padding=1) == 0)[0, 0].numpy()
    labels, n_pieces = ndimage.label(core)
    if n_pieces == 0:
        return foreground.numpy()
    largest = labels == 1 + np.bincount(labels.ravel())[1:].argmax()
    return F.max_pool3d(torch.from_numpy(largest).float()[None, None], 3, stride=1, padding=1)[0, 0].numpy() > 0


def _extent(mask: np.ndarray, axis: int) -> tuple[int, int]:
    """First index and one past the last along `axis` at which `mask` holds anything."""
    found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
    return int(found[0]), int(found[-1]) + 1


def _centred(low: int, high: int, size: int) -> int:
    """Start of a window of `size` whose centre is that of low to high."""
    return low + (high - low - size) // 2
