"""`ToModelSpace` in millimetres, for scans that keep their own voxels; `configs/native.json` uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from monai.config import KeysCollection
from monai.data import MetaTensor
from torch import Tensor

from scripts.errors import InputError
from scripts.transforms import ToModelSpace, ToModelSpaced

__all__ = ["ToModelBox", "ToModelBoxd"]


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
        sides = [4 * math.ceil(side / mm / 4 - 1e-3) for side, mm in zip(self.size_mm, voxel, strict=True)]
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
