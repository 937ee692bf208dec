"""Handlers of training: the average's decay, epochs that repeat exactly, clipping."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.inferers import SimpleInferer
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from scripts.networks import prepare_batch
from scripts.run import InputError
from scripts.training import (
    EpochSeed,
    GradientClip,
    PerceptualStart,
    VAELoss,
    WarmEMA,
    batch_sampler,
)

CPU = torch.device("cpu")
STEPS = 2  # an epoch: four scans in batches of two
OUT_OF_RANGE: list[tuple[str, Callable[[], Any]]] = [
    ("'perceptual_start' is -0.1", lambda: PerceptualStart(VAELoss(), -0.1, 4)),
    ("'perceptual_start' is 1.1", lambda: PerceptualStart(VAELoss(), 1.1, 4)),
    ("'ema_decay' is 0", lambda: WarmEMA(Net(), 0.0)),
    ("'ema_decay' is 1", lambda: WarmEMA(Net(), 1.0)),
    ("'ema_decay' is nan", lambda: WarmEMA(Net(), math.nan)),
    ("'clip_norm' is -1", lambda: GradientClip(Net(), -1)),
]


class Net(nn.Module):
    """One convolution, the calling conventions of `BrainVAE`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor):
        y = self.conv(x)
        return (y, y, torch.ones_like(y)) if self.training else y


def build(
    epochs: int = 1,
    handlers: Callable[[SimpleNamespace], list] = lambda run: [],
    workers: int = 0,
    epoch_length: int | None = None,
    done: int = 0,
) -> SimpleNamespace:
    """A trainer on random volumes after some epochs; `handlers` makes its handlers from what else there is."""
    torch.manual_seed(0)
    records = [{"image": torch.rand(1, 12, 12, 12), "index": index} for index in range(4)]
    dataset = Dataset(records, Compose([RandGaussianNoised("image", prob=1.0, std=1.0)]))
    loader = DataLoader(dataset, batch_sampler=batch_sampler(records, 2, False, 0), num_workers=workers)
    run = SimpleNamespace(network=Net(), loss=VAELoss())
    run.evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records[:3]), batch_size=1), run.network, prepare_batch=prepare_batch,
        inferer=SimpleInferer(),
    )  # fmt: skip
    run.trainer = SupervisedTrainer(
        CPU, epochs, loader, run.network, torch.optim.SGD(run.network.parameters(), 0.1), run.loss,
        prepare_batch=prepare_batch, inferer=SimpleInferer(), train_handlers=handlers(run), epoch_length=epoch_length,
    )  # fmt: skip
    run.trainer.state.epoch, run.trainer.state.iteration = done, done * STEPS
    return run


def flat(network: nn.Module) -> torch.Tensor:
    """All parameters, copied."""
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(("message", "make"), OUT_OF_RANGE)
def test_settings_out_of_range_are_refused(message: str, make: Callable[[], Any]):
    """The config's key is named."""
    with pytest.raises(InputError, match=message):
        make()


def test_average_over_a_run():
    """Over several steps the average is the recursion with each step's decay, min(decay, (1 + t) / (10 + t))."""
    seen: list[torch.Tensor] = []
    run = build(3, lambda run: [setattr(run, "ema", WarmEMA(run.network, 0.3)) or run.ema])
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(flat(run.network)))
    expected = flat(run.network)
    run.trainer.run()
    for step, weights in enumerate(seen, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(flat(run.ema.ema_model), expected)
    assert len(seen) == 3 * STEPS


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


# start, and the epochs of four that have the term
@pytest.mark.parametrize(("start", "expected"), [(0.0, [1, 2, 3, 4]), (0.5, [3, 4]), (0.6, [3, 4]), (1.0, [])])
@pytest.mark.parametrize("done", [0, 3])
def test_perceptual_term_joins_later(done: int, start: float, expected: list[int]):
    """Epochs after the given share have its weight, those before have none, also where a run is resumed in between."""
    run, weights = build(4, done=done), {}
    run.loss.weights["lpips"] = 0.5
    PerceptualStart(run.loss, start, 4).attach(run.trainer)
    run.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: weights.update({engine.state.epoch: run.loss.weights["lpips"]})
    )
    run.trainer.run()
    assert weights == {epoch: 0.5 if epoch in expected else 0.0 for epoch in range(done + 1, 5)}


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_draws_the_same_whatever_ran_before(workers: int):
    """Batches, augmentation and the three global generators depend on seed and epoch alone."""

    def draws(first: int, last: int, start: int, seed: int) -> dict[int, list]:
        run, seen = build(last, lambda run: [EpochSeed(seed)], workers, done=first - 1), {}
        random.seed(start), np.random.seed(start), torch.manual_seed(start)

        def look(engine: Engine) -> None:
            numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
            images = [item["image"].sum().item() for item in engine.state.batch]
            seen.setdefault(engine.state.epoch, []).append(images + numbers)

        run.trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
        run.trainer.run()
        return seen

    whole, resumed, other = draws(1, 3, 1, 4), draws(3, 3, 2, 4), draws(3, 3, 3, 5)
    assert len(whole[3]) == STEPS and whole[3] == resumed[3] != other[3]
    for one, two in ((1, 2), (2, 3), (1, 3)):
        assert not {x for step in whole[one] for x in step} & {x for step in whole[two] for x in step}


@pytest.mark.parametrize("epoch_length", [STEPS, 1])
def test_epoch_has_its_own_batches(epoch_length: int):
    """Each epoch takes the sampler's batches of its number from the first on, also where it stops before the last."""
    run, seen = build(6, lambda run: [EpochSeed(0)], epoch_length=epoch_length), {}
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: seen.setdefault(engine.state.epoch, []).append([int(x["index"]) for x in engine.state.batch]),
    )
    run.trainer.run()
    sampler = batch_sampler([{}] * 4, 2, False, 0)
    for epoch in range(1, 7):
        sampler.set_epoch(epoch)
        assert seen[epoch] == list(sampler)[:epoch_length]
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


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 5.0), (1.0, 1.0), (4.9, 4.9), (5.1, 5.0)])
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


def test_clipping_comes_before_the_step():
    """Plain gradient descent moves by learning rate times the clipped norm."""
    run, moved = build(1, lambda run: [GradientClip(run.network, 1e-3)]), []
    before = flat(run.network)
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=1), lambda engine: moved.append((flat(run.network) - before).norm().item())
    )
    run.trainer.run()
    assert moved == [pytest.approx(0.1 * 1e-3, rel=1e-2)]  # differences of fp32 weights near 0.1: 1e-8 of 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite_ends_the_run(value: float):
    """One sentence with the step and the remedies, before the weights are spoilt."""
    run = build(1, lambda run: [GradientClip(run.network, 1.0)])
    run.network.conv.weight.register_hook(lambda gradient: gradient * value)
    before = flat(run.network)
    with pytest.raises(InputError, match="the gradient became (nan|inf) at step 1: lower learning_rate"):
        run.trainer.run()
    assert torch.equal(flat(run.network), before)
