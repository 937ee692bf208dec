"""Into model space and back: the box around the head, its undoing, and what it leaves outside.

Every config calls `ToModelSpaced` after MONAI's loading, orientation and spacing; `native.json` calls `ToModelBoxd`,
which takes millimetres for scans that keep their own voxels. Both leave MONAI's trace for `Invertd`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import ImageReader as Reader
from monai.data import MetaTensor
from monai.transforms import Compose, CropForeground, Invertd, InvertibleTransform, LoadImage, MapTransform, Transform
from scipy import ndimage
from torch import Tensor

from scripts.conventions import FOREGROUND, PERCENTILE, STRIDE
from scripts.run import InputError
from scripts.transforms.intensity import FACTOR_KEY, foreground_mask

__all__ = [
    "Outside",
    "ToModelBox",
    "ToModelBoxd",
    "ToModelSpace",
    "ToModelSpaced",
    "ZeroOutsided",
    "count_outside",
    "outside_model_space",
    "preprocessing_sha256",
]


LEFT_BY_USE = ("_tracing", "filenames")  # attributes that MONAI's objects gain when they are called
PREPROCESSING_VERSION = 1  # a change of code that changes a voxel of model space needs a new one


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

    def __init__(
        self, spatial_size: Sequence[int], threshold: float = FOREGROUND, percentile: float = PERCENTILE
    ) -> None:
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
        head = _main_piece(foreground_mask(img, self.threshold, self.percentile)[0].cpu())
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
        threshold: float = FOREGROUND,
        percentile: float = PERCENTILE,
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
    return Outside(int(outside.sum()), int((outside & foreground_mask(source)).sum()))


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


class ToModelBox(ToModelSpace):
    """`ToModelSpace` for scans of any voxel size: a box of so many millimetres, each side a multiple of 4 voxels.

    What it leaves out is air around the head and the neck below it, which cost time.

    Args:
        size_mm: the box in mm, (x, y, z); a side is rounded up to voxels.
    """

    def __init__(self, size_mm: Sequence[float]) -> None:
        super().__init__([1, 1, 1])  # no size but a scan's own is ever used
        self.size_mm = tuple(float(side) for side in size_mm)

    def compute_bounding_box(self, img: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of the box in voxels of `img` (1, x, y, z); it may reach out of the image."""
        if not isinstance(img, MetaTensor):
            raise ValueError("expected a MetaTensor, whose affine tells the size of its voxels")
        voxel = img.pixdim.tolist()
        sides = [STRIDE * math.ceil(side / mm / STRIDE - 1e-3) for side, mm in zip(self.size_mm, voxel, strict=True)]
        return ToModelSpace(sides, self.threshold, self.percentile).compute_bounding_box(img)


class ToModelBoxd(ToModelSpaced):
    """Dictionary version of `ToModelBox`.

    Args:
        keys: volumes in RAS, in their own voxels.
        size_mm: see `ToModelBox`.

    Raises:
        InputError: `size_mm` is not three positive numbers.
    """

    def __init__(self, keys: KeysCollection, size_mm: Sequence[float]) -> None:
        if len(size_mm) != 3 or any(not isinstance(side, int | float) or side <= 0 for side in size_mm):
            raise InputError(f"'box_mm' is {size_mm!r}; give three positive numbers.")
        super().__init__(keys, [1, 1, 1])
        self.cropper = ToModelBox(size_mm)


def preprocessing_sha256(preprocessing: Compose) -> str:
    """What tells one preprocessing from another: its version here, and every transform with its arguments.

    Args:
        preprocessing: the transform into model space.

    Returns:
        64 hex digits, the same wherever the code lies and however it is written.
    """
    content = [PREPROCESSING_VERSION, [_described(step) for step in preprocessing.transforms]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _described(value: Any) -> Any:
    """A transform as its class and attributes, numbers and texts as they are, anything else by its type."""
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, list | tuple | np.ndarray | torch.Tensor):
        return [_described(item) for item in (value if isinstance(value, list | tuple) else value.tolist())]
    if isinstance(value, torch.dtype | np.dtype):
        return str(value)
    if isinstance(value, Transform | Reader):
        arguments = {key: item for key, item in vars(value).items() if key not in LEFT_BY_USE}
        if isinstance(value, LoadImage):  # beside the reader that was asked for it holds one for every library it finds
            arguments["readers"] = value.readers[-1:]
        return [type(value).__name__, _described(arguments)]
    return value.__name__ if isinstance(value, type) else type(value).__name__
