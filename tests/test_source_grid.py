"""The way home that a latent's header keeps is the one that MONAI's `Invertd` takes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, head
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Invertd

from scripts.run import InputError
from scripts.transforms import SourceGrid, outside_model_space

AFFINES = {  # voxel to world, without the origin
    "LAS": np.diag([-4.0, 4, 4]),
    "anisotropic": np.diag([3.0, 4, 2]),
    "swapped axes": np.array([[0, 4.0, 0], [0, 0, 4], [-4, 0, 0]]),
    "oblique": np.array([[3.9, -0.8, 0], [0.8, 3.9, 0.1], [0, -0.1, 4]]),
}
REAL = sorted((ROOT.parent / "shared" / "data" / "ds002748-native").glob("sub-*/anat/*_T1w.nii.gz"))[:1]


def preprocessing(spacing: float = 4.0, sides: tuple[int, ...] = (32, 36, 32)):
    """That of the configs."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "encode.json"))
    parser["spacing"], parser["spatial_size"] = spacing, list(sides)
    return parser.get_parsed_content("preprocessing")


def check_home(path: Path, transform) -> None:
    """A random volume in model space: by the header, and by MONAI's trace."""
    image = transform({"image": str(path)})["image"]
    volume = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    invert = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False)
    expected = invert({"image": image, "pred": MetaTensor(volume.clone())})["pred"].as_tensor()[0].numpy().copy()
    expected[outside_model_space(image, transform)[0].numpy()] = 0
    grid = SourceGrid.of_header(json.loads(json.dumps(SourceGrid.of_image(image).as_header())))
    assert grid is not None
    np.testing.assert_array_equal(grid.bring_home(volume[0], transform), expected)


@pytest.mark.parametrize("case", AFFINES)
def test_home_by_the_header_is_home_by_the_trace(case: str, tmp_path: Path) -> None:
    """Bit by bit, through JSON."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = AFFINES[case], [70, -60, 50]
    nib.save(nib.Nifti1Image(head(2), affine), tmp_path / "scan.nii.gz")
    check_home(tmp_path / "scan.nii.gz", preprocessing())


@pytest.mark.skipif(not REAL, reason="the shared data are not here")
def test_a_native_scan_goes_home() -> None:
    """0.87 x 0.87 x 1 mm, through 1.5 mm."""
    check_home(REAL[0], preprocessing(1.5, (112, 136, 112)))


def test_the_grid_has_the_sources_header(tmp_path: Path) -> None:
    """Codes and units stand in it, and no voxel takes memory."""
    source = nib.Nifti1Image(head(1), np.diag([-4.0, 4, 4, 1]))
    source.set_sform(source.affine, 4)
    source.set_qform(source.affine, 4)
    source.header.set_xyzt_units("mm", "msec")
    nib.save(source, tmp_path / "scan.nii")
    image = SourceGrid.of_image(preprocessing()({"image": str(tmp_path / "scan.nii")})["image"]).image()
    assert image.shape == source.shape
    assert image.header.get_xyzt_units() == ("mm", "msec")
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 4)
    np.testing.assert_array_equal(image.affine, source.affine)


def test_another_model_space_is_refused(tmp_path: Path) -> None:
    """A latent made at 4 mm cannot be sent home from 3 mm."""
    nib.save(nib.Nifti1Image(head(1), np.diag([4.0, 4, 4, 1])), tmp_path / "scan.nii")
    grid = SourceGrid.of_image(preprocessing()({"image": str(tmp_path / "scan.nii")})["image"])
    with pytest.raises(InputError, match="another model space"):
        grid.bring_home(torch.zeros(32, 36, 32), preprocessing(spacing=3.0))


def test_a_header_without_a_source_has_no_grid() -> None:
    """Such as a diffusion model's sample."""
    assert SourceGrid.of_header({"name": "sample"}) is None
