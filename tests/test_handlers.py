"""Handlers of training: the average's decay, epochs that repeat exactly, clipping, the curve and the pictures."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.inferers import SimpleInferer
from monai.transforms import Compose, RandGaussianNoised
from torch import nn

from scripts.jobs.train import TrainingLog
from scripts.networks import prepare_batch
from scripts.run import InputError, LossBar, ScanBar
from scripts.training import (
    EpochSeed,
    GradientClip,
    PerceptualStart,
    PictureLog,
    StartValidation,
    VAELoss,
    WarmEMA,
    batch_sampler,
)

CPU = torch.device("cpu")
STEPS = 2  # an epoch: four scans in batches of two
# decay, step, weight of the past
WARM = [(0.999, 1, 2 / 11), (0.999, 2, 3 / 12), (0.999, 90, 91 / 100), (0.999, 8990, 0.999), (0.999, 10**6, 0.999),
        (0.5, 1, 2 / 11), (0.5, 8, 0.5), (0.5, 9, 0.5)]  # fmt: skip


class Net(nn.Module):
    """One convolution, the calling conventions of `BrainVAE`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor):
        y = self.conv(x)
        return (y, y, torch.ones_like(y)) if self.training else y


class FakeWriter:
    """Keeps what TensorBoard's writer would be given."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[int, float]] = {}
        self.images: list[tuple[str, np.ndarray, int, str]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.setdefault(name, {})[step] = value

    def add_image(self, name: str, image: np.ndarray, step: int, dataformats: str) -> None:
        self.images.append((name, image, step, dataformats))

    def flush(self) -> None:
        pass


class FakeScore:
    """A key metric: the epoch's number."""

    def attach(self, engine: Engine, name: str) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update({name: float(e.state.epoch)}))


def build(
    epochs: int = 1, handlers=lambda run: [], workers: int = 0, epoch_length: int | None = None
) -> SimpleNamespace:
    """A trainer on random volumes; `handlers` makes its handlers from what else there is."""
    torch.manual_seed(0)
    records = [{"image": torch.rand(1, 12, 12, 12), "index": index} for index in range(4)]
    dataset = Dataset(records, Compose([RandGaussianNoised("image", prob=1.0, std=1.0)]))
    loader = DataLoader(dataset, batch_sampler=batch_sampler(records, 2, False, 0), num_workers=workers)
    run = SimpleNamespace(network=Net(), loss=VAELoss(), writer=FakeWriter())
    run.optimizer = torch.optim.SGD(run.network.parameters(), 0.1)
    run.evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records[:3]), batch_size=1), run.network, prepare_batch=prepare_batch,
        inferer=SimpleInferer(), key_val_metric={"val_score": FakeScore()}, val_handlers=[PictureLog(run.writer, 2.0)],
    )  # fmt: skip
    run.trainer = SupervisedTrainer(
        CPU, epochs, loader, run.network, run.optimizer, run.loss, prepare_batch=prepare_batch,
        inferer=SimpleInferer(), train_handlers=handlers(run), epoch_length=epoch_length,
    )  # fmt: skip
    return run


def log_of(run: SimpleNamespace, folder: Path, clip_norm: float = 0.0, interval: int = 1) -> list:
    """Clipping, a halving learning rate, validation and the log, in the order of train.json."""
    run.clip = GradientClip(run.network, clip_norm)
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    log = TrainingLog(run.loss, run.optimizer, run.clip, run.evaluator, str(folder / "metrics.csv"), run.writer)
    return [run.clip, LrScheduleHandler(schedule, print_lr=False), ValidationHandler(interval, run.evaluator), log]


@pytest.mark.parametrize(("decay", "step", "expected"), WARM)
def test_decay_of_the_average(decay, step, expected):
    """min(decay, (1 + t) / (10 + t)): the average moves by one minus that."""
    network = Net()
    ema = WarmEMA(network, decay)
    engine = Engine(lambda engine, batch: None)
    ema.attach(engine)
    nn.init.constant_(network.conv.weight, 1.0)
    nn.init.constant_(ema.ema_model.conv.weight, 0.0)
    engine.state.iteration = step
    engine.fire_event(Events.ITERATION_COMPLETED)
    torch.testing.assert_close(ema.ema_model.conv.weight, torch.full_like(network.conv.weight, 1 - expected))


def test_average_over_a_run():
    """Over several steps the average is the recursion with the decay of each step."""
    seen = []
    run = build(3, lambda run: [ema := WarmEMA(run.network, 0.3), setattr(run, "ema", ema)][:1])
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append(run.network.conv.weight.detach().clone())
    )
    expected = run.network.conv.weight.detach().clone()
    run.trainer.run()
    for step, weight in enumerate(seen, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(run.ema.ema_model.conv.weight.detach(), expected)
    assert len(seen) == 3 * STEPS


def test_average_starts_from_loaded_weights():
    """Weights loaded after the handler was built are where the average starts; those of a resumed run stay."""
    for iteration, expected in ((0, 7.0), (4, 3.0)):
        network = Net()
        ema = WarmEMA(network, 0.9)
        nn.init.constant_(network.conv.weight, 7.0)
        nn.init.constant_(ema.ema_model.conv.weight, 3.0)
        engine = Engine(lambda engine, batch: None)
        ema.attach(engine)
        engine.state.iteration = iteration
        engine.fire_event(Events.STARTED)
        assert (ema.ema_model.conv.weight == expected).all()


def test_start_is_validated_as_epoch_0(tmp_path):
    """Before the first step; its row comes first, without what only steps have; a resumed run skips it."""
    seen = []
    run = build(2, lambda run: [StartValidation(run.evaluator), *log_of(run, tmp_path)])
    run.evaluator.add_event_handler(
        Events.COMPLETED, lambda engine: seen.append((engine.state.epoch, run.trainer.state.iteration))
    )
    run.trainer.run()
    assert seen == [(0, 0), (1, STEPS), (2, 2 * STEPS)]
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table)[-1] == "val_score"
    assert table["epoch"].tolist() == [0, 1, 2] and table["loss"].isna().tolist() == [True, False, False]
    assert table["val_score"].tolist() == [0, 1, 2]
    assert run.evaluator.state.best_metric_epoch == 2
    resumed = build(3, lambda run: [StartValidation(run.evaluator)])
    resumed.trainer.state.epoch, resumed.trainer.state.iteration = 2, 2 * STEPS
    resumed.trainer.run()
    assert resumed.evaluator.state.best_metric_epoch == -1


# start, and the epochs of four that have the term
@pytest.mark.parametrize(("start", "expected"), [(0.0, [1, 2, 3, 4]), (0.5, [3, 4]), (0.6, [3, 4]), (1.0, [])])
@pytest.mark.parametrize("first", [0, 3])
def test_perceptual_term_joins_later(first, start, expected):
    """Epochs after the given share have its weight, those before have none, also where a run is resumed in between."""
    run, weights = build(4), {}
    run.loss.weights["lpips"] = 0.5
    PerceptualStart(run.loss, start, 4).attach(run.trainer)
    run.trainer.state.epoch, run.trainer.state.iteration = first, first * STEPS
    run.trainer.add_event_handler(
        Events.EPOCH_STARTED, lambda engine: weights.update({engine.state.epoch: run.loss.weights["lpips"]})
    )
    run.trainer.run()
    assert weights == {epoch: 0.5 if epoch in expected else 0.0 for epoch in range(first + 1, 5)}


@pytest.mark.parametrize("start", [-0.1, 1.1])
def test_perceptual_start_out_of_range_is_refused(start):
    """The config's key is named."""
    with pytest.raises(InputError, match="'perceptual_start' is"):
        PerceptualStart(VAELoss(), start, 4)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_decay_out_of_range_is_refused(decay):
    """The config's key is named."""
    with pytest.raises(InputError, match="'ema_decay' is"):
        WarmEMA(Net(), decay)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_draws_the_same_whatever_ran_before(workers):
    """Batches, augmentation and the three global generators depend on seed and epoch alone."""
    seen: dict[tuple[int, int], list] = {}

    def run_epochs(first: int, last: int, start: int, seed: int) -> None:
        run = build(last, lambda run: [EpochSeed(seed)], workers)
        random.seed(start), np.random.seed(start), torch.manual_seed(start)
        run.trainer.state.epoch, run.trainer.state.iteration = first - 1, (first - 1) * STEPS

        def look(engine: Engine) -> None:
            draws = [random.random(), np.random.rand(), torch.rand(1).item()]
            seen.setdefault((start, engine.state.epoch), []).append(
                [[x["image"].sum().item() for x in engine.state.batch], *draws]
            )

        run.trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
        run.trainer.run()

    run_epochs(1, 3, start=1, seed=4)
    run_epochs(3, 3, start=2, seed=4)
    run_epochs(3, 3, start=3, seed=5)
    assert len(seen[1, 3]) == STEPS
    assert seen[1, 3] == seen[2, 3]
    assert seen[1, 3] != seen[3, 3]
    assert seen[1, 1] != seen[1, 2] != seen[1, 3]


@pytest.mark.parametrize("epoch_length", [STEPS, 1])
def test_epoch_has_its_own_batches(epoch_length):
    """Each epoch takes the sampler's batches of its number from the first on, also where it stops before the last."""
    seen: dict[int, list] = {}
    run = build(6, lambda run: [EpochSeed(0)], epoch_length=epoch_length)
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda engine: seen.setdefault(engine.state.epoch, []).append(
            [int(item["index"]) for item in engine.state.batch]
        ),
    )
    run.trainer.run()
    sampler = batch_sampler([{}] * 4, 2, False, 0)
    for epoch in range(1, 7):
        sampler.set_epoch(epoch)
        assert seen[epoch] == list(sampler)[:epoch_length]
    assert len({str(batches) for batches in seen.values()}) > 1


def test_ranks_draw_differently():
    """Two processes of one run do not add the same noise."""
    draws = []
    for rank in (0, 1):
        engine = SimpleNamespace(
            state=SimpleNamespace(epoch=1, rank=rank, dataloader=SimpleNamespace(dataset=[], batch_sampler=None)),
            set_data=lambda loader: None,
        )
        EpochSeed(0)(engine)
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert draws[0] != draws[1]


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 5.0), (1.0, 1.0), (4.9, 4.9), (5.1, 5.0)])
def test_gradient_is_clipped(max_norm, expected):
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


def test_clipping_comes_before_the_step(tmp_path):
    """Plain gradient descent moves by learning rate times the clipped norm."""
    run = build(1, lambda run: log_of(run, tmp_path, clip_norm=1e-3))
    before = torch.cat([p.detach().flatten().clone() for p in run.network.parameters()])
    moved = []

    def measure(engine: Engine) -> None:
        now = torch.cat([p.detach().flatten() for p in run.network.parameters()])
        moved.append((now - before).norm().item())

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), measure)
    run.trainer.run()
    assert moved == [pytest.approx(0.1 * 1e-3, rel=1e-2)]  # differences of fp32 weights near 0.1: 1e-8 of 1e-4
    assert run.clip.norm > 1e-3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite_ends_the_run(value):
    """One sentence with the step and the remedies, before the weights are spoilt."""
    run = build(1, lambda run: [GradientClip(run.network, 1.0)])
    run.network.conv.weight.register_hook(lambda gradient: gradient * value)
    before = run.network.conv.weight.detach().clone()
    with pytest.raises(InputError, match="the gradient became (nan|inf) at step 1: lower learning_rate"):
        run.trainer.run()
    assert torch.equal(run.network.conv.weight, before)


def test_negative_clip_norm_is_refused():
    """The config's key is named."""
    with pytest.raises(InputError, match="'clip_norm' is -1"):
        GradientClip(Net(), -1)


def test_log_has_a_row_an_epoch(tmp_path, capsys):
    """Columns, learning rates as used in the epoch, means over its steps, the metrics of its validation."""
    steps = []
    run = build(3, lambda run: log_of(run, tmp_path))
    run.trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: steps.append({**run.loss.parts, "gradient_norm": run.clip.norm})
    )
    run.trainer.run()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table) == ["epoch", "learning_rate", "loss", "l1", "kl", "gradient_norm", "val_score"]
    assert table["epoch"].tolist() == [1, 2, 3]
    assert table["learning_rate"].tolist() == pytest.approx([0.1, 0.05, 0.025])
    assert table["val_score"].tolist() == [1, 2, 3]
    means = pd.DataFrame(steps).groupby(np.arange(3 * STEPS) // STEPS).mean()
    for name in ("loss", "l1", "kl", "gradient_norm"):
        assert table[name].tolist() == pytest.approx(means[name].tolist(), rel=1e-6)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "gradient_norm" in line] == [
        ["epoch", str(epoch)] for epoch in (1, 2, 3)
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_log_goes_to_tensorboard(tmp_path):
    """Every step and every epoch."""
    run = build(2, lambda run: log_of(run, tmp_path))
    run.trainer.run()
    scalars = run.writer.scalars
    assert list(scalars["step/loss"]) == list(range(1, 2 * STEPS + 1))
    assert scalars["epoch/val_score"] == {1: 1.0, 2: 2.0}
    assert scalars["epoch/learning_rate"] == {1: 0.1, 2: 0.05}
    assert "epoch/epoch" not in scalars


def test_epochs_without_validation_have_no_metric(tmp_path):
    """A validation every second epoch leaves empty cells between, no repeated values."""
    build(4, lambda run: log_of(run, tmp_path, interval=2)).trainer.run()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["val_score"].isna().tolist() == [True, False, True, False]


def test_resumed_run_drops_the_rows_it_repeats(tmp_path):
    """Killed in epoch 4 after a checkpoint of epoch 2: rows 1 and 2 stay, 3 and 4 are written anew."""
    build(3, lambda run: log_of(run, tmp_path)).trainer.run()
    table = pd.read_csv(tmp_path / "metrics.csv")
    table["loss"] = 99.0
    table.to_csv(tmp_path / "metrics.csv", index=False)
    run = build(4, lambda run: log_of(run, tmp_path))
    run.trainer.state.epoch, run.trainer.state.iteration = 2, 2 * STEPS
    run.trainer.run()
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert (table["loss"] == 99).tolist() == [True, True, False, False]


def test_new_run_begins_a_new_table(tmp_path):
    """Rows of an earlier run in the folder do not stay."""
    for epochs in (3, 1):
        build(epochs, lambda run: log_of(run, tmp_path)).trainer.run()
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [1]


def test_log_without_validation(tmp_path):
    """An evaluator is not needed."""
    run = build(1)
    log = TrainingLog(run.loss, run.optimizer, GradientClip(run.network, 0), None, str(tmp_path / "m.csv"), run.writer)
    log.attach(run.trainer)
    run.trainer.run()
    assert "val_score" not in pd.read_csv(tmp_path / "m.csv")


def test_one_picture_an_epoch(tmp_path):
    """The first scan of each validation, colour, at the epoch's number; the others are not drawn."""
    run = build(2, lambda run: log_of(run, tmp_path))
    run.trainer.run()
    assert [(name, step, form) for name, _, step, form in run.writer.images] == [
        ("reconstruction", 1, "HWC"),
        ("reconstruction", 2, "HWC"),
    ]
    image = run.writer.images[0][1]
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.max() > 100


def test_other_processes_write_nothing(tmp_path):
    """Only rank 0 writes curves, table and pictures."""
    run = build(2, lambda run: log_of(run, tmp_path))
    run.trainer.state.rank = run.evaluator.state.rank = 1
    run.trainer.run()
    assert not run.writer.scalars and not run.writer.images and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error:Converting a tensor with requires_grad")
def test_bars(capsys):
    """Both bars attach and show, without a warning: the loss in training, the scans in evaluation."""
    run = build(1, lambda run: [LossBar()])
    ScanBar().attach(run.evaluator)
    run.trainer.run()
    run.evaluator.run()
    shown = capsys.readouterr().err
    assert "loss=" in shown and "scans" in shown
