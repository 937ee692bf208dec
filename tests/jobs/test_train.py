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


class FakeWriter:
    """Keeps what TensorBoard's writer would be given."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, {})[step] = value

    def flush(self) -> None:
        """Nothing is buffered."""


def train(
    folder: Path, epochs: int, *, done: int = 0, interval: int = 1, start: bool = False, rank: int = 0
) -> SimpleNamespace:
    """Log a training whose step n has loss n, l1 n^2 and a gradient of norm -n, validated every `interval` epochs with
    the epoch's number as score, at a learning rate that halves at each epoch's end."""
    loss, clip, writer = SimpleNamespace(parts={}), SimpleNamespace(norm=0.0), FakeWriter()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    evaluator = SimpleNamespace(state=SimpleNamespace(epoch=0, metrics={"val_score": 0.0} if start else {}))

    def step(engine: Engine, batch: int) -> None:
        n = engine.state.iteration
        loss.parts, clip.norm = {"loss": float(n), "l1": float(n**2)}, -float(n)

    def validate(engine: Engine) -> None:
        optimizer.step(), schedule.step()
        if interval and engine.state.epoch % interval == 0:
            evaluator.state.epoch, evaluator.state.metrics = (
                engine.state.epoch,
                {"val_score": float(engine.state.epoch)},
            )

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_COMPLETED, validate)
    log = TrainingLog(loss, optimizer, clip, evaluator if interval else None, str(folder / "metrics.csv"), writer)
    log.attach(engine)
    engine.state.max_epochs, engine.state.epoch_length, engine.state.rank = epochs, STEPS, rank
    engine.state.epoch, engine.state.iteration = done, done * STEPS
    engine.run([0] * STEPS, max_epochs=epochs, epoch_length=STEPS)
    return SimpleNamespace(scalars=writer.scalars, path=folder / "metrics.csv")


def test_log_has_a_row_an_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Columns, learning rates as used in the epoch, means over its steps, the metrics of its validation."""
    table = pd.read_csv(train(tmp_path, 3).path)
    assert list(table) == ["epoch", "learning_rate", "loss", "l1", "gradient_norm", "val_score"]
    assert table["learning_rate"].tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert table["loss"].tolist() == [1.5, 3.5, 5.5] and table["gradient_norm"].tolist() == [-1.5, -3.5, -5.5]
    assert table["l1"].tolist() == [2.5, 12.5, 30.5]
    assert table["epoch"].tolist() == table["val_score"].tolist() == [1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", str(epoch)] for epoch in (1, 2, 3)]
    assert "gradient_norm -3.5" in lines[1]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_log_goes_to_tensorboard(tmp_path: Path):
    """Every step and every epoch."""
    scalars = train(tmp_path, 2).scalars
    assert scalars["step/loss"] == {step: step for step in range(1, 2 * STEPS + 1)}
    assert scalars["epoch/loss"] == {1: 1.5, 2: 3.5} and scalars["epoch/val_score"] == {1: 1.0, 2: 2.0}
    assert scalars["epoch/learning_rate"] == {1: 0.1, 2: 0.05}
    assert "epoch/epoch" not in scalars


def test_validated_start_is_epoch_0(tmp_path: Path):
    """Its row comes first, without what only steps have; the validation's columns stay the last."""
    table = pd.read_csv(train(tmp_path, 1, start=True).path)
    assert list(table)[-1] == "val_score"
    assert table["epoch"].tolist() == table["val_score"].tolist() == [0, 1]
    assert table["loss"].isna().tolist() == [True, False]


def test_epochs_without_validation_have_no_metric(tmp_path: Path):
    """A validation every second epoch leaves empty cells between, no repeated values; none leaves no column."""
    table = pd.read_csv(train(tmp_path, 4, interval=2).path)
    assert table["val_score"].isna().tolist() == [True, False, True, False]
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


def test_other_processes_write_nothing(tmp_path: Path):
    """Only rank 0 writes curves and table."""
    run = train(tmp_path, 2, start=True, rank=1)
    assert not run.scalars and not run.path.exists()


def test_a_training_ends_with_its_report(trained: Job):
    """It names the weights by the hash of model.pt."""
    page = (trained.folder / FILE_NAME).read_text()
    assert file_sha256(trained.folder / "model.pt") in page and "val_psnr_brain" in page
