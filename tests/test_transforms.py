"""Into model space and back: exact geometry, the head where it belongs, the scanner's unit kept."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, LoadImaged, Orientationd, Spacingd

from scripts.run import InputError
from scripts.transforms import (
    FACTOR_KEY,
    ScaleByPercentile,
    ScaleByPercentiled,
    ToModelSpace,
    ToModelSpaced,
    ZeroOutsided,
    count_outside,
    outside_model_space,
    percentile_of,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
NATIVE = SHARED / "ds002748-native" / "sub-31" / "anat" / "sub-31_T1w.nii.gz"
WHOLE_HEAD = SHARED / "ds000011" / "sub-05" / "anat" / "sub-05_T1w.nii.gz"

SPACING = 4.0
SIZE = [40, 48, 40]
RAS = np.eye(3)
LAS = np.diag([-1.0, 1.0, 1.0])
PSR = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
OBLIQUE = nib.eulerangles.euler2mat(0.2, -0.15, 0.1)

# name, shape, spacing in mm, rotation, file's ending
GRIDS = [
    ("same_grid", (44, 50, 42), (4.0, 4.0, 4.0), RAS, ".nii.gz"),
    ("las", (44, 50, 42), (4.0, 4.0, 4.0), LAS, ".nii"),
    ("axes_swapped", (60, 55, 51), (3.0, 3.5, 3.0), PSR, ".nii.gz"),
    ("oblique", (61, 64, 57), (3.0, 3.0, 3.0), OBLIQUE @ LAS, ".nii.gz"),
    ("anisotropic", (91, 101, 33), (2.0, 2.0, 6.0), OBLIQUE, ".nii.gz"),
    ("beyond_model_space", (70, 71, 69), (4.0, 4.0, 4.0), RAS, ".nii.gz"),
    ("smaller_than_head", (25, 27, 23), (4.0, 4.0, 4.0), LAS, ".nii.gz"),
    ("freesurfer", (53, 52, 51), (3.0, 3.0, 3.0), PSR, ".mgz"),
]


def preprocessing(size: list[int] = SIZE, spacing: float = SPACING) -> Compose:
    """The configs' block, at another resolution."""
    return Compose(
        [
            LoadImaged(
                keys="image", reader="NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.float32
            ),
            Orientationd(keys="image", axcodes="RAS", labels=None),
            Spacingd(keys="image", pixdim=[spacing] * 3, mode="bilinear", padding_mode="border"),
            ToModelSpaced(keys="image", spatial_size=size),
            ScaleByPercentiled(keys="image", percentile=99.5),
        ]
    )


def write_head(folder: Path, shape, spacing, rotation, ending=".nii.gz") -> Path:
    """A smooth, asymmetric ellipsoid of 130 x 150 x 130 mm with an off-centre affine, about 900 in its unit."""
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(spacing)
    affine[:3, 3] = np.array([3.0, -11.0, 7.0]) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    x, y, z = np.moveaxis((index @ affine[:3, :3].T + affine[:3, 3]) - [3.0, -11.0, 7.0], -1, 0)
    radius = np.sqrt((x / 65) ** 2 + (y / 75) ** 2 + (z / 65) ** 2)
    data = np.clip(6 * (1 - radius), 0, 1) * (700 + 200 * np.sin(x / 25) + 100 * np.cos(y / 20 + z / 30))
    kind = nib.MGHImage if ending == ".mgz" else nib.Nifti1Image
    path = folder / f"head{ending}"
    nib.save(kind(data.astype(np.float32), affine.astype(np.float32)), path)
    return path


def there_and_back(transform: Compose, path: Path) -> tuple[dict, MetaTensor]:
    """Preprocess, go through a batch, and bring the unchanged volume back."""
    item = decollate_batch(list_data_collate([transform({"image": str(path)})]))[0]
    item["pred"] = MetaTensor(item["image"].as_tensor().clone())
    back = Invertd(keys="pred", transform=transform, orig_keys="image", nearest_interp=False, to_tensor=True)
    return item, back(item)["pred"]


def box_volume(shape, *boxes) -> torch.Tensor:
    """Zeros (1, x, y, z) with boxes of 100, each ((x0, x1), (y0, y1), (z0, z1))."""
    volume = torch.zeros(1, *shape)
    for x, y, z in boxes:
        volume[0, x[0] : x[1], y[0] : y[1], z[0] : z[1]] = 100.0
    return volume


@pytest.mark.parametrize(("name", "shape", "spacing", "rotation", "ending"), GRIDS, ids=[g[0] for g in GRIDS])
def test_inverse_restores_grid_and_unit(tmp_path, name, shape, spacing, rotation, ending):
    """Shape and affine come back to 1e-5 from every grid, intensities within what two interpolations cost."""
    path = write_head(tmp_path, shape, spacing, rotation, ending)
    item, back = there_and_back(preprocessing(), path)
    source = nib.load(path)
    assert tuple(item["image"].shape) == (1, *SIZE)
    assert tuple(back.shape) == (1, *shape)
    np.testing.assert_allclose(np.asarray(back.affine), source.affine, atol=1e-5)
    assert back.dtype == torch.float32
    # The phantom is smooth: its curvature over 4 mm is far below 5 % of its 900 units, except on its rim.
    error = np.abs(back.as_tensor()[0].numpy() - source.get_fdata())
    assert error.mean() < 20


def test_inverse_is_exact_on_the_models_grid(tmp_path):
    """Without resampling only float32's rounding of scale and unscale is left: 2 ulp of 1000."""
    path = write_head(tmp_path, *GRIDS[0][1:4])
    _, back = there_and_back(preprocessing(), path)
    np.testing.assert_allclose(back.as_tensor()[0].numpy(), nib.load(path).get_fdata(), atol=2.5e-4)


def test_second_pass_finds_the_same_box(tmp_path):
    """What came back from model space goes in again unmoved, also where neck was cut."""
    volume = box_volume((40, 60, 90), ((5, 35), (15, 45), (40, 80)), ((15, 25), (20, 58), (0, 40)))
    cropper = ToModelSpace([40, 40, 60])
    first = cropper(MetaTensor(volume))
    again = cropper(cropper.inverse(first.clone()))
    torch.testing.assert_close(again.affine, first.affine, rtol=0, atol=0)
    assert torch.equal(again.as_tensor(), first.as_tensor())


def test_tall_head_keeps_its_top():
    """Taller than the box: the last slice of the box is the head's last, the neck is cut."""
    start, end = ToModelSpace([20, 20, 30]).compute_bounding_box(box_volume((30, 30, 60), ((5, 20), (8, 20), (0, 50))))
    assert (start[2], end[2]) == (20, 50)


def test_short_head_is_centred():
    """Smaller than the box on every axis: centred, reaching out of the image where need be."""
    start, end = ToModelSpace([20, 24, 30]).compute_bounding_box(box_volume((30, 16, 40), ((2, 10), (1, 15), (20, 30))))
    assert start.tolist() == [-4, -4, 10]
    assert (end - start).tolist() == [20, 24, 30]


def test_shoulders_do_not_shift_the_head():
    """x and y follow the upper half of a head with neck, not what is attached below."""
    head = ((20, 40), (10, 34), (50, 90))
    shoulders = ((0, 60), (20, 60), (30, 50))
    start, _ = ToModelSpace([30, 30, 50]).compute_bounding_box(box_volume((60, 60, 90), head, shoulders))
    assert start.tolist() == [15, 7, 40]


def test_air_noise_does_not_widen_the_box():
    """Single voxels and thin lines above the threshold, and pieces apart from the head, are not the head."""
    head = ((20, 40), (20, 40), (20, 40))
    noisy = box_volume((64, 64, 64), head, ((1, 2), (1, 60), (50, 51)), ((55, 60), (55, 60), (55, 60)))
    noisy[0, ::9, ::9, ::9] = 50.0
    clean = box_volume((64, 64, 64), head)
    cropper = ToModelSpace([32, 32, 32])
    assert cropper.compute_bounding_box(noisy)[0].tolist() == cropper.compute_bounding_box(clean)[0].tolist()


@settings(max_examples=15, deadline=None)
@given(shift=st.tuples(*[st.integers(-6, 6)] * 3))
def test_a_moved_head_lands_in_the_same_place(shift):
    """Model space does not depend on where in the field of view the head lies."""
    start = np.array([12, 11, 10])
    rng = np.random.default_rng(0)
    head = torch.from_numpy(rng.uniform(50, 100, (12, 14, 13)).astype(np.float32))
    outcomes = []
    for corner in (start, start + shift):
        volume = torch.zeros(1, 36, 36, 36)
        volume[0][tuple(slice(c, c + n) for c, n in zip(corner, head.shape, strict=True))] = head
        outcomes.append(ToModelSpace([16, 18, 15])(volume))
    assert torch.equal(torch.as_tensor(outcomes[0]), torch.as_tensor(outcomes[1]))


@pytest.mark.parametrize("size", [[10, 10], [10, 10, 0], [10, 10, -4]])
def test_bad_size_is_refused(size):
    """Model space has three positive sides."""
    with pytest.raises(ValueError, match="spatial_size"):
        ToModelSpace(size)


def test_two_channels_are_refused():
    """A vector image has no one foreground."""
    with pytest.raises(ValueError, match="one channel"):
        ToModelSpace([4, 4, 4])(torch.ones(2, 8, 8, 8))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), percentile=st.sampled_from([50.0, 95.0, 99.5, 100.0]))
def test_factor_is_numpys_percentile(seed, percentile):
    """The same linear interpolation between ranks, to float32."""
    values = np.random.default_rng(seed).gamma(2.0, 100.0, (1, 7, 8, 9)).astype(np.float32)
    scaled = ScaleByPercentile(percentile)(torch.from_numpy(values))
    assert scaled.meta[FACTOR_KEY] == pytest.approx(np.percentile(values.astype(np.float64), percentile), rel=1e-6)
    assert percentile_of(scaled, percentile) == pytest.approx(1.0, rel=1e-5)


def test_scaling_clips_nothing_and_leaves_its_input_alone():
    """Values below 0 and above 1 stay, and the input's values and meta are untouched."""
    volume = MetaTensor(torch.linspace(-10, 1000, 1000).reshape(1, 10, 10, 10))
    kept = volume.as_tensor().clone()
    scaled = ScaleByPercentile()(volume)
    assert scaled.min() < 0
    assert scaled.max() > 1
    assert FACTOR_KEY not in volume.meta
    assert not volume.applied_operations
    assert torch.equal(volume.as_tensor(), kept)


def test_scaling_twice_keeps_the_whole_factor():
    """The meta's factor leads back to the scanner's unit, however often the volume was scaled."""
    volume = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 500
    scale = ScaleByPercentile(99.5)
    twice = scale(scale(volume) * 2)
    torch.testing.assert_close(twice.as_tensor() * twice.meta[FACTOR_KEY], volume * 2)


def test_factor_travels_through_a_batch(tmp_path):
    """A float before and after collate and decollate."""
    item, _ = there_and_back(preprocessing(), write_head(tmp_path, *GRIDS[0][1:4]))
    factor = item["image"].meta[FACTOR_KEY]
    assert isinstance(factor, float)
    assert factor == pytest.approx(900, rel=0.15)


@pytest.mark.parametrize("value", [0.0, -3.0, float("nan")])
def test_empty_scan_is_named(tmp_path, value):
    """A scan without a positive percentile stops in one sentence with its file name."""
    path = tmp_path / "sub-07_T1w.nii.gz"
    nib.save(nib.Nifti1Image(np.full((30, 30, 30), value, np.float32), np.diag([4.0, 4.0, 4.0, 1.0])), path)
    with pytest.raises(RuntimeError) as caught:  # MONAI's wrapper; errors.report_input_errors looks through it
        preprocessing()({"image": str(path)})
    assert isinstance(caught.value.__cause__, InputError)
    assert "sub-07_T1w.nii.gz" in str(caught.value.__cause__)


def test_outside_counts_what_was_cut(tmp_path):
    """On the model's own grid the count is exact: all voxels of the file less those of the box that it holds."""
    path = write_head(tmp_path, *GRIDS[5][1:4])
    transform = preprocessing([30, 36, 30])
    image = transform({"image": str(path)})["image"]
    outside = outside_model_space(image, transform)
    source = torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32))[None]
    assert outside.shape == source.shape
    counts = count_outside(source, outside)
    assert counts.voxels == source.numel() - 30 * 36 * 30
    foreground = source > 0.05 * np.percentile(source.numpy(), 99.5)
    assert counts.foreground_voxels == int((foreground & outside).sum()) > 0


def test_what_lay_outside_becomes_zero_and_nothing_else(tmp_path):
    path = write_head(tmp_path, *GRIDS[5][1:4])
    transform = preprocessing([30, 36, 30])
    image = transform({"image": str(path)})["image"]
    outside = outside_model_space(image, transform)
    result = ZeroOutsided("pred", transform)({"image": image, "pred": torch.full(outside.shape, 7.0)})
    torch.testing.assert_close(result["outside"], outside)
    torch.testing.assert_close(result["pred"], torch.where(outside, 0.0, 7.0))


@pytest.mark.parametrize("unit", [1.0, 1e-5])
def test_nothing_outside_where_the_scan_fits(tmp_path, unit):
    """A scan smaller than model space lies in it whole, whatever its unit."""
    path = write_head(tmp_path, (30, 31, 29), (4.0, 4.0, 4.0), LAS)
    scan = nib.load(path)
    nib.save(nib.Nifti1Image((scan.get_fdata() * unit).astype(np.float32), scan.affine), path)
    transform = preprocessing()
    assert not outside_model_space(transform({"image": str(path)})["image"], transform).any()


def test_counting_needs_one_grid():
    """Source and mask of different shapes are a programming error."""
    with pytest.raises(ValueError, match="shape"):
        count_outside(torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 5, dtype=torch.bool))


@pytest.mark.skipif(not NATIVE.exists(), reason="needs ../shared/data")
def test_native_scan_round_trip():
    """0.87 x 0.87 x 1 mm to 1.5 mm and back loses fine detail only: 33.2 dB measured over what model space holds."""
    transform = preprocessing([112, 136, 112], 1.5)
    item, back = there_and_back(transform, NATIVE)
    source = nib.load(NATIVE)
    assert tuple(back.shape[1:]) == source.shape
    np.testing.assert_allclose(np.asarray(back.affine), source.affine, atol=1e-5)
    inside = ~outside_model_space(item["image"], transform)
    values = torch.from_numpy(source.get_fdata(dtype=np.float32))[None]
    counts = count_outside(values, ~inside)
    assert counts.foreground_voxels == 0
    error = ((values - back.as_tensor())[inside] / item["image"].meta[FACTOR_KEY]).square().mean()
    assert -10 * torch.log10(error) > 30


@pytest.mark.skipif(not WHOLE_HEAD.exists(), reason="needs ../shared/data")
def test_whole_head_with_noisy_air_is_found():
    """Air noise reaches the foreground's threshold; the box still ends at the crown and holds the back of the head."""
    image = preprocessing([112, 136, 112], 1.5)({"image": str(WHOLE_HEAD)})["image"].as_tensor()[0]
    crown = (image[:, :, -4:] > 0.3).float().mean()
    assert crown > 0.01
    assert (image[:, :2, 56:] > 0.3).float().mean() < 0.01
