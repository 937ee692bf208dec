"""Runs that are killed and resumed: equal to the bit to runs that were not, whatever was damaged in between."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, LrScheduleHandler, ValidationHandler, from_engine
from monai.inferers import SimpleInferer
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import nn

from scripts.metrics import VolumeMetric
from scripts.networks import prepare_batch, read_state_dict
from scripts.run import InputError, Interrupted
from scripts.training import (
    EpochSeed,
    GradientClip,
    MuonAdamW,
    RunCheckpoint,
    StartValidation,
    VAELoss,
    WarmEMA,
    batch_sampler,
)

CPU = torch.device("cpu")
WORSE = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]  # scores of a run that is best in its first epoch
DAMAGES = {"empty": b"", "html": b"<!DOCTYPE html>", "dots": b"....", "cut": None}
# what the next run changes, and what it is told
OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"scans": 8}, "made with 3 steps an epoch, this run has 4; use the same cohort"),
    ({"width": 6}, "epoch_0004.pt does not fit this configuration .network."),
    ({"adam": True}, "epoch_0004.pt does not fit this configuration .optimizer."),
]
INTERRUPTIONS = [
    (2, KeyboardInterrupt(), "run the same command again.", 130),
    (4, KeyboardInterrupt(), "add --resume True to the same command to go on after epoch 1.", 130),
    (4, Interrupted(exit_code=143), "add --resume True to the same command to go on after epoch 1.", 143),
]
STEPS = 3  # an epoch: six scans in batches of two


class TinyVAE(nn.Module):
    """Two convolutions with a noisy latent, the calling conventions of `BrainVAE`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(1, width, 3, 2, 1)
        self.hidden = nn.Conv3d(width, width, 3, 1, 1)
        self.decoder = nn.ConvTranspose3d(width, 1, 2, 2)

    def forward(self, x: torch.Tensor) -> Any:
        mu = self.hidden(torch.tanh(self.encoder(x)))
        if not self.training:
            return self.decoder(mu)
        return self.decoder(mu + 0.3 * torch.randn_like(mu)), mu, torch.full_like(mu, 0.3)


class GivenScores:
    """Stands in for the key metric: the validation of epoch n gives the n-th score."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.scores = scores

    def attach(self, engine: Engine, name: str) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self, name)

    def __call__(self, engine: Engine, name: str) -> None:
        engine.state.metrics[name] = self.scores[engine.state.epoch - 1]


class Killed(Exception):
    """Stands in for the end of the power."""


def build(
    folder: Path,
    *,
    epochs: int = 4,
    width: int = 16,
    scans: int = 6,
    adam: bool = False,
    val_interval: int = 1,
    patience: int = 10,
    num_workers: int = 0,
    validates_start: bool = False,
    scores: Sequence[float] | None = None,
) -> SimpleNamespace:
    """A training as train.json builds it, of a tiny network on random volumes, with fresh random weights."""
    generator = torch.Generator().manual_seed(5)
    records = [{"image": torch.rand(1, 8, 8, 8, generator=generator)} for _ in range(scans + 2)]
    augmentation = Compose([RandFlipd("image", 0.5, 0), RandGaussianNoised("image", prob=0.7, std=0.1)])
    dataset = Dataset(records[:scans], augmentation)
    loader = DataLoader(dataset, batch_sampler=batch_sampler(dataset.data, 2, False, 3), num_workers=num_workers)
    network, loss = TinyVAE(width), VAELoss()
    optimizer = torch.optim.Adam(network.parameters(), 0.01) if adam else MuonAdamW(network, adam_lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)
    ema = WarmEMA(network, 0.9)
    metric = (
        GivenScores(scores)
        if scores
        else IgniteMetricHandler(VolumeMetric("psnr_brain"), output_transform=from_engine(["pred", "image"]))
    )
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records[scans:]), batch_size=1), ema.ema_model, prepare_batch=prepare_batch,
        inferer=SimpleInferer(), key_val_metric={"score": metric},
    )  # fmt: skip
    handlers = [
        ema, *[StartValidation(evaluator)] * validates_start, EpochSeed(11), GradientClip(network, 1.0),
        LrScheduleHandler(schedule, print_lr=False), ValidationHandler(val_interval, evaluator),
    ]  # fmt: skip
    trainer = SupervisedTrainer(
        CPU, epochs, loader, network, optimizer, loss, prepare_batch=prepare_batch, inferer=SimpleInferer(),
        train_handlers=handlers,
    )  # fmt: skip
    objects = {"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": schedule}
    checkpoint = RunCheckpoint(str(folder / "checkpoints"), objects, ema.ema_model, str(folder))
    checkpoint.attach(trainer, evaluator, patience)
    return SimpleNamespace(trainer=trainer, evaluator=evaluator, checkpoint=checkpoint, objects=objects, loss=loss)


def train(run: SimpleNamespace) -> SimpleNamespace:
    """Start the run from the beginning and let it end."""
    assert run.checkpoint.start(False) == 0
    run.trainer.run()
    return run


def kill_at(run: SimpleNamespace, step: int, error: BaseException | None = None) -> BaseException:
    """Start the run from the beginning and end it by an exception after `step` steps; what came out of it."""

    def end(engine: Engine) -> None:
        if engine.state.iteration == step:
            raise error or Killed

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    with pytest.raises((Killed, Interrupted)) as raised:
        train(run)
    return raised.value


def resume(run: SimpleNamespace) -> SimpleNamespace:
    """Go on to the end, in a process that has drawn other random numbers."""
    torch.manual_seed(12345)
    run.checkpoint.start(True)
    run.trainer.run()
    return run


def tensors(value: object) -> list[object]:
    """Everything in nested dicts and lists, in order; tensors as lists."""
    if isinstance(value, dict):
        return [item for key in value for item in [key, *tensors(value[key])]]
    if isinstance(value, (list, tuple)):
        return [item for part in value for item in tensors(part)]
    return [value.tolist()] if torch.is_tensor(value) else [value]


def assert_equal(run: SimpleNamespace, other: SimpleNamespace) -> None:
    """Network, EMA, optimizer, schedule, best metric and early stopping are equal to the bit."""
    for name, item in run.objects.items():
        assert tensors(item.state_dict()) == tensors(other.objects[name].state_dict()), name
    states = [
        (r.trainer.state.epoch, r.trainer.state.iteration, float(r.evaluator.state.best_metric),
         r.evaluator.state.best_metric_epoch, tensors(dict(r.checkpoint.early_stop.state_dict())))
        for r in (run, other)
    ]  # fmt: skip
    assert states[0] == states[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of four epochs that nothing interrupted."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("whole")
    run = build(folder)
    run.start = {name: value.clone() for name, value in run.objects["network"].state_dict().items()}
    run.folder = folder
    return train(run)


def same_start(folder: Path, whole: SimpleNamespace, **arguments: Any) -> SimpleNamespace:
    """A run that begins with the weights with which `whole` began."""
    run = build(folder, **arguments)
    run.objects["network"].load_state_dict(whole.start)
    return run


def test_a_run_leaves_its_averaged_weights_and_two_checkpoints(whole: SimpleNamespace):
    """`model_final.pt` is the EMA's bare state dict after the last epoch; nothing stands under a temporary name."""
    assert sorted(path.name for path in (whole.folder / "checkpoints").iterdir()) == ["epoch_0003.pt", "epoch_0004.pt"]
    assert sorted(path.name for path in whole.folder.iterdir()) == ["checkpoints", "model.pt", "model_final.pt"]
    final, ema = read_state_dict(whole.folder / "model_final.pt"), whole.objects["ema"].state_dict()
    assert tensors(final) == tensors(dict(ema))
    weights = [state["hidden.weight"] for state in (whole.start, whole.objects["network"].state_dict(), final)]
    assert not any(torch.equal(weights[one], weights[two]) for one, two in ((0, 1), (1, 2)))  # it trains, and averages


@pytest.mark.parametrize("step", [2 * STEPS, 2 * STEPS + 1, 3 * STEPS - 1])
def test_resumed_run_is_equal(whole: SimpleNamespace, tmp_path: Path, step: int):
    """Killed at the end of the second epoch before it was saved, or within the third: the end is the same."""
    kill_at(same_start(tmp_path, whole), step)
    assert_equal(resume(build(tmp_path)), whole)
    for name in ("model.pt", "model_final.pt"):
        assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_resumed_run_is_equal_with_workers(tmp_path: Path):
    """With two worker processes augmentation draws from the workers' states; they too are the epoch's."""
    runs = []
    for name in ("whole", "killed"):
        torch.manual_seed(2)
        runs.append(build(tmp_path / name, epochs=3, num_workers=2))
    train(runs[0])
    kill_at(runs[1], STEPS + 1)
    assert_equal(resume(build(tmp_path / "killed", epochs=3, num_workers=2)), runs[0])


def test_more_epochs_can_be_added(whole: SimpleNamespace, tmp_path: Path):
    """A finished run of two epochs, resumed with four, ends as the run of four."""
    train(same_start(tmp_path, whole, epochs=2))
    assert_equal(resume(build(tmp_path)), whole)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_passed_over(whole: SimpleNamespace, tmp_path: Path, kind: str, capsys: Any):
    """If the newest cannot be read, the one before it serves, and the end is still the same."""
    kill_at(same_start(tmp_path, whole), 3 * STEPS + 1)
    newest = tmp_path / "checkpoints" / "epoch_0003.pt"
    damage = DAMAGES[kind]
    newest.write_bytes(newest.read_bytes()[:-500] if damage is None else damage)
    run = resume(build(tmp_path))
    assert "epoch_0002.pt" in capsys.readouterr().out
    assert_equal(run, whole)


def test_only_damaged_checkpoints_are_refused(whole: SimpleNamespace, tmp_path: Path):
    """Nothing is trained from the beginning over a run that could not be read."""
    kill_at(same_start(tmp_path, whole), 2 * STEPS + 1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="only damaged checkpoints .epoch_0002.pt, epoch_0001.pt."):
        build(tmp_path).checkpoint.start(True)


def test_resuming_nothing_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`--resume True` may stand in a script that is started again and again; what has another name is left alone."""
    other = tmp_path / "checkpoints" / "epoch_best.pt"
    other.parent.mkdir()
    other.write_bytes(b"mine")
    assert resume(build(tmp_path, epochs=3)).trainer.state.iteration == 3 * STEPS
    assert "starting from the beginning" in capsys.readouterr().out
    assert other.read_bytes() == b"mine"


def test_used_folder_is_refused(whole: SimpleNamespace):
    """Without resume, a run's checkpoints are not overwritten."""
    with pytest.raises(InputError, match="holds a run that reached epoch 4; add --resume True"):
        build(whole.folder).checkpoint.start(False)


@pytest.mark.parametrize(("change", "message"), OTHERS)
def test_another_run_is_refused(whole: SimpleNamespace, change: dict[str, Any], message: str):
    """Another cohort or batch size, architecture or optimizer does not fit, and the sentence names which."""
    with pytest.raises(InputError, match=message):
        build(whole.folder, **change).checkpoint.start(True)


def test_other_number_of_processes(whole: SimpleNamespace, tmp_path: Path):
    """Goes on where the steps an epoch are as many, else both numbers are named; old checkpoints are of one process."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "epoch_0004.pt"
    content = torch.load(path, weights_only=True)
    assert content["processes"] == 1
    torch.save({**content, "processes": 2}, path)
    assert build(tmp_path).checkpoint.start(True) == 4
    with pytest.raises(InputError, match="by 2 processes with 3 steps an epoch, this run of 1 has 4; start as"):
        build(tmp_path, scans=8).checkpoint.start(True)
    del content["processes"]
    torch.save(content, path)
    assert build(tmp_path).checkpoint.start(True) == 4


def test_machines_that_do_not_share_the_folder_are_told(whole: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    """One process has found a checkpoint that another has not."""
    monkeypatch.setattr("scripts.training.checkpoints.gathered", lambda epoch: [epoch, 0])
    with pytest.raises(InputError, match=r"different epochs \(4, 0\) in .*all machines must share 'output_dir'"):
        build(whole.folder).checkpoint.start(True)


def test_worse_validation_after_resuming_keeps_the_best(tmp_path: Path):
    """The best epoch was before the kill: `model.pt` stays that of epoch 2, the counter goes on to two."""
    scores = [0.1, 0.9, 0.5, 0.4]
    kill_at(build(tmp_path, scores=scores), 2 * STEPS + 1)
    best = (tmp_path / "model.pt").read_bytes()
    run = resume(build(tmp_path, scores=scores))
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == (0.9, 2)
    assert (run.checkpoint.early_stop.counter, run.checkpoint.early_stop.best_score) == (2, 0.9)
    assert (tmp_path / "model.pt").read_bytes() == best != (tmp_path / "model_final.pt").read_bytes()


def test_early_stopping_counts_on(tmp_path: Path):
    """Two epochs without improvement before the kill and one after it end a run of patience three, with its exports;
    resuming it again trains no further epoch."""
    kill_at(build(tmp_path, epochs=6, patience=3, scores=WORSE), 3 * STEPS + 1)
    assert resume(build(tmp_path, epochs=6, patience=3, scores=WORSE)).trainer.state.epoch == 4
    assert (tmp_path / "checkpoints" / "epoch_0004.pt").exists() and (tmp_path / "model_final.pt").exists()
    again = build(tmp_path, epochs=6, patience=3, scores=WORSE)
    assert again.checkpoint.start(True) == 4 and not again.checkpoint.unfinished


def test_patience_of_0_never_stops(tmp_path: Path):
    """Also in a run that is resumed."""
    kill_at(build(tmp_path, epochs=6, patience=0, scores=WORSE), 5 * STEPS + 1)
    assert resume(build(tmp_path, epochs=6, patience=0, scores=WORSE)).trainer.state.epoch == 6


def test_run_without_validation_exports_its_last_epoch(tmp_path: Path):
    """No validation, no best epoch: `model.pt` is the last one, also over a file of an earlier run."""
    (tmp_path / "model.pt").write_bytes(b"of an earlier run")
    train(build(tmp_path, epochs=1, val_interval=5))
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "model_final.pt").read_bytes()


def test_a_kill_after_the_last_checkpoint_is_made_good(tmp_path: Path):
    """Nothing is left to train; the final model was missing or of fewer epochs, a third checkpoint still there."""
    train(build(tmp_path, epochs=3))
    final, kept = tmp_path / "model_final.pt", sorted((tmp_path / "checkpoints").iterdir())
    expected = final.read_bytes()
    for left in (None, b"of fewer epochs"):
        final.unlink() if left is None else final.write_bytes(left)
        shutil.copy(kept[0], tmp_path / "checkpoints" / "epoch_0001.pt")
        again = build(tmp_path, epochs=3)
        assert again.checkpoint.start(True) == 3 and not again.checkpoint.unfinished
        assert final.read_bytes() == expected and sorted((tmp_path / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize(("step", "signal", "remedy", "code"), INTERRUPTIONS)
def test_an_interrupted_training_says_how_to_go_on(
    tmp_path: Path, step: int, signal: BaseException, remedy: str, code: int
):
    """Before the first epoch's end, and after it."""
    raised = kill_at(build(tmp_path), step, signal)
    assert isinstance(raised, Interrupted) and (str(raised), raised.exit_code) == (remedy, code)


def test_validation_every_second_epoch(tmp_path: Path):
    """Epochs without a validation neither export nor forget the best one."""
    run = train(build(tmp_path, val_interval=2, scores=[0.0, 0.7, 0.0, 0.6]))
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == (0.7, 2)
    content = torch.load(tmp_path / "checkpoints" / "epoch_0003.pt", weights_only=True)
    assert (content["epoch"], content["best_metric"], content["best_metric_epoch"]) == (3, 0.7, 2)


def test_a_start_that_no_epoch_beats_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """model.pt holds the weights that the run began with, and the run says so; model_final.pt the last epoch's."""
    run = build(
        tmp_path, epochs=2, validates_start=True, scores=[1.0, 2.0, 9.0]
    )  # epochs 1, 2, and 0, which counts from the end
    start = tensors({name: value.clone() for name, value in run.objects["network"].state_dict().items()})
    train(run)
    kept, final = (tensors(read_state_dict(tmp_path / name)) for name in ("model.pt", "model_final.pt"))
    assert kept == start != final
    assert "no epoch was better than the start" in capsys.readouterr().out
