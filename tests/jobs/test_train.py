"""The log of a training: a row an epoch in metrics.csv, the same in TensorBoard, and the report at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import Job
from ignite.engine import Engine, Events

from scripts.jobs.train import TrainingLog
from scripts.report import FILE_NAME
from scripts.run import file_sha256

STEPS = 2  # an epoch


def train(folder: Path, epochs: int, *, done: int = 0, interval: int = 1, start: bool = False) -> SimpleNamespace:
    """Log a training whose step n has loss n, l1 n^2 and a gradient of norm -n, validated every `interval` epochs with
    the epoch's number as score, at a learning rate that halves at each epoch's end."""
    loss, clip, scalars = SimpleNamespace(parts={}), SimpleNamespace(norm=0.0), []
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar), flush=lambda: None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={"val_score": 0.0} if start else {}))

    def step(engine: Engine, batch: int) -> None:
        n = engine.state.iteration
        loss.parts, clip.norm = {"loss": float(n), "l1": float(n**2)}, -float(n)

    def validate(engine: Engine) -> None:
        optimizer.step(), schedule.step()
        epoch = engine.state.epoch
        if interval and epoch % interval == 0:
            evaluator.state.epoch, evaluator.state.metrics = epoch, {"val_score": float(epoch)}

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    log = TrainingLog(loss, optimizer, clip, evaluator if interval else None, str(folder / "metrics.csv"), writer)
    log.attach(engine)
    engine.state.max_epochs, engine.state.epoch_length, engine.state.rank = epochs, STEPS, 0
    engine.state.epoch, engine.state.iteration = done, done * STEPS
    engine.run([0] * STEPS, max_epochs=epochs, epoch_length=STEPS)
    return SimpleNamespace(scalars=scalars, path=folder / "metrics.csv")


def test_log_has_a_row_an_epoch(tmp_path: Path):
    """Learning rates as used in the epoch, means over its steps, the metrics of its validation."""
    run = train(tmp_path, 3)
    table = pd.read_csv(run.path)
    assert table["learning_rate"].tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert table["loss"].tolist() == [1.5, 3.5, 5.5] and table["gradient_norm"].tolist() == [-1.5, -3.5, -5.5]
    assert table["l1"].tolist() == [2.5, 12.5, 30.5]
    assert table["epoch"].tolist() == table["val_score"].tolist() == [1, 2, 3]
    assert ("step/loss", 4.0, 4) in run.scalars and ("epoch/loss", 3.5, 2) in run.scalars


def test_rows_without_steps_or_validation(tmp_path: Path):
    """The validated start is epoch 0, without what only steps have; a validation every second epoch leaves empty cells
    between, no repeated values; none leaves no column."""
    table = pd.read_csv(train(tmp_path, 4, interval=2, start=True).path)
    assert table["epoch"].tolist() == [0, 1, 2, 3, 4]
    assert table["loss"].isna().tolist() == [True, False, False, False, False]
    assert table["val_score"].isna().tolist() == [False, True, False, True, False]
    assert "val_score" not in pd.read_csv(train(tmp_path, 1, interval=0).path)


def test_resumed_run_drops_the_rows_it_repeats(tmp_path: Path):
    """Killed in epoch 4 after a checkpoint of epoch 2: rows 1 and 2 stay, 3 is written anew; a new run begins anew."""
    path = train(tmp_path, 3).path
    pd.read_csv(path).assign(loss=99.0).to_csv(path, index=False)
    train(tmp_path, 4, done=2)
    table = pd.read_csv(path)
    assert table["epoch"].tolist() == [1, 2, 3, 4] and table["loss"].tolist() == [99, 99, 5.5, 7.5]
    train(tmp_path, 1)
    assert pd.read_csv(path)["loss"].tolist() == [1.5]


def test_a_training_ends_with_its_report(trained: Job):
    """It names the weights by the hash of model.pt."""
    page = (trained.folder / FILE_NAME).read_text()
    assert file_sha256(trained.folder / "model.pt") in page and "val_psnr_brain" in page
