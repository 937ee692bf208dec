"""Into model space and back: geometry, intensity, augmentation, and the files at both ends."""

from __future__ import annotations

from scripts.transforms.augmentation import (
    KeepZeroBackgroundd,
    RandContrastCurved,
    RandThickSlicesd,
    apply_contrast_curve,
    thicken_slices,
)
from scripts.transforms.intensity import (
    FACTOR_KEY,
    ScaleByPercentile,
    ScaleByPercentiled,
    foreground_mask,
    percentile_of,
)
from scripts.transforms.model_space import (
    Outside,
    ToModelBox,
    ToModelBoxd,
    ToModelSpace,
    ToModelSpaced,
    ZeroOutsided,
    count_outside,
    outside_model_space,
    preprocessing_sha256,
)
from scripts.transforms.nifti import (
    misplaced_voxels,
    plain_volume,
    read_voxels,
    write_nifti,
)
from scripts.transforms.source_grid import SourceGrid, model_space_image

__all__ = [
    "FACTOR_KEY",
    "KeepZeroBackgroundd",
    "Outside",
    "RandContrastCurved",
    "RandThickSlicesd",
    "ScaleByPercentile",
    "ScaleByPercentiled",
    "SourceGrid",
    "ToModelBox",
    "ToModelBoxd",
    "ToModelSpace",
    "ToModelSpaced",
    "ZeroOutsided",
    "apply_contrast_curve",
    "count_outside",
    "foreground_mask",
    "misplaced_voxels",
    "model_space_image",
    "outside_model_space",
    "percentile_of",
    "plain_volume",
    "preprocessing_sha256",
    "read_voxels",
    "thicken_slices",
    "write_nifti",
]
