"""The Ignite handlers of training that MONAI lacks.

`train.json` lists them in `train#handlers`: an EMA that is right from the first step, a validation of the start, a
perceptual term that joins later, seeds that make a resumed epoch equal to an uninterrupted one, gradient clipping.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.data.utils import set_rnd
from monai.engines import Evaluator
from monai.engines.utils import IterationEvents
from torch import nn

from scripts.run import InputError
from scripts.training.losses import VAELoss

__all__ = ["EpochSeed", "GradientClip", "PerceptualStart", "StartValidation", "WarmEMA"]


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


def _call_it_epoch_0(engine: Engine) -> None:
    engine.state.epoch = 0
