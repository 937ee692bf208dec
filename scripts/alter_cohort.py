"""Copies of a cohort as if it came from elsewhere: tilted heads, coarser voxels, a bias field, another contrast.

    python -m scripts.alter_cohort copy_cohort --dataset_dir ds002748 --output_dir output/altered

Weights that know only their own scanner fall behind on such copies; `evaluate.json` with the copy as `dataset_dir` says
by how much. Nothing is drawn at random, and subjects keep their split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
import pandas as pd
from monai.transforms import AdjustContrast, Compose, LoadImage, Orientation, RandBiasField, Rotate, Spacing
from tqdm import tqdm

from scripts.cohort import check_cohort, read_cohort
from scripts.run import InputError, check_spacing, replacing, report_input_errors
from scripts.transforms import write_nifti

__all__ = ["alterations", "copy_cohort"]

TABLE = "cohort.csv"
KEPT = ("subject", "session", "label", "split")


def alterations(tilt_degrees: float, spacing: float, bias: float, gamma: float) -> Compose:
    """Make the transform that reads a scan and alters it.

    Args:
        tilt_degrees: by how much the head nods, about the axis from left to right.
        spacing: edge of the voxels that it is sampled with, in mm.
        bias: b of the field exp(b (1 + x + y + z)), x, y and z from -1 to 1 over the volume; 0: none.
        gamma: exponent on intensities between the scan's least and largest; below 1 flattens tissue contrast.

    Returns:
        File to (1, D, H, W) float32 with RAS axes and the scan's own range of intensities. Tilt and sampling are one
        interpolation.
    """
    grid = [
        Rotate([math.radians(tilt_degrees), 0, 0], keep_size=False, padding_mode="zeros"),
        Spacing([spacing] * 3, padding_mode="zeros"),
    ]
    return Compose(
        [
            LoadImage("NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.float32),
            Orientation("RAS", labels=None),
            Compose(grid, lazy=True),
            RandBiasField(degree=1, coeff_range=(bias, bias), prob=1.0),
            AdjustContrast(gamma),
        ]
    )


def copy_cohort(
    dataset_dir: str | Sequence[str],
    output_dir: str,
    tilt_degrees: float = 20.0,
    spacing: float = 2.0,
    bias: float = 0.3,
    gamma: float = 0.6,
    val_fraction: float = 0.2,
) -> None:
    """Write an altered copy of every scan of a cohort, and `cohort.csv`, the table by which jobs read the copy.

    Args:
        dataset_dir: the cohort, in any form that the jobs take.
        output_dir: where to write; a copy that is there is kept, so that a re-run goes on.
        tilt_degrees: see `alterations`.
        spacing: see `alterations`.
        bias: see `alterations`.
        gamma: see `alterations`.
        val_fraction: as in `train.json`; the split is written into the table.

    Raises:
        InputError: the cohort cannot be read, a scan is unfit, or a number is no such alteration.
    """
    check_spacing(spacing)
    if not gamma > 0 or not abs(tilt_degrees) <= 90 or not abs(bias) <= 1:
        found = f"gamma is {gamma!r}, tilt_degrees {tilt_degrees!r} and bias {bias!r}"
        raise InputError(f"{found}; give a gamma above 0, 90 degrees at most and a bias between -1 and 1.")
    folder, alter = Path(output_dir), alterations(tilt_degrees, spacing, bias, gamma)
    rows: list[dict[str, Any]] = []
    for scan in tqdm(check_cohort(read_cohort(dataset_dir, val_fraction=val_fraction), report_dir=output_dir)):
        name = f"{scan['name']}.nii.gz"
        if not (folder / name).exists():
            volume = alter(scan["image"])
            image = nib.Nifti1Image(volume[0].numpy(), np.asarray(volume.affine))
            image.header.set_xyzt_units("mm", "sec")
            write_nifti(volume[0].numpy(), image, folder / name)
        rows.append({"image": name, **{key: scan[key] for key in KEPT}})
    with replacing(folder / TABLE) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
    print(f"{len(rows)} altered scans are listed in {folder / TABLE}", flush=True)


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"copy_cohort": copy_cohort})
