"""What evaluation and reconstruction write: grids and units as in the source, every figure, nothing half."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import contents
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, CopyItemsd, Invertd, LoadImaged, Orientationd, Spacingd
from torch import nn

from scripts.jobs.evaluate import EvaluationWriter
from scripts.jobs.inference import ReconstructionWriter
from scripts.metrics import DCT, PatchPCA, Trilinear
from scripts.networks import AutocastInferer, posterior_iteration, prepare_batch
from scripts.transforms import ScaleByPercentiled, ToModelSpaced, ZeroOutsided, write_nifti

CPU = torch.device("cpu")
SIZE = (48, 48, 48)  # at 4 mm: 192 mm
# sform code, qform code of the source; code of both in the output
CODES = [(1, 1, 1), (4, 4, 4), (2, 2, 1), (1, 0, 1), (0, 1, 1), (4, 1, 1), (1, 4, 1), (3, 3, 1), (4, 0, 1), (0, 0, 1)]
UNITS = [("mm", "sec"), ("unknown", "unknown"), ("micron", "msec"), ("meter", "sec")]
# axes and spacing (mm) of the synthetic scans
GRIDS = {"ras": ("RAS", (4.0, 4.0, 4.0)), "lpi": ("LPI", (3.5, 4.2, 3.9)), "psr": ("PSR", (3.0, 4.0, 5.0))}


class FakeNetwork(nn.Module):
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


def preprocessing() -> Compose:
    """The transforms of inference.json, with a coarser model space."""
    return Compose(
        [
            LoadImaged("image", "NibabelReader", image_only=True, ensure_channel_first=True, dtype=torch.float32),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=[4.0] * 3, mode="bilinear", padding_mode="zeros"),
            ToModelSpaced("image", spatial_size=SIZE),
            ScaleByPercentiled("image", percentile=99.5),
        ]
    )


def head(shape: Sequence[int], spacing: Sequence[float], height: float = 75.0) -> np.ndarray:
    """A smooth lopsided ellipsoid, about 130 x 160 mm wide, in RAS axes and scanner-like units."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt((x / 65) ** 2 + (y / 80) ** 2 + (z / height) ** 2)
    return (np.clip(1.2 - radius, 0, 1) * (600 + 2 * x + np.abs(y - 20) + 100 * np.sin(z / 20))).astype(np.float32)


def write_scan(folder: Path, name: str, grid: str = "ras", height: float = 75.0, ending: str = ".nii.gz") -> dict:
    """Write a scan that fills 176 mm (240 mm in z) and return its cohort record."""
    axes, spacing = GRIDS[grid]
    fields = {"R": 176, "A": 188, "S": 176 if height < 90 else 240}
    shape = [int(fields[axis] / step) for axis, step in zip("RAS", spacing, strict=True)]
    image = nib.Nifti1Image(head(shape, spacing, height), np.diag([*spacing, 1.0]))
    image.affine[:3, 3] = -np.array(shape) * spacing / 2 + [3, -5, 8]
    wanted = nib.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    data, affine = np.asarray(image.dataobj), image.affine
    path = folder / f"{name}{ending}"
    if ending == ".mgz":
        nib.save(nib.MGHImage(data, affine), path)
    else:
        image = nib.Nifti1Image(data, affine)
        image.set_sform(affine, 1), image.set_qform(affine, 1), image.header.set_xyzt_units("mm", "sec")
        nib.save(image, path)
    return {"image": str(path), "name": name, "subject": name[:6], "session": "", "label": "control", "split": "val",
            "cohort": "c"}  # fmt: skip


def largest_difference(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A cheap stand-in for LPIPS."""
    return (image - target).abs().amax()


@pytest.mark.parametrize(("sform", "qform", "expected"), CODES)
def test_codes(tmp_path, sform, qform, expected):
    """Both codes are 1, or 4 where the source says so twice; both matrices are the source's affine."""
    affine = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 30], [0, 0, 0, 1]])
    source = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), affine)
    source.set_sform(affine, sform)
    source.set_qform(affine, qform)
    nib.save(source, tmp_path / "source.nii.gz")
    source = nib.load(tmp_path / "source.nii.gz")
    write_nifti(np.ones((3, 4, 5)), source, tmp_path / "out.nii.gz")
    out = nib.load(tmp_path / "out.nii.gz")
    for matrix, code in (out.get_sform(coded=True), out.get_qform(coded=True)):
        assert code == expected
        np.testing.assert_allclose(matrix, source.affine, atol=1e-5)  # fp32 header
    np.testing.assert_allclose(out.affine, source.affine, atol=1e-5)


@pytest.mark.parametrize("units", UNITS)
def test_units(tmp_path, units):
    """Length and time units are the source's: a viewer reads micron as a thousandth."""
    source = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), np.eye(4))
    source.header.set_xyzt_units(*units)
    write_nifti(np.ones((3, 4, 5)), source, tmp_path / "out.nii")
    assert nib.load(tmp_path / "out.nii").header.get_xyzt_units() == units


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16])
def test_values_are_float32(tmp_path, dtype):
    """float32 as they are: no scaling of the header, also where the source has one."""
    source = nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4))
    source.header.set_slope_inter(3.0, 5.0)
    volume = np.arange(8, dtype=dtype).reshape(2, 2, 2)
    write_nifti(volume, source, tmp_path / "a" / "out.nii.gz")
    out = nib.load(tmp_path / "a" / "out.nii.gz")
    assert out.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(out.dataobj), volume.astype(np.float32))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.nii.gz"]


def test_freesurfer_source(tmp_path):
    """FreeSurfer's format knows no codes and is in mm."""
    affine = np.array([[-1.0, 0, 0, 90], [0, 0, 1.0, -120], [0, -1.0, 0, 100], [0, 0, 0, 1]])
    nib.save(nib.MGHImage(np.zeros((4, 5, 6), np.uint8), affine), tmp_path / "t1.mgz")
    write_nifti(np.ones((4, 5, 6)), nib.load(tmp_path / "t1.mgz"), tmp_path / "out.nii.gz")
    out = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(out.affine, affine, atol=1e-5)
    assert (out.header["sform_code"], out.header["qform_code"]) == (1, 1)
    assert out.header.get_xyzt_units() == ("mm", "sec")


def reconstruct(
    records: Sequence[dict], folder: Path, network: nn.Module, *, model_space: bool = False, amp: bool = False
) -> pd.DataFrame:
    """Run inference.json's evaluator; returns summary.csv."""
    steps = preprocessing()
    after = [
        Invertd("pred", steps, orig_keys="image", nearest_interp=False, to_tensor=True),
        ZeroOutsided("pred", steps),
    ]
    if model_space:
        after.insert(0, CopyItemsd("pred", names="pred_model_space"))
    SupervisedEvaluator(
        CPU, DataLoader(Dataset(records, steps), batch_size=1), network, prepare_batch=prepare_batch,
        inferer=AutocastInferer(amp, CPU), postprocessing=Compose(after),
        val_handlers=[ReconstructionWriter(str(folder))],
    ).run()  # fmt: skip
    return pd.read_csv(folder / "summary.csv")


@pytest.mark.parametrize("grid", GRIDS)
def test_reconstruction_is_on_the_sources_grid(tmp_path, grid):
    """Shape, affine, unit and intensity are the source's, for any axes and spacing."""
    record = write_scan(tmp_path, "sub-01_T1w", grid)
    table = reconstruct([record], tmp_path / "out", FakeNetwork())
    source, recon = nib.load(record["image"]), nib.load(tmp_path / "out" / "sub-01_T1w_recon.nii.gz")
    assert recon.shape == source.shape
    np.testing.assert_allclose(recon.affine, source.affine, atol=1e-4)
    assert recon.header.get_xyzt_units() == ("mm", "sec")
    a, b = source.get_fdata(), recon.get_fdata()
    inside = a > 100
    # Two trilinear resamplings of a head that is smooth over 20 mm cost below 2 % of its intensity.
    assert np.abs(a - b)[inside].mean() < 0.02 * a[inside].mean()
    assert table["l1"][0] < 0.02


def test_outputs_and_columns(tmp_path, capsys):
    """Per scan NIfTI and PNG by its name, one table; nothing under a temporary name, and the paths are told."""
    records = [write_scan(tmp_path, "sub-01_T1w"), write_scan(tmp_path, "sub-02_ses-1_T1w", "lpi")]
    out = tmp_path / "out"
    table = reconstruct(records, out, FakeNetwork())
    assert sorted(path.name for path in out.iterdir()) == [
        "report.html", "sub-01_T1w_recon.nii.gz", "sub-01_T1w_recon.png", "sub-02_ses-1_T1w_recon.nii.gz",
        "sub-02_ses-1_T1w_recon.png", "summary.csv",
    ]  # fmt: skip
    assert list(table) == ["name", "l1", "intensity_factor", "voxels_outside", "foreground_voxels_outside"]
    assert table["name"].tolist() == ["sub-01_T1w", "sub-02_ses-1_T1w"]
    assert (out / "sub-01_T1w_recon.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) in capsys.readouterr().out


def test_figures_of_the_summary(tmp_path):
    """A network that halves: the error is half the mean intensity in units of the percentile, the factor is it."""
    record = write_scan(tmp_path, "sub-01_T1w")
    table = reconstruct([record], tmp_path / "out", FakeNetwork(0.5))
    volume = preprocessing()(record)["image"]
    source = nib.load(record["image"]).get_fdata()
    assert table["intensity_factor"][0] == pytest.approx(volume.meta["intensity_factor"], rel=1e-5)
    expected = 0.5 * source.mean() / table["intensity_factor"][0]
    assert table["l1"][0] == pytest.approx(expected, rel=0.02)  # as above
    assert table["foreground_voxels_outside"][0] == 0


def test_voxels_outside_of_model_space_are_zero(tmp_path):
    """A head of 230 mm loses its neck: those voxels are zero, counted, and not in the error."""
    record = write_scan(tmp_path, "sub-01_T1w", height=110.0)
    table = reconstruct([record], tmp_path / "out", FakeNetwork())
    source = nib.load(record["image"]).get_fdata()
    recon = nib.load(tmp_path / "out" / "sub-01_T1w_recon.nii.gz").get_fdata()
    n_neck = int(np.all(recon == 0, axis=(0, 1)).argmin())  # slices from below that are zero altogether
    assert n_neck >= 5
    assert (source[:, :, :n_neck] > 100).any()
    assert table["voxels_outside"][0] >= source[:, :, :n_neck].size
    assert 0 < table["foreground_voxels_outside"][0] < table["voxels_outside"][0]
    assert table["l1"][0] < 0.02


@pytest.mark.parametrize("grid", ["lpi", "psr"])
def test_nothing_fades_at_the_edge_of_model_space(tmp_path, grid):
    """A reconstruction that is 1 and more everywhere is zero in the voxels that are counted as outside, and in no
    other; there interpolation with the zeros beyond leaves at least half of it."""
    record = write_scan(tmp_path, "sub-01_T1w", grid, height=110.0)
    table = reconstruct([record], tmp_path / "out", FakeNetwork(1.0, 1.0))
    recon = nib.load(tmp_path / "out" / "sub-01_T1w_recon.nii.gz").get_fdata()
    assert (recon == 0).sum() == table["voxels_outside"][0] > 0
    assert recon[recon != 0].min() > 0.49 * table["intensity_factor"][0]


def test_model_space_copies(tmp_path):
    """On request scan and reconstruction in model space: its shape, spacing and mm, in units of the percentile."""
    record = write_scan(tmp_path, "sub-01_T1w", "psr")
    reconstruct([record], tmp_path / "out", FakeNetwork(0.5), model_space=True)
    volume = preprocessing()(record)["image"]
    for ending, gain in (("model_space", 1.0), ("model_space_recon", 0.5)):
        image = nib.load(tmp_path / "out" / f"sub-01_T1w_{ending}.nii.gz")
        assert image.shape == SIZE and nib.aff2axcodes(image.affine) == tuple("RAS")
        np.testing.assert_allclose(image.header.get_zooms(), 4.0)
        np.testing.assert_allclose(image.affine, volume.affine, atol=1e-4)
        np.testing.assert_allclose(image.get_fdata(), gain * volume[0].numpy(), atol=1e-6)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)


def test_reconstruction_of_freesurfers_format(tmp_path):
    """An .mgz gives a NIfTI on its grid."""
    record = write_scan(tmp_path, "sub-01", "lpi", ending=".mgz")
    reconstruct([record], tmp_path / "out", FakeNetwork())
    out = nib.load(tmp_path / "out" / "sub-01_recon.nii.gz")
    source = nib.load(record["image"])
    assert out.shape == source.shape
    np.testing.assert_allclose(out.affine, source.affine, atol=1e-4)


def test_reconstruction_under_autocast(tmp_path):
    """With bf16 the file is float32 as ever; the network's input and output are rounded to 8 bits (2^-9 each), and
    nothing after them."""
    record = write_scan(tmp_path, "sub-01_T1w")
    volumes = []
    for amp in (False, True):
        reconstruct([record], tmp_path / str(amp), FakeNetwork(), amp=amp, model_space=True)
        image = nib.load(tmp_path / str(amp) / "sub-01_T1w_recon.nii.gz")
        assert image.get_data_dtype() == np.float32
        volumes.append(image.get_fdata())
    assert 0 < np.abs(volumes[0] - volumes[1]).max() <= volumes[0].max() / 256


def evaluate(
    records: Sequence[dict],
    folder: Path,
    network: nn.Module,
    *,
    baselines: Sequence = (),
    training: Sequence[dict] | None = None,
    lpips: Callable = largest_difference,
    runs: int = 1,
) -> SimpleNamespace:
    """Run evaluate.json's evaluator; returns its table, summary and text."""
    steps, weights = preprocessing(), folder / "weights.pt"
    folder.mkdir(exist_ok=True)
    weights.write_bytes(b"weights")
    fitted_on = None if training is None else Dataset(training, steps)
    writer = EvaluationWriter(str(folder / "out"), steps, lpips, baselines, fitted_on, "val", str(weights))
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records, steps), batch_size=1), network, prepare_batch=prepare_batch,
        iteration_update=posterior_iteration, inferer=AutocastInferer(False, CPU), val_handlers=[writer],
    )  # fmt: skip
    for _ in range(runs):
        evaluator.run()
    out = folder / "out"
    return SimpleNamespace(
        table=pd.read_csv(out / "metrics.csv", keep_default_na=False, na_values=["nan"]),
        summary=json.loads((out / "summary.json").read_text()),
        text=(out / "table.txt").read_text(),
        files=sorted(path.name for path in out.iterdir()),
    )


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Three scans with different axes and spacing."""
    folder = tmp_path_factory.mktemp("scans")
    return [write_scan(folder, f"sub-0{n}_T1w", grid) for n, grid in enumerate(GRIDS, start=1)]


@pytest.fixture(scope="module")
def evaluated(scans, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All systems over two scans, the third to fit on."""
    folder, codes = tmp_path_factory.mktemp("evaluated"), [Trilinear(), DCT(), PatchPCA()]
    return evaluate(scans[:2], folder, FakeNetwork(0.5), baselines=codes, training=scans[2:])


def test_every_volume_and_system_has_a_row(evaluated):
    """Model first, then identity and the codes, per volume, with the record's columns and the protocol's."""
    assert evaluated.files == ["metrics.csv", "paired.csv", "report.html", "spectrum.csv", "summary.json", "table.txt"]
    assert evaluated.table["system"].tolist() == ["model", "identity", "trilinear", "dct", "patch_pca"] * 2
    assert list(evaluated.table)[:6] == ["name", "subject", "session", "label", "split", "system"]
    assert set(evaluated.table) >= {"l1", "psnr", "psnr_brain", "ssim", "lpips", "kl"}
    assert evaluated.table["name"].tolist() == ["sub-01_T1w"] * 5 + ["sub-02_T1w"] * 5
    assert set(evaluated.table["label"]) == {"control"} and set(evaluated.table["split"]) == {"val"}


def test_figures_of_the_model(evaluated, scans):
    """A network that halves: L1 and KL by hand; LPIPS is called with both clamped to [0, 1]."""
    for record, (_, row) in zip(scans[:2], evaluated.table.query("system == 'model'").iterrows(), strict=True):
        raw = preprocessing()(record)["image"].as_tensor()
        x, y = raw.clamp(0, 1), (0.5 * raw).clamp(0, 1)
        assert row["l1"] == pytest.approx((x - y).abs().mean().item(), rel=1e-4)
        assert row["lpips"] == pytest.approx((x - y).abs().max().item(), rel=1e-4)
        mu = F.avg_pool3d(raw[None], 4)
        kl = 0.5 * (mu.square().mean().item() + 0.25 - 1 - np.log(0.25))
        assert float(row["kl"]) == pytest.approx(kl, rel=1e-4)


def test_identity_is_close(evaluated):
    """There and back costs what two trilinear resamplings of a smooth head cost, and no KL is claimed for it."""
    rows = evaluated.table.query("system == 'identity'")
    assert (rows["l1"] < 0.01).all() and (rows["psnr_brain"] > 30).all()
    assert rows["l1"].iloc[1] > 0  # the second scan's spacing is not model space's
    assert (rows["kl"] == "").all()
    assert rows["l1"].iloc[0] < evaluated.table.query("system == 'trilinear'")["l1"].iloc[0]


def test_identity_of_an_aligned_scan_is_exact(tmp_path):
    """A scan that lies on model space's grid and inside of it comes back as it was, to fp32's rounding."""
    shape = (44, 46, 44)
    image = nib.Nifti1Image(head(shape, (4.0,) * 3), np.diag([4.0, 4.0, 4.0, 1.0]))
    nib.save(image, tmp_path / "sub-01_T1w.nii.gz")
    record = {**write_scan(tmp_path, "other"), "image": str(tmp_path / "sub-01_T1w.nii.gz"), "name": "sub-01_T1w"}
    result = evaluate([record], tmp_path, FakeNetwork())
    assert result.table.query("system == 'identity'")["l1"].item() < 1e-6


def test_summary(evaluated):
    """Split, number, hash and command, and per system mean and worst volume, as JSON without nan."""
    summary = evaluated.summary
    assert (summary["split"], summary["n"]) == ("val", 2)
    assert summary["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert list(summary["systems"]) == ["model", "identity", "trilinear", "dct", "patch_pca"]
    rows = evaluated.table.query("system == 'model'")
    model = summary["systems"]["model"]
    assert model["l1"]["mean"] == pytest.approx(rows["l1"].mean(), rel=1e-4)
    assert model["l1"]["worst_name"] == rows.loc[rows["l1"].idxmax(), "name"]
    assert "kl" in model and "active_units" in model
    assert all("kl" not in system and "active_units" not in system
               for name, system in summary["systems"].items() if name != "model")  # fmt: skip


def test_table(evaluated):
    """The table names what it is of."""
    assert "split: val   n: 2 volumes" in evaluated.text
    assert hashlib.sha256(b"weights").hexdigest() in evaluated.text
    for system in ("model", "identity", "trilinear", "dct", "patch_pca"):
        assert any(line.startswith(system) for line in evaluated.text.splitlines())


@pytest.mark.parametrize("training", [None, []])
def test_without_a_training_split(scans, tmp_path, capsys, training):
    """What has to be fitted is left out, and said; the other codes stay."""
    result = evaluate(scans[:1], tmp_path, FakeNetwork(), baselines=[DCT(), PatchPCA()], training=training)
    assert result.table["system"].tolist() == ["model", "identity", "dct"]
    assert "patch_pca cannot be fitted and is left out" in capsys.readouterr().out


def test_second_run_starts_anew(scans, tmp_path):
    """An evaluator that is run once a federated round reports each round alone."""
    result = evaluate(scans[:2], tmp_path, FakeNetwork(0.5), runs=2)
    assert result.table["system"].tolist() == ["model", "identity"] * 2
    assert result.summary["n"] == result.summary["systems"]["model"]["active_units"]["n"] == 2


@pytest.mark.parametrize("form", ["{}", "--dataset_dir={}"])
def test_command_names_no_folder(scans, tmp_path, monkeypatch, form):
    """The table is made to be shown: of a path only its last part is in it."""
    folder = tmp_path / "private" / "cohort"
    monkeypatch.setattr(sys, "argv", ["python", "run", "--config_file", "configs/evaluate.json", form.format(folder)])
    result = evaluate(scans[:1], tmp_path, FakeNetwork())
    assert result.summary["command"].endswith("cohort") and "configs/evaluate.json" in result.summary["command"]
    assert "private" not in result.text and "private" not in result.summary["command"]


def test_broken_run_leaves_the_old_result(scans, tmp_path):
    """An evaluation that breaks off before its end keeps the files of the one before, whole."""
    evaluate(scans[:1], tmp_path, FakeNetwork())
    before = contents(tmp_path / "out")

    def fail(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        evaluate(scans[:1], tmp_path, FakeNetwork(), lpips=fail)
    assert contents(tmp_path / "out") == before
