"""Numbers that several packages share, each with its one name."""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "FOREGROUND",
    "LOGVAR_RANGE",
    "MOST_VOXELS",
    "PERCENTILE",
    "ROOT",
    "SPACING",
    "SPACING_RANGE_MM",
    "STRIDE",
]

ROOT = Path(__file__).resolve().parents[1]  # of the bundle
SPACING = 1.5  # mm, of model space
SPACING_RANGE_MM = (0.3, 4.0)  # of the voxels of a scan of a head
MOST_VOXELS = 600**3  # of a scan, so that reading and checking stay under 4 GB
PERCENTILE = 99.5  # of a scan's intensities: 1 in model space
FOREGROUND = 0.05  # share of the percentile above which a voxel belongs to the head
STRIDE = 4  # voxels of the image along one of the latent
LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior's log variance
