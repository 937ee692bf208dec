"""MLflow without a server: what `--tracking` writes of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Job

mlflow = pytest.importorskip("mlflow")
TRACKING = ["--tracking", "configs/tracking.json"]
CURVES = {"train_loss", "val_psnr_brain", "val_psnr", "val_l1", "val_kl"}


def test_training_is_tracked(start_job: Callable[..., Job], bids: Path) -> None:
    """Its curves, hyperparameters, table and executed config; the run is closed."""
    job = ["--dataset_dir", str(bids), "--epochs", "2", "--val_interval", "1", "--perceptual_weight", "0"]
    output = start_job("train", *job, *TRACKING).folder
    found = mlflow.MlflowClient(f"sqlite:///{output / 'mlruns.db'}")
    (run,) = (run for e in found.search_experiments() for run in found.search_runs(e.experiment_id))
    assert set(run.data.metrics) >= CURVES and run.info.status == "FINISHED"
    assert len(found.get_metric_history(run.info.run_id, "val_psnr_brain")) == 3  # the start, and two epochs
    assert run.data.params["learning_rate"] == "0.006"
    assert [artifact.path for artifact in found.list_artifacts(run.info.run_id)] == ["metrics.csv"]
    (path,) = output.glob("config_*.json")
    assert json.loads(path.read_text())["epochs"] == 2
