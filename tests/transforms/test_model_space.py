"""Into model space and back: exact geometry, the head where it belongs, what is cut off counted, one identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, NumpyReader, decollate_batch, list_data_collate
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

WHOLE_HEAD = ROOT.parent / "shared" / "data" / "ds000011" / "sub-05" / "anat" / "sub-05_T1w.nii.gz"
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
WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: ToModelSpace([10, 10]), "spatial_size"),
    (lambda: ToModelSpace([10, 10, 0]), "spatial_size"),
    (lambda: ToModelSpace([4, 4, 4])(torch.ones(2, 8, 8, 8)), "one channel"),
    (lambda: count_outside(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 5, dtype=torch.bool)), "shape"),
]


def there_and_back(transform: Compose, path: str | Path) -> tuple[MetaTensor, MetaTensor]:
    """Preprocess, go through a batch, and bring the unchanged volume back; in model space, and at home."""
    item = decollate_batch(list_data_collate([transform({"image": str(path)})]))[0]
    item["pred"] = MetaTensor(item["image"].as_tensor().clone())
    back = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False, to_tensor=True)
    return item["image"], back(item)["pred"]


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
    image, back = there_and_back(preprocessing(), path)
    source = nib.load(path)
    assert image.shape == (1, *SIZE) and back.shape == (1, *source.shape) and back.dtype == torch.float32
    assert isinstance(image.meta[FACTOR_KEY], float) and image.meta[FACTOR_KEY] == pytest.approx(900, rel=0.15)
    np.testing.assert_allclose(np.asarray(back.affine), source.affine, atol=1e-5)
    # The phantom is smooth: its curvature over 4 mm is far below 5 % of its 900 units, except on its rim. Without
    # resampling only float32's rounding of scale and unscale is left: 2 ulp of 1000.
    error = np.abs(back.as_tensor()[0].numpy() - source.get_fdata())
    assert error.max() <= 2.5e-4 if grid == "aligned" else error.mean() < 20


def test_second_pass_finds_the_same_box() -> None:
    """What came back from model space goes in again unmoved, also where neck was cut."""
    volume = box_volume((40, 60, 90), [((5, 35), (15, 45), (40, 80)), ((15, 25), (20, 58), (0, 40))])
    cropper = ToModelSpace([40, 40, 60])
    first = cropper(MetaTensor(volume))
    again = cropper(cropper.inverse(first.clone()))
    torch.testing.assert_close(again.affine, first.affine, rtol=0, atol=0)
    assert torch.equal(again.as_tensor(), first.as_tensor())


@pytest.mark.parametrize("case", BOXES)
def test_the_box_lies_about_the_head(case: str) -> None:
    """Voxel by voxel, for heads that fit and that do not."""
    size, shape, boxes, expected = BOXES[case]
    start, end = ToModelSpace(size).compute_bounding_box(box_volume(shape, boxes))
    assert start.tolist() == expected and (end - start).tolist() == size


@settings(max_examples=10, deadline=None)
@given(shift=st.tuples(*[st.integers(-6, 6)] * 3))
def test_a_moved_head_lands_in_the_same_place(shift: tuple[int, int, int]) -> None:
    """Model space does not depend on where in the field of view the head lies."""
    head = torch.from_numpy(np.random.default_rng(0).uniform(50, 100, (12, 14, 13)).astype(np.float32))
    outcomes = []
    for x, y, z in ((12, 11, 10), np.add((12, 11, 10), shift)):
        volume = torch.zeros(1, 36, 36, 36)
        volume[0, x : x + 12, y : y + 14, z : z + 13] = head
        outcomes.append(torch.as_tensor(ToModelSpace([16, 18, 15])(volume)))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize(("call", "name"), WRONG)
def test_wrong_arguments_are_named(call: Callable[[], object], name: str) -> None:
    """ValueError, with the argument at fault."""
    with pytest.raises(ValueError, match=name):
        call()


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


def test_equal_arguments_have_one_sha256() -> None:
    """Built twice, wherever the code of a step lies, whatever optional readers MONAI finds on this machine."""
    moved = preprocessing()
    moved.transforms[0]._loader.readers.insert(0, NumpyReader())
    for step in moved.transforms:
        step.__class__ = type(type(step).__name__, (type(step),), {"__module__": "elsewhere", "__doc__": "rewritten"})
    sha256 = preprocessing_sha256(preprocessing())
    assert len(sha256) == 64 and preprocessing_sha256(moved) == sha256


def test_use_does_not_change_the_sha256(tmp_path: Path) -> None:
    """Whatever scan was read last: MONAI's reader keeps its name."""
    transform = preprocessing()
    transform({"image": write_head(tmp_path)["image"]})
    assert preprocessing_sha256(transform) == preprocessing_sha256(preprocessing())


def test_other_arguments_have_another_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that changes a voxel, the order of the steps, and the version of the code."""
    kinds = [preprocessing(), *(preprocessing(change) for change in CHANGES)]
    kinds.append(Compose(preprocessing().transforms[::-1]))
    found = [preprocessing_sha256(kind) for kind in kinds]
    monkeypatch.setattr("scripts.transforms.model_space.PREPROCESSING_VERSION", 0)
    assert len({*found, preprocessing_sha256(preprocessing())}) == len(kinds) + 1


@pytest.mark.skipif(not WHOLE_HEAD.exists(), reason="needs ../shared/data")
def test_whole_head_with_noisy_air_is_found() -> None:
    """Air noise reaches the foreground's threshold; the box still ends at the crown and holds the back of the head."""
    transform = preprocessing({"spacing": 1.5, "spatial_size": [112, 136, 112]})
    image = transform({"image": str(WHOLE_HEAD)})["image"].as_tensor()[0]
    assert (image[:, :, -4:] > 0.3).float().mean() > 0.01
    assert (image[:, :2, 56:] > 0.3).float().mean() < 0.01
