"""Into model space and back: exact geometry, the head where it belongs, what is cut off counted, one identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd
from phantoms import GRIDS, SIZE, preprocessing, write_head

from scripts.transforms import (
    FACTOR_KEY,
    ToModelSpace,
    ZeroOutsided,
    count_outside,
    outside_model_space,
    preprocessing_sha256,
)

SMALL = {"spatial_size": [30, 36, 30]}

HEAD = ((20, 40), (20, 40), (20, 40))
LINE, PIECE, SPECK = ((1, 2), (1, 60), (50, 51)), ((55, 60),) * 3, ((60, 61), (2, 3), (3, 4))
SHOULDERS = [((20, 40), (10, 34), (50, 90)), ((0, 60), (20, 60), (30, 50))]
# model space, the scan, boxes of foreground in it; the first voxel of model space
BOXES = {
    "taller than the box: the crown stays": ([20, 20, 30], (30, 30, 60), [((5, 20), (8, 20), (0, 50))], [2, 4, 20]),
    "smaller: centred, out of the image": ([20, 24, 30], (30, 16, 40), [((2, 10), (1, 15), (20, 30))], [-4, -4, 10]),
    "shoulders do not shift x and y": ([30, 30, 50], (60, 60, 90), SHOULDERS, [15, 7, 40]),
    "noise in the air is no head": ([32] * 3, (64, 64, 64), [HEAD, LINE, PIECE, SPECK], [14, 14, 14]),
}  # fmt: skip
STEP = "preprocessing#transforms#"
# keys of the config that change what a voxel of model space is
CHANGES: list[dict[str, Any]] = [
    {"spacing": 3.0}, {"spatial_size": [40, 48, 36]}, {f"{STEP}1#axcodes": "LAS"}, {f"{STEP}2#mode": "nearest"},
    {f"{STEP}2#padding_mode": "zeros"}, {f"{STEP}3#threshold": 0.1}, {f"{STEP}4#percentile": 99.0},
]  # fmt: skip


def box_volume(shape: tuple[int, ...], boxes: list[Any]) -> torch.Tensor:
    """Zeros (1, x, y, z) with boxes of 100, each ((x0, x1), (y0, y1), (z0, z1))."""
    volume = torch.zeros(1, *shape)
    for box in boxes:
        volume[(0, *(slice(*side) for side in box))] = 100.0
    return volume


@pytest.mark.parametrize("grid", GRIDS)
def test_inverse_restores_grid_and_unit(tmp_path: Path, grid: str) -> None:
    """Shape and affine come back to 1e-5 from every grid, intensities within what two interpolations cost."""
    path = write_head(tmp_path, grid)["image"]
    transform = preprocessing()
    item = decollate_batch(list_data_collate([transform({"image": path})]))[0]  # also through a batch
    image, item["pred"] = item["image"], MetaTensor(item["image"].as_tensor().clone())
    invert = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False, to_tensor=True)
    back = invert(item)["pred"]
    source = nib.load(path)
    assert image.shape == (1, *SIZE) and back.shape == (1, *source.shape) and back.dtype == torch.float32
    assert isinstance(image.meta[FACTOR_KEY], float) and image.meta[FACTOR_KEY] == pytest.approx(900, rel=0.15)
    np.testing.assert_allclose(np.asarray(back.affine), source.affine, atol=1e-5)
    # The phantom is smooth: its curvature over 4 mm is far below 5 % of its 900 units, except on its rim. Without
    # resampling only float32's rounding of scale and unscale is left: 2 ulp of 1000.
    error = np.abs(back.as_tensor()[0].numpy() - source.get_fdata())
    assert error.max() <= 2.5e-4 if grid == "aligned" else error.mean() < 20


@pytest.mark.parametrize("case", BOXES)
def test_the_box_lies_about_the_head(case: str) -> None:
    """Voxel by voxel, for heads that fit and that do not."""
    size, shape, boxes, expected = BOXES[case]
    start, end = ToModelSpace(size).compute_bounding_box(box_volume(shape, boxes))
    assert start.tolist() == expected and (end - start).tolist() == size


def test_what_lies_outside_is_counted_and_becomes_zero(tmp_path: Path) -> None:
    """On the model's own grid the count is exact: all voxels of the file less those of the box; no other is zeroed."""
    path, transform = write_head(tmp_path, "beyond_model_space")["image"], preprocessing(SMALL)
    image = transform({"image": path})["image"]
    source = torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32))[None]
    result = ZeroOutsided("pred", transform)({"image": image, "pred": torch.full(source.shape, 7.0)})
    outside = result["outside"]
    torch.testing.assert_close(result["pred"], torch.where(outside, 0.0, 7.0))
    foreground = source > 0.05 * np.percentile(source.numpy(), 99.5)
    n_foreground = int((foreground & outside).sum())
    assert count_outside(source, outside) == (source.numel() - 30 * 36 * 30, n_foreground) and n_foreground > 0


@pytest.mark.parametrize("unit", [1.0, 1e-5])
def test_nothing_is_outside_where_the_scan_fits(tmp_path: Path, unit: float) -> None:
    """A scan smaller than model space lies in it whole, whatever its unit."""
    path = write_head(tmp_path, "smaller_than_head")["image"]
    scan = nib.load(path)
    nib.save(nib.Nifti1Image((scan.get_fdata() * unit).astype(np.float32), scan.affine), path)
    transform = preprocessing()
    assert not outside_model_space(transform({"image": path})["image"], transform).any()


def test_other_arguments_have_another_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that changes a voxel, the order of the steps, and the version of the code."""
    kinds = [preprocessing(), *(preprocessing(change) for change in CHANGES)]
    kinds.append(Compose(preprocessing().transforms[::-1]))
    found = [preprocessing_sha256(kind) for kind in kinds]
    assert found[0] == preprocessing_sha256(preprocessing())
    monkeypatch.setattr("scripts.transforms.model_space.PREPROCESSING_VERSION", 0)
    assert len({*found, preprocessing_sha256(preprocessing())}) == len(kinds) + 1
