"""What a training writes beside its weights: the curve as CSV and in TensorBoard, a line an epoch, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from ignite.engine import Engine, Events
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from scripts.report import FILE_NAME, Report, curve_charts, origin
from scripts.run import command_line, file_sha256, is_first, mean_over_ranks, replacing
from scripts.training import GradientClip, VAELoss

__all__ = ["TrainingLog", "finish", "training_report"]


class TrainingLog:
    """One line an epoch: printed, in `metrics.csv`, and as TensorBoard scalars; epoch 0 is the validated start.

    The columns are the epoch, the means over its steps of the learning rate, the loss, its unweighted terms and the
    gradient's norm, and the metrics of a validation where one ran. A resumed run drops the lines of the epochs
    that it repeats. In several processes the terms are means over them, and the first writes.

    Args:
        loss: the loss, whose `parts` hold the terms of the last step.
        optimizer: the optimizer, for the learning rate of its first group.
        clip: the gradient clipping, for the norm.
        evaluator: the validation, or None.
        path: where to write `metrics.csv`.
        writer: TensorBoard's writer; used in the first process only.
    """

    def __init__(
        self,
        loss: VAELoss,
        optimizer: Optimizer,
        clip: GradientClip,
        evaluator: Engine | None,
        path: str,
        writer: SummaryWriter,
    ) -> None:
        self.loss, self.optimizer, self.clip, self.evaluator = loss, optimizer, clip, evaluator
        self.path, self.writer = Path(path), writer
        self.steps: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after its validation."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration > 0 or engine.state.rank != 0:
            return
        self.path.unlink(missing_ok=True)
        if self.evaluator is not None and self.evaluator.state.metrics:
            self._epoch(engine)

    def _clear(self, engine: Engine) -> None:
        self.steps = []

    def _step(self, engine: Engine) -> None:
        learning_rate = self.optimizer.param_groups[0]["lr"]
        parts = mean_over_ranks({"learning_rate": learning_rate, **self.loss.parts, "gradient_norm": self.clip.norm})
        if engine.state.rank != 0:
            return
        self.steps.append(parts)
        for name, value in parts.items():
            self.writer.add_scalar(f"step/{name}", value, engine.state.iteration)

    def _epoch(self, engine: Engine) -> None:
        if engine.state.rank != 0:
            return
        epoch = engine.state.epoch
        row: dict[str, float] = {"epoch": epoch}
        row |= {str(name): value for name, value in pd.DataFrame(self.steps).mean().items()}
        if self.evaluator is not None and self.evaluator.state.epoch == epoch:
            row |= {name: float(value) for name, value in self.evaluator.state.metrics.items()}
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(f"epoch/{name}", value, epoch)
        self.writer.flush()
        self._append(row)
        print("  ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)

    def _append(self, row: Mapping[str, float]) -> None:
        rows = pd.DataFrame([row])
        if self.path.exists():
            earlier = pd.read_csv(self.path)
            rows = pd.concat([earlier[earlier["epoch"] < row["epoch"]], rows])
        rows = rows[sorted(rows.columns, key=lambda name: name.startswith("val_"))]  # epoch 0 has no others
        with replacing(self.path) as temporary:
            rows.to_csv(temporary, index=False, float_format="%.8g")


def training_report(output_dir: str, weights: str) -> None:
    """Write the page of a training from its `metrics.csv`; nothing where there is none yet.

    Args:
        output_dir: the training's folder.
        weights: the model file that the training has written; "" or missing: no hash is given.
    """
    path = Path(output_dir) / "metrics.csv"
    if not path.is_file():
        return
    frame = pd.read_csv(path)
    facts = {"epochs": str(frame["epoch"].max()), **origin(), "command": command_line()}
    if Path(weights).is_file():
        facts["weights"] = f"sha256 {file_sha256(weights)}"
    report = Report("Training", facts)
    curves = [column for column in frame.columns if column != "epoch"]
    validation = [column for column in curves if column.startswith("val_")]
    others = [column for column in curves if column not in validation]
    for title, columns in (("Validation", validation), ("Training", others)):
        if columns:
            report.add_charts(title, curve_charts(frame, "epoch", columns), "docs/results.md says how to read them.")
    measured = frame.astype(object).where(frame.notna(), None)  # the start has no loss, most epochs no validation
    report.add_table("All epochs", measured, better={"val_l1": False})
    report.write(Path(output_dir) / FILE_NAME)


def finish(writer: SummaryWriter | None, output_dir: str, ckpt_dir: str) -> None:
    """End a training: TensorBoard's file is closed, and the first process writes the report.

    Args:
        writer: TensorBoard's; None in the other processes.
        output_dir: the training's folder.
        ckpt_dir: the folder of `model.pt`.
    """
    if writer is not None:
        writer.close()
    if is_first():
        training_report(output_dir, f"{ckpt_dir}/model.pt")
