"""The way home that a latent's header keeps is the one that MONAI's `Invertd` takes."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from phantoms import GRIDS, SIZE, preprocessing, write_head

from scripts.run import InputError
from scripts.transforms import SourceGrid, model_space_image, outside_model_space


def grid_of(path: str | Path) -> SourceGrid:
    """Of a scan in model space."""
    return SourceGrid.of_image(preprocessing()({"image": str(path)})["image"])


@pytest.mark.parametrize("name", GRIDS)
def test_home_by_the_header_is_home_by_the_trace(name: str, tmp_path: Path) -> None:
    """A random volume, bit by bit, through JSON, to every grid."""
    transform = preprocessing()
    image = transform({"image": write_head(tmp_path, name)["image"]})["image"]
    volume = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    invert = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False)
    expected = invert({"image": image, "pred": MetaTensor(volume.clone())})["pred"].as_tensor()[0].numpy().copy()
    expected[outside_model_space(image, transform)[0].numpy()] = 0
    grid = SourceGrid.of_header(json.loads(json.dumps(SourceGrid.of_image(image).as_header())))
    assert grid is not None
    np.testing.assert_array_equal(grid.bring_home(volume[0], transform), expected)


def test_the_grid_has_the_sources_header(tmp_path: Path) -> None:
    """Shape, affine, codes and units stand in it."""
    path = write_head(tmp_path)["image"]
    source = nib.load(path)
    source.set_sform(source.affine, 4)
    source.set_qform(source.affine, 2)
    source.header.set_xyzt_units("mm", "msec")
    nib.save(nib.Nifti1Image(source.get_fdata(dtype=np.float32), None, source.header), path)
    image = grid_of(path).image()
    assert image.shape == source.shape and image.header.get_xyzt_units() == ("mm", "msec")
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (4, 2)
    np.testing.assert_array_equal(image.affine, source.affine)


def test_model_space_lies_where_its_scan_lies(tmp_path: Path) -> None:
    """A latent's volume stands where preprocessing put it, one without a source about the origin."""
    path = write_head(tmp_path)["image"]
    image = preprocessing()({"image": path})["image"]
    np.testing.assert_allclose(model_space_image(SIZE, 4.0, grid_of(path)).affine, image.affine, atol=1e-5)
    centred = model_space_image(SIZE, 4.0)
    assert centred.shape == SIZE and centred.header.get_zooms() == (4.0,) * 3
    np.testing.assert_allclose(centred.affine @ [*(np.array(SIZE) - 1) / 2, 1], [0, 0, 0, 1])


def test_another_model_space_is_refused(tmp_path: Path) -> None:
    """A latent made at 4 mm cannot be sent home from 3 mm, nor from another size."""
    grid = grid_of(write_head(tmp_path)["image"])
    for transform, sides in ((preprocessing({"spacing": 3.0}), SIZE), (preprocessing(), (32, 36, 32))):
        with pytest.raises(InputError, match="another model space"):
            grid.bring_home(torch.zeros(sides), transform)
