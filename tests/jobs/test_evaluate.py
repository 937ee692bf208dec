"""What an evaluation writes: every volume and system, every figure right, nothing half, no folder named."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import contents
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from phantoms import ScalingNetwork, preprocessing, write_head

from scripts.jobs.evaluate import EvaluationWriter
from scripts.metrics import DCT, Baseline, PatchPCA, Trilinear
from scripts.networks import AutocastInferer, posterior_iteration, prepare_batch

CPU = torch.device("cpu")
SYSTEMS = ["model", "identity", "trilinear", "dct", "patch_pca"]
FILES = ["metrics.csv", "paired.csv", "report.html", "spectrum.csv", "summary.json", "table.txt"]
SHA256 = hashlib.sha256(b"weights").hexdigest()


def evaluate(
    records: Sequence[dict],
    folder: Path,
    *,
    baselines: Sequence[Baseline] = (),
    training: Sequence[dict] = (),
    lpips: Callable = lambda image, target: (image - target).abs().amax(),
    runs: int = 1,
) -> SimpleNamespace:
    """Run evaluate.json's evaluator with a network that halves, and a cheap stand-in for LPIPS."""
    steps, weights, out = preprocessing(), folder / "weights.pt", folder / "out"
    weights.write_bytes(b"weights")
    writer = EvaluationWriter(str(out), steps, lpips, baselines, Dataset(training, steps), "val", str(weights))
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records, steps), batch_size=1), ScalingNetwork(0.5), prepare_batch=prepare_batch,
        iteration_update=posterior_iteration, inferer=AutocastInferer(False, CPU), val_handlers=[writer],
    )  # fmt: skip
    for _ in range(runs):
        evaluator.run()
    assert sorted(path.name for path in out.iterdir()) == FILES
    table = pd.read_csv(out / "metrics.csv", keep_default_na=False, na_values=["nan"])
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    return SimpleNamespace(table=table, summary=summary, text=(out / "table.txt").read_text())


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Three scans with different axes and spacing, the first on model space's grid."""
    folder = tmp_path_factory.mktemp("scans")
    grids = ("aligned", "axes_swapped", "smaller_than_head")
    return [write_head(folder, grid, f"sub-0{n}_T1w") for n, grid in enumerate(grids, start=1)]


@pytest.fixture(scope="module")
def measured(scans: list[dict], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """All systems over two scans, the third to fit on."""
    codes = [Trilinear(), DCT(), PatchPCA()]
    return evaluate(scans[:2], tmp_path_factory.mktemp("measured"), baselines=codes, training=scans[2:])


def test_figures_of_every_volume_and_system(measured: SimpleNamespace, scans: list[dict]) -> None:
    """A network that halves: L1 and KL by hand; LPIPS is called with both clamped to [0, 1]; the rest has no KL. The
    identity costs nothing where the scan lies on model space's grid, little elsewhere, and less than any code."""
    table = measured.table
    assert table["system"].tolist() == SYSTEMS * 2
    assert table["name"].tolist() == ["sub-01_T1w"] * 5 + ["sub-02_T1w"] * 5
    for record, (_, row) in zip(scans[:2], table.query("system == 'model'").iterrows(), strict=True):
        raw = preprocessing()(record)["image"].as_tensor()
        error = (raw.clamp(0, 1) - (0.5 * raw).clamp(0, 1)).abs()
        assert row["l1"] == pytest.approx(error.mean().item(), rel=1e-4)
        assert row["lpips"] == pytest.approx(error.max().item(), rel=1e-4)
        kl = 0.5 * (F.avg_pool3d(raw[None], 4).square().mean().item() + 0.25 - 1 - np.log(0.25))
        assert float(row["kl"]) == pytest.approx(kl, rel=1e-4)
    assert (table.query("system != 'model'")["kl"] == "").all()
    aligned, resampled = table.query("system == 'identity'")["l1"]
    assert aligned < 1e-6 < resampled < 0.01
    assert resampled < table.query("system == 'trilinear'")["l1"].iloc[1]
    summary, systems = measured.summary, measured.summary["systems"]
    assert (summary["split"], summary["n"], summary["weights_sha256"]) == ("val", 2, SHA256)
    for system, rows in measured.table.groupby("system"):
        assert systems[system]["l1"]["mean"] == pytest.approx(rows["l1"].mean(), rel=1e-4)
        assert systems[system]["l1"]["worst_name"] == rows.loc[rows["l1"].idxmax(), "name"]
        assert ("kl" in systems[system]) == ("active_units" in systems[system]) == (system == "model")
    assert "split: val   n: 2 volumes" in measured.text and SHA256 in measured.text


def test_a_second_run_starts_anew_and_names_no_folder(
    scans: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round of a federation is reported alone; of a path in the command only the last part is shown; a run that
    breaks off before its end keeps the files of the one before, whole."""
    folder = f"--dataset_dir={tmp_path}/private/cohort"
    monkeypatch.setattr(sys, "argv", ["python", "run", "--config_file", "configs/evaluate.json", folder])
    result = evaluate(scans[:1], tmp_path, runs=2)
    assert result.table["system"].tolist() == ["model", "identity"]
    assert result.summary["n"] == result.summary["systems"]["model"]["active_units"]["n"] == 1
    assert result.summary["command"].endswith("cohort") and "configs/evaluate.json" in result.summary["command"]
    assert "private" not in result.text and "private" not in result.summary["command"]
    before = contents(tmp_path / "out")
    with pytest.raises(ZeroDivisionError):
        evaluate(scans[:1], tmp_path, lpips=lambda image, target: 1 / 0)
    assert contents(tmp_path / "out") == before
