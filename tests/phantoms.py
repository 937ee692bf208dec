"""A head by formula on grids of every kind, the configs' way into model space, and a network that scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.transforms import Compose
from torch import nn

SIZE = (40, 48, 40)  # of model space here, in voxels of 4 mm
LAS = np.diag([-1.0, 1.0, 1.0])
PSR = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
OBLIQUE = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)
# shape, voxel in mm, rotation of its axes, the file's ending
GRIDS: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], np.ndarray, str]] = {
    "aligned": ((44, 50, 42), (4.0, 4.0, 4.0), np.eye(3), ".nii.gz"),
    "las": ((44, 50, 42), (4.0, 4.0, 4.0), LAS, ".nii"),
    "axes_swapped": ((60, 55, 51), (3.0, 3.5, 3.0), PSR, ".nii.gz"),
    "oblique": ((61, 64, 57), (3.0, 3.0, 3.0), OBLIQUE @ LAS, ".nii.gz"),
    "anisotropic": ((91, 101, 33), (2.0, 2.0, 6.0), OBLIQUE, ".nii.gz"),
    "beyond_model_space": ((70, 71, 69), (4.0, 4.0, 4.0), np.eye(3), ".nii.gz"),
    "smaller_than_head": ((25, 27, 23), (4.0, 4.0, 4.0), LAS, ".nii.gz"),
    "freesurfer": ((53, 52, 51), (3.0, 3.0, 3.0), PSR, ".mgz"),
}


def preprocessing(changes: Mapping[str, Any] | None = None) -> Compose:
    """The configs' block at 4 mm, with `changes` of the config's keys."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "encode.json"))
    for key, value in {"spacing": 4.0, "spatial_size": list(SIZE), **(changes or {})}.items():
        parser[key] = value
    return parser.get_parsed_content("preprocessing")


def write_head(folder: Path, grid: str = "aligned", name: str = "sub-01_T1w", height: float = 65.0) -> dict[str, str]:
    """Write a lopsided ellipsoid with half axes of 65, 75 and `height` mm, about 900 in its unit; its cohort record."""
    shape, spacing, rotation, ending = GRIDS[grid]
    centre, affine = np.array([3.0, -11.0, 7.0]), np.eye(4)
    affine[:3, :3] = rotation * np.array(spacing)
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    x, y, z = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3] - centre, -1, 0)
    radius = np.sqrt((x / 65) ** 2 + (y / 75) ** 2 + (z / height) ** 2)
    data = np.clip(6 * (1 - radius), 0, 1) * (700 + 200 * np.sin(x / 25) + 100 * np.cos(y / 20 + z / 30))
    image = (nib.MGHImage if ending == ".mgz" else nib.Nifti1Image)(data.astype(np.float32), affine.astype(np.float32))
    if ending != ".mgz":
        image.header.set_xyzt_units("mm", "sec")
    path = folder / f"{name}{ending}"
    nib.save(image, path)
    about = {"name": name, "subject": name[:6], "session": "", "label": "control", "split": "val", "cohort": "c"}
    return {"image": str(path), **about}


class ScalingNetwork(nn.Module):
    """Reconstructs `gain` times its input plus `bias`; its latent is the 4 x 4 x 4 means four times, sigma 0.5."""

    def __init__(self, gain: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.bias = nn.Parameter(torch.tensor([bias]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv3d(x, self.gain.view(1, 1, 1, 1, 1), self.bias)  # a convolution runs in bf16 under autocast

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.last = x
        mu = F.avg_pool3d(x, 4).repeat(1, 4, 1, 1, 1)
        return mu, torch.full_like(mu, 0.5)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self(self.last)
