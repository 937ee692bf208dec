"""MLflow without a server: what `--tracking` writes of a training and of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Job

mlflow = pytest.importorskip("mlflow")
TRACKING = ["--tracking", "configs/tracking.json"]
CURVES = {"train_loss", "val_psnr_brain", "val_psnr", "val_l1", "val_kl"}


def tracked(output: Path) -> tuple[Any, Any, str]:
    """The database, the one run in it, and the name of its experiment."""
    found = mlflow.MlflowClient(f"sqlite:///{output / 'mlruns.db'}")
    runs = [(run, e.name) for e in found.search_experiments() for run in found.search_runs(e.experiment_id)]
    ((run, name),) = runs
    return found, run, name


def test_training_is_tracked(start_job: Callable[..., Job], bids: Path) -> None:
    """Its curves, hyperparameters, table and executed config; the run is closed."""
    job = ["--dataset_dir", str(bids), "--epochs", "2", "--val_interval", "1", "--perceptual_weight", "0"]
    output = start_job("train", *job, *TRACKING).folder
    found, run, _ = tracked(output)
    assert set(run.data.metrics) >= CURVES and run.info.status == "FINISHED"
    # the start, and two epochs
    assert len(found.get_metric_history(run.info.run_id, "val_psnr_brain")) == 3
    assert run.data.params["learning_rate"] == "0.006"
    assert [artifact.path for artifact in found.list_artifacts(run.info.run_id)] == ["metrics.csv"]
    (path,) = output.glob("config_*.json")
    assert json.loads(path.read_text())["epochs"] == 2


def test_evaluation_is_tracked(start_job: Callable[..., Job], bids: Path, weights: Path) -> None:
    """Its report and tables, in the experiment that the command line names."""
    job = ["--dataset_dir", str(bids), "--weights", str(weights), "--baselines", "[]", "--experiment_name", "study"]
    found, run, name = tracked(start_job("evaluate", *job, *TRACKING).folder)
    kept = {artifact.path for artifact in found.list_artifacts(run.info.run_id)}
    assert name == "study" and kept == {"report.html", "summary.json", "metrics.csv"}
