"""What an evaluation writes: every volume and system, every figure right, nothing half, no folder named."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import contents
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from phantoms import ScalingNetwork, preprocessing, write_head
from torch import nn

from scripts.jobs.evaluate import EvaluationWriter
from scripts.metrics import DCT, Baseline, PatchPCA, Trilinear
from scripts.networks import AutocastInferer, posterior_iteration, prepare_batch

CPU = torch.device("cpu")
SYSTEMS = ["model", "identity", "trilinear", "dct", "patch_pca"]
FILES = ["metrics.csv", "paired.csv", "report.html", "spectrum.csv", "summary.json", "table.txt"]
SHA256 = hashlib.sha256(b"weights").hexdigest()


class Evaluation(NamedTuple):
    """What one wrote."""

    table: pd.DataFrame
    paired: pd.DataFrame
    summary: dict[str, Any]
    text: str
    files: list[str]


def largest_difference(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A cheap stand-in for LPIPS."""
    return (image - target).abs().amax()


def evaluate(
    records: Sequence[dict],
    folder: Path,
    network: nn.Module,
    *,
    baselines: Sequence[Baseline] = (),
    training: Sequence[dict] | None = None,
    lpips: Callable = largest_difference,
    runs: int = 1,
) -> Evaluation:
    """Run evaluate.json's evaluator."""
    steps, weights = preprocessing(), folder / "weights.pt"
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
    return Evaluation(
        pd.read_csv(out / "metrics.csv", keep_default_na=False, na_values=["nan"]),
        pd.read_csv(out / "paired.csv"),
        json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail),
        (out / "table.txt").read_text(),
        sorted(path.name for path in out.iterdir()),
    )


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Three scans with different axes and spacing, the first on model space's grid."""
    folder = tmp_path_factory.mktemp("scans")
    grids = ("aligned", "axes_swapped", "smaller_than_head")
    return [write_head(folder, grid, f"sub-0{n}_T1w") for n, grid in enumerate(grids, start=1)]


@pytest.fixture(scope="module")
def measured(scans: list[dict], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """All systems over two scans, the third to fit on."""
    codes = [Trilinear(), DCT(), PatchPCA()]
    folder = tmp_path_factory.mktemp("measured")
    return evaluate(scans[:2], folder, ScalingNetwork(0.5), baselines=codes, training=scans[2:])


def test_every_volume_and_system_has_a_row(measured: Evaluation) -> None:
    """Model first, then identity and the codes, per volume, with the record's columns and the protocol's."""
    table = measured.table
    assert measured.files == FILES
    assert table["system"].tolist() == SYSTEMS * 2
    assert list(table)[:6] == ["name", "subject", "session", "label", "split", "system"]
    assert set(table) >= {"l1", "psnr", "psnr_brain", "ssim", "lpips", "kl"}
    assert table["name"].tolist() == ["sub-01_T1w"] * 5 + ["sub-02_T1w"] * 5
    assert set(table["label"]) == {"control"} and set(table["split"]) == {"val"}


def test_figures_of_the_model(measured: Evaluation, scans: list[dict]) -> None:
    """A network that halves: L1 and KL by hand; LPIPS is called with both clamped to [0, 1]; the rest has no KL."""
    for record, (_, row) in zip(scans[:2], measured.table.query("system == 'model'").iterrows(), strict=True):
        raw = preprocessing()(record)["image"].as_tensor()
        error = (raw.clamp(0, 1) - (0.5 * raw).clamp(0, 1)).abs()
        assert row["l1"] == pytest.approx(error.mean().item(), rel=1e-4)
        assert row["lpips"] == pytest.approx(error.max().item(), rel=1e-4)
        kl = 0.5 * (F.avg_pool3d(raw[None], 4).square().mean().item() + 0.25 - 1 - np.log(0.25))
        assert float(row["kl"]) == pytest.approx(kl, rel=1e-4)
    assert (measured.table.query("system != 'model'")["kl"] == "").all()


def test_identity_costs_what_resampling_costs(measured: Evaluation) -> None:
    """Nothing where the scan lies on model space's grid (float32), little elsewhere, and less than any code."""
    aligned, resampled = measured.table.query("system == 'identity'")["l1"]
    assert aligned < 1e-6 < resampled < 0.01
    assert resampled < measured.table.query("system == 'trilinear'")["l1"].iloc[1]


def test_summary_and_table(measured: Evaluation) -> None:
    """Split, number and hash, and per system mean and worst volume, as JSON without nan; the table says the same."""
    summary, systems = measured.summary, measured.summary["systems"]
    assert (summary["split"], summary["n"], summary["weights_sha256"]) == ("val", 2, SHA256)
    assert list(systems) == SYSTEMS
    for system, rows in measured.table.groupby("system"):
        assert systems[system]["l1"]["mean"] == pytest.approx(rows["l1"].mean(), rel=1e-4)
        assert systems[system]["l1"]["worst_name"] == rows.loc[rows["l1"].idxmax(), "name"]
        assert ("kl" in systems[system]) == ("active_units" in systems[system]) == (system == "model")
        assert any(line.split()[:1] == [system] for line in measured.text.splitlines())
    assert "split: val   n: 2 volumes" in measured.text and SHA256 in measured.text


def test_each_code_is_compared_with_the_model(measured: Evaluation) -> None:
    """`paired.csv` has the mean difference code minus model of one volume a subject, and no row of identity."""
    rows = measured.paired.query("figure == 'l1'").set_index("system")
    mean = measured.table.groupby("system")["l1"].mean()
    assert list(rows.index) == SYSTEMS[2:]
    for system, row in rows.iterrows():
        assert row["n"] == 2 and row["difference"] == pytest.approx(mean[system] - mean["model"], rel=1e-3)


def test_without_a_training_split(scans: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has to be fitted is left out, and said; the other codes stay."""
    result = evaluate(scans[:1], tmp_path, ScalingNetwork(), baselines=[DCT(), PatchPCA()], training=[])
    assert result.table["system"].tolist() == ["model", "identity", "dct"]
    assert "patch_pca cannot be fitted and is left out" in capsys.readouterr().out


def test_a_second_run_starts_anew_and_names_no_folder(
    scans: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round of a federation is reported alone; of a path in the command only the last part is shown."""
    folder = f"--dataset_dir={tmp_path}/private/cohort"
    monkeypatch.setattr(sys, "argv", ["python", "run", "--config_file", "configs/evaluate.json", folder])
    result = evaluate(scans[:1], tmp_path, ScalingNetwork(0.5), runs=2)
    assert result.table["system"].tolist() == ["model", "identity"]
    assert result.summary["n"] == result.summary["systems"]["model"]["active_units"]["n"] == 1
    assert result.summary["command"].endswith("cohort") and "configs/evaluate.json" in result.summary["command"]
    assert "private" not in result.text and "private" not in result.summary["command"]


def test_a_broken_run_leaves_the_old_result(scans: list[dict], tmp_path: Path) -> None:
    """An evaluation that breaks off before its end keeps the files of the one before, whole."""
    evaluate(scans[:1], tmp_path, ScalingNetwork())
    before = contents(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        evaluate(scans[:1], tmp_path, ScalingNetwork(), lpips=lambda image, target: 1 / 0)
    assert contents(tmp_path / "out") == before
