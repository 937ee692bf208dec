"""Handlers of training: the average's decay, epochs that repeat exactly, clipping."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import RandGaussianNoised
from torch import nn

from scripts.networks import prepare_batch
from scripts.run import InputError
from scripts.training import EpochSeed, GradientClip, PerceptualStart, VAELoss, WarmEMA, batch_sampler

CPU = torch.device("cpu")


class Net(nn.Module):
    """One convolution, the calling conventions of `BrainVAE`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor):
        y = self.conv(x)
        return (y, y, torch.ones_like(y)) if self.training else y


def build(epochs: int, handlers: Callable[[nn.Module], list], epoch_length: int | None = None) -> SupervisedTrainer:
    """A trainer on random volumes, whose handlers are made from its network."""
    torch.manual_seed(0)
    records = [{"image": torch.rand(1, 12, 12, 12), "index": index} for index in range(4)]
    loader = DataLoader(Dataset(records), batch_sampler=batch_sampler(records, 2, False, 0))
    network = Net()
    return SupervisedTrainer(
        CPU, epochs, loader, network, torch.optim.SGD(network.parameters(), 0.1), VAELoss(),
        prepare_batch=prepare_batch, inferer=SimpleInferer(), train_handlers=handlers(network),
        epoch_length=epoch_length,
    )  # fmt: skip


def flat(network: nn.Module) -> torch.Tensor:
    """All parameters, copied."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_settings_out_of_range_are_refused():
    """The config's key is named."""
    with pytest.raises(InputError, match="'perceptual_start' is 1.1"):
        PerceptualStart(VAELoss(), 1.1, 4)
    with pytest.raises(InputError, match="'ema_decay' is 1"):
        WarmEMA(Net(), 1.0)
    with pytest.raises(InputError, match="'clip_norm' is -1"):
        GradientClip(Net(), -1)


def test_average_over_a_run():
    """Over several steps the average is the recursion with each step's decay, min(decay, (1 + t) / (10 + t))."""
    seen: list[torch.Tensor] = []
    emas: list[WarmEMA] = []
    trainer = build(3, lambda network: emas.append(WarmEMA(network, 0.3)) or emas)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(flat(trainer.network)))
    expected = flat(trainer.network)
    trainer.run()
    for step, weights in enumerate(seen, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(flat(emas[0].ema_model), expected)
    assert len(seen) == 6  # of three epochs of four scans in batches of two


@pytest.mark.parametrize(("iteration", "expected"), [(0, 7.0), (4, 3.0)])
def test_average_starts_from_loaded_weights(iteration: int, expected: float):
    """Weights loaded after the handler was built are where the average starts; those of a resumed run stay."""
    network, engine = Net(), Engine(lambda engine, batch: None)
    ema = WarmEMA(network, 0.9)
    nn.init.constant_(network.conv.weight, 7.0)
    nn.init.constant_(ema.ema_model.conv.weight, 3.0)
    ema.attach(engine)
    engine.state.iteration = iteration
    engine.fire_event(Events.STARTED)
    assert (ema.ema_model.conv.weight == expected).all()


def test_epoch_has_its_own_batches():
    """Each epoch takes the sampler's batches of its number from the first on, also where it stops before the last."""
    trainer, seen = build(6, lambda network: [EpochSeed(0)], epoch_length=1), {}
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: seen.setdefault(engine.state.epoch, []).append([int(x["index"]) for x in engine.state.batch]),
    )
    trainer.run()
    sampler = batch_sampler([{}] * 4, 2, False, 0)
    for epoch in range(1, 7):
        sampler.set_epoch(epoch)
        assert seen[epoch] == list(sampler)[:1]
    assert len({str(batches) for batches in seen.values()}) > 1


def test_epochs_and_ranks_draw_differently() -> None:
    """No two epochs or processes augment a scan alike or draw the same numbers; the same epoch does, again."""
    dataset = Dataset([{"image": torch.zeros(1, 2, 2, 2)}], RandGaussianNoised("image", prob=1.0))

    def drawn(epoch: int, rank: int) -> set[float]:
        loader = SimpleNamespace(dataset=dataset, batch_sampler=None)
        state = SimpleNamespace(epoch=epoch, rank=rank, dataloader=loader)
        EpochSeed(0)(SimpleNamespace(state=state, set_data=lambda loader: None))
        return {float(dataset[0]["image"].sum()), torch.rand(1).item(), np.random.rand(), random.random()}

    draws = [drawn(1, 0), drawn(2, 0), drawn(1, 1)]
    assert len(set.union(*draws)) == sum(map(len, draws)) == 12
    assert drawn(1, 0) == draws[0]


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 5.0), (1.0, 1.0), (5.1, 5.0)])
def test_gradient_is_clipped(max_norm: float, expected: float):
    """The norm of the whole gradient is at most `max_norm`, its direction stays; the norm before is kept."""
    network = Net()
    clip = GradientClip(network, max_norm)
    network.conv.weight.grad = torch.zeros_like(network.conv.weight)
    network.conv.weight.grad[0, 0, 0, 0, 0] = 3.0
    network.conv.bias.grad = torch.tensor([4.0])
    clip(SimpleNamespace(state=SimpleNamespace(iteration=1)))
    assert clip.norm == 5.0
    torch.testing.assert_close(network.conv.weight.grad.sum(), torch.tensor(0.6 * expected))
    torch.testing.assert_close(network.conv.bias.grad, torch.tensor([0.8 * expected]))


def test_gradient_that_is_not_finite_ends_the_run():
    """One sentence with the step and the remedies, before the weights are spoilt."""
    trainer = build(1, lambda network: [GradientClip(network, 1.0)])
    trainer.network.conv.weight.register_hook(lambda gradient: gradient * math.nan)
    before = flat(trainer.network)
    with pytest.raises(InputError, match="the gradient became nan at step 1: lower learning_rate"):
        trainer.run()
    assert torch.equal(flat(trainer.network), before)
