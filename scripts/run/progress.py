"""Ignite's progress bars over the steps of a training and over the scans of any other job."""

from __future__ import annotations

from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine
from ignite.handlers.tqdm_logger import ProgressBar

__all__ = ["LossBar", "ScanBar"]


class LossBar:
    """Ignite's progress bar of an epoch, with the loss and the time left; in several processes that of the first."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            ProgressBar(persist=False).attach(engine, output_transform=_loss_of)


class ScanBar:
    """Ignite's progress bar over the scans of an evaluation; in several processes over the share of the first."""

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        if idist.get_rank() == 0:
            ProgressBar(persist=False, desc="scans").attach(engine)


def _loss_of(output: Any) -> dict[str, float]:
    return {"loss": float(output[0]["loss"])}  # the same in every item of a decollated batch
