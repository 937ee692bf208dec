"""Ignite's progress bars over the steps of a training and over the scans of any other job."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine
from ignite.handlers.tqdm_logger import ProgressBar

from scripts.run.processes import is_first

__all__ = ["LossBar", "ScanBar"]


class LossBar:
    """Ignite's progress bar of an epoch, with the loss and the time left; in several processes that of the first."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if is_first():
            ProgressBar(persist=False).attach(engine, output_transform=_loss_of)


class ScanBar:
    """Ignite's progress bar over the scans of an evaluation; in several processes over the share of the first."""

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        if is_first():
            ProgressBar(persist=False, desc="scans").attach(engine)


def _loss_of(output: Any) -> dict[str, float]:
    return {"loss": float(output[0]["loss"])}  # the same in every item of a decollated batch
