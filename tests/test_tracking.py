"""MLflow without a server: what `--tracking` writes of a training and of an evaluation."""

from __future__ import annotations

import json

import pytest
from conftest import TINY_JOB

mlflow = pytest.importorskip("mlflow")
TRACKING = ["mlflow", "configs/tracking.json"]
CURVES = {"train_loss", "val_psnr_brain", "val_psnr", "val_l1", "val_kl"}


@pytest.fixture(scope="module", params=TRACKING)
def training(request, run_bundle, bids, tmp_path_factory):
    """A run of two epochs, and what kept track of it."""
    output = tmp_path_factory.mktemp("tracked") / "train"
    job = ["--dataset_dir", str(bids), "--epochs", "2", "--val_interval", "1", "--output_dir", str(output)]
    job += ["--perceptual_weight", "0"]
    run_bundle("--config_file", "configs/train.json", *job, *TINY_JOB, "--tracking", request.param)
    return request.param, output, client(output)


def client(output):
    return mlflow.MlflowClient(f"sqlite:///{output / 'mlruns.db'}")


def only_run(found):
    """The one run of the one experiment that has any."""
    (run,) = [run for experiment in found.search_experiments() for run in found.search_runs(experiment.experiment_id)]
    return run


def test_training_leaves_its_curves(training):
    """The loss a step, the validation of the start and an epoch, and the run is closed."""
    _, _, found = training
    run = only_run(found)
    assert set(run.data.metrics) >= CURVES and run.info.status == "FINISHED"
    assert len(found.get_metric_history(run.info.run_id, "val_psnr_brain")) == 3


def test_executed_config_is_kept(training):
    """With what the command line has changed."""
    _, output, _ = training
    (path,) = output.glob("config_*.json")
    assert json.loads(path.read_text())["epochs"] == 2


def test_own_settings_keep_parameters_and_files(training):
    """configs/tracking.json adds the hyperparameters and the table of the run."""
    settings, _, found = training
    run = only_run(found)
    own = settings == "configs/tracking.json"
    assert ("learning_rate" in run.data.params) == own
    assert [a.path for a in found.list_artifacts(run.info.run_id)] == (["metrics.csv"] if own else [])


def test_evaluation_keeps_its_report(run_bundle, weights, bids, tmp_path):
    output = tmp_path / "out"
    job = ["--dataset_dir", str(bids), "--split", "val", "--weights", str(weights), "--baselines", "[]"]
    tracking = ["--output_dir", str(output), "--tracking", "configs/tracking.json", "--experiment_name", "study"]
    run_bundle("--config_file", "configs/evaluate.json", *job, *TINY_JOB, *tracking)
    found = client(output)
    assert "study" in [experiment.name for experiment in found.search_experiments()]
    kept = {artifact.path for artifact in found.list_artifacts(only_run(found).info.run_id)}
    assert kept == {"report.html", "summary.json", "metrics.csv"}
