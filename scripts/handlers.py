"""The Ignite handlers of training that MONAI has not.

`train.json` lists them in `train#handlers` and `validate#handlers`: an EMA that is right from the first step, a
validation of the start, a perceptual term that joins later, seeds that make a resumed epoch equal to an uninterrupted
one, gradient clipping, the progress bar, the curve as CSV and in TensorBoard, and one picture a validation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from ignite.handlers.tqdm_logger import ProgressBar
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from torch import nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from scripts.distributed import mean_over_ranks
from scripts.errors import InputError
from scripts.files import replacing
from scripts.losses import VAELoss
from scripts.pictures import figure_to_array, recon_panel

__all__ = [
    "EpochSeed",
    "GradientClip",
    "LossBar",
    "PerceptualStart",
    "PictureLog",
    "ScanBar",
    "StartValidation",
    "TrainingLog",
    "WarmEMA",
]


class WarmEMA(EMAHandler):
    """Ignite's EMA with a decay that grows with the step: min(decay, (1 + t) / (10 + t)).

    Short runs get a short memory instead of their own random start. The decay follows from the trainer's step, so
    there is no schedule to save. At the first step the average starts from the network as it then is.

    Args:
        network: the network to average.
        decay: the final decay, within (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"'ema_decay' is {decay}; give a number between 0 and 1, such as 0.999.")
        super().__init__(network, momentum=1 - decay)

    def attach(self, engine: Engine, *args: Any, **kwargs: Any) -> None:
        """Attach to a trainer; see `EMAHandler.attach`."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._warm)
        super().attach(engine, *args, **kwargs)

    def _start(self, engine: Engine) -> None:
        if engine.state.iteration == 0:
            self.ema_model.load_state_dict(self.model.state_dict())

    def _warm(self, engine: Engine) -> None:
        step = engine.state.iteration
        engine.state.ema_momentum = max(self.momentum, 9 / (10 + step))


class StartValidation:
    """Validate the weights that a run begins with, as epoch 0, so that it can be told whether training improved them.

    Args:
        validator: MONAI's evaluator.
    """

    def __init__(self, validator: Evaluator) -> None:
        self.validator = validator

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after its EMA."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Validate where no step has been made; a resumed run has its start behind it."""
        if engine.state.iteration > 0:
            return
        with self.validator.add_event_handler(Events.EPOCH_STARTED, _call_it_epoch_0):  # the engine counts from 1
            self.validator.run(1)


class EpochSeed:
    """Derive every random state of an epoch from the seed and the epoch's number.

    Torch, NumPy, Python, the dataset's random transforms and the batch sampler are set when an epoch starts, and the
    data loader is begun anew, whatever ran before. A resumed run therefore repeats an uninterrupted one exactly.

    Args:
        seed: the run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Seed the epoch that starts."""
        epoch, rank = engine.state.epoch, engine.state.rank
        seed = int(np.random.SeedSequence([self.seed, epoch, rank]).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        loader = engine.state.dataloader
        set_rnd(loader.dataset, seed)
        if hasattr(loader.batch_sampler, "set_epoch"):
            loader.batch_sampler.set_epoch(epoch)
        engine.set_data(loader)


class GradientClip:
    """Scale the gradient down to a largest norm before the optimizer's step, and note the norm it had.

    Args:
        network: the network that is trained.
        max_norm: largest L2 norm of the whole gradient; 0 only notes it.

    Attributes:
        norm: the norm of the last gradient, before clipping.
    """

    def __init__(self, network: nn.Module, max_norm: float) -> None:
        if max_norm < 0:
            raise InputError(f"'clip_norm' is {max_norm}; give 0 (no clipping) or a positive number.")
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.max_norm = max_norm
        self.norm = 0.0

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip; a gradient that is not finite ends the run."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm or float("inf"))
        self.norm = float(norm)
        if not np.isfinite(self.norm):
            raise InputError(
                f"the gradient became {self.norm} at step {engine.state.iteration}: lower learning_rate, or go on "
                "from the last checkpoint with --resume True."
            )


class PerceptualStart:
    """Leave the perceptual term out of the first epochs, which learn more from L1 and MSE in the same time.

    Args:
        loss: the loss; its weight of `lpips` is that of the later epochs.
        start: share of the epochs after which the term joins, 0 (from the first on) to 1 (never).
        epochs: of the whole run, also where it ends earlier and is resumed.
    """

    def __init__(self, loss: VAELoss, start: float, epochs: int) -> None:
        if not 0 <= start <= 1:
            raise InputError(f"'perceptual_start' is {start}; give a share of the epochs, 0 to 1.")
        self.loss, self.first = loss, start * epochs
        self.weight = loss.weights["lpips"]

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Set the weight of the epoch that starts."""
        self.loss.weights["lpips"] = self.weight if engine.state.epoch > self.first else 0.0


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


class PictureLog:
    """One picture an epoch in TensorBoard: original, reconstruction and difference of the first validation scan.

    Args:
        writer: TensorBoard's writer; used in the first process only.
        spacing: voxel size of model space in mm.
    """

    def __init__(self, writer: SummaryWriter, spacing: float) -> None:
        self.writer = writer
        self.spacing = (spacing,) * 3

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Draw the first scan of the validation set."""
        if engine.state.iteration != 1 or engine.state.rank != 0:
            return
        output = engine.state.output[0]
        image, pred = (np.asarray(output[key].detach().float().cpu()[0]) for key in ("image", "pred"))
        figure = recon_panel(image, pred, self.spacing, title=f"epoch {engine.state.epoch}")
        self.writer.add_image("reconstruction", figure_to_array(figure), engine.state.epoch, dataformats="HWC")


def _call_it_epoch_0(engine: Engine) -> None:
    engine.state.epoch = 0


def _loss_of(output: Any) -> dict[str, float]:
    return {"loss": float(output[0]["loss"])}  # the same in every item of a decollated batch
