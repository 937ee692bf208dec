"""Runs that are killed and resumed: equal to the bit to runs that were not, whatever was damaged in between."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import EarlyStopHandler, IgniteMetricHandler, LrScheduleHandler, ValidationHandler, from_engine
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
STEPS = 3  # an epoch: six scans in batches of two


class TinyVAE(nn.Module):
    """Two convolutions with a noisy latent, the calling conventions of `BrainVAE`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Conv3d(1, width, 3, 2, 1)
        self.hidden = nn.Conv3d(width, width, 3, 1, 1)
        self.decoder = nn.ConvTranspose3d(width, 1, 2, 2)

    def forward(self, x: torch.Tensor):
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
    ema, early_stop = WarmEMA(network, 0.9), EarlyStopHandler(patience, lambda engine: engine.state.metrics["score"])
    metric = (
        GivenScores(scores)
        if scores
        else IgniteMetricHandler(VolumeMetric("psnr_brain"), output_transform=from_engine(["pred", "image"]))
    )
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records[scans:]), batch_size=1), ema.ema_model, prepare_batch=prepare_batch,
        inferer=SimpleInferer(), key_val_metric={"score": metric}, val_handlers=[early_stop],
    )  # fmt: skip
    handlers = [
        ema, EpochSeed(11), GradientClip(network, 1.0), LrScheduleHandler(schedule, print_lr=False),
        ValidationHandler(val_interval, evaluator),
    ]  # fmt: skip
    trainer = SupervisedTrainer(
        CPU, epochs, loader, network, optimizer, loss, prepare_batch=prepare_batch, inferer=SimpleInferer(),
        train_handlers=handlers,
    )  # fmt: skip
    objects = {"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": schedule}
    checkpoint = RunCheckpoint(str(folder / "checkpoints"), objects, ema.ema_model, str(folder))
    checkpoint.attach(trainer, evaluator, early_stop)
    return SimpleNamespace(
        trainer=trainer, evaluator=evaluator, checkpoint=checkpoint, early_stop=early_stop, objects=objects, loss=loss
    )


def kill_at(run: SimpleNamespace, step: int) -> None:
    """Start the run from the beginning and end it by an exception after `step` steps."""

    def end(engine: Engine) -> None:
        if engine.state.iteration == step:
            raise Killed

    run.checkpoint.start(False)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    with pytest.raises(Killed):
        run.trainer.run()


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
         r.evaluator.state.best_metric_epoch, r.early_stop._handler.counter, float(r.early_stop._handler.best_score))
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
    assert run.checkpoint.start(False) == 0
    run.trainer.run()
    run.folder = folder
    return run


def same_start(folder: Path, whole: SimpleNamespace, **arguments) -> SimpleNamespace:
    """A run that begins with the weights with which `whole` began."""
    run = build(folder, **arguments)
    run.objects["network"].load_state_dict(whole.start)
    return run


def test_it_trains(whole):
    """The network moved, with noise in the forward pass and augmentation, or equality would mean nothing."""
    assert not torch.equal(whole.objects["network"].hidden.weight, whole.start["hidden.weight"])
    assert whole.trainer.state.iteration == 4 * STEPS


@pytest.mark.parametrize("step", [2 * STEPS, 2 * STEPS + 1, 3 * STEPS - 1])
def test_resumed_run_is_equal(whole, tmp_path, step):
    """Killed at the end of the second epoch before it was saved, or within the third: the end is the same."""
    kill_at(same_start(tmp_path, whole), step)
    assert_equal(resume(build(tmp_path)), whole)
    for name in ("model.pt", "model_final.pt"):
        ours, theirs = read_state_dict(tmp_path / name), read_state_dict(whole.folder / name)
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_resumed_run_is_equal_with_workers(tmp_path):
    """With two worker processes augmentation draws from the workers' states; they too are the epoch's."""
    runs = []
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        torch.manual_seed(2)
        run = build(folder, epochs=3, num_workers=2)
        runs.append(run)
    runs[0].checkpoint.start(False)
    runs[0].trainer.run()
    kill_at(runs[1], STEPS + 1)
    assert_equal(resume(build(tmp_path / "killed", epochs=3, num_workers=2)), runs[0])


def test_more_epochs_can_be_added(whole, tmp_path):
    """A finished run of two epochs, resumed with four, ends as the run of four."""
    run = same_start(tmp_path, whole, epochs=2)
    run.checkpoint.start(False)
    run.trainer.run()
    assert_equal(resume(build(tmp_path)), whole)


def test_last_two_are_kept(whole):
    """Checkpoints of the last two epochs, the best weights and the last ones; nothing under a temporary name."""
    assert sorted(path.name for path in (whole.folder / "checkpoints").iterdir()) == ["epoch_0003.pt", "epoch_0004.pt"]
    assert sorted(path.name for path in whole.folder.iterdir()) == ["checkpoints", "model.pt", "model_final.pt"]


def test_exports_are_the_averaged_weights(whole):
    """`model_final.pt` is the EMA's bare state dict after the last epoch."""
    state = read_state_dict(whole.folder / "model_final.pt")
    ema = whole.objects["ema"].state_dict()
    assert state.keys() == ema.keys() and all(torch.equal(state[name], ema[name]) for name in ema)
    assert not torch.equal(state["hidden.weight"], whole.objects["network"].hidden.weight)


@pytest.mark.parametrize("damage", [b"", b"<!DOCTYPE html>", b"....", None], ids=["empty", "html", "dots", "cut"])
def test_damaged_checkpoint_is_passed_over(whole, tmp_path, damage, capsys):
    """If the newest cannot be read, the one before it serves, and the end is still the same."""
    kill_at(same_start(tmp_path, whole), 3 * STEPS + 1)
    newest = tmp_path / "checkpoints" / "epoch_0003.pt"
    newest.write_bytes(newest.read_bytes()[:-500] if damage is None else damage)
    run = resume(build(tmp_path))
    assert "epoch_0002.pt" in capsys.readouterr().out
    assert_equal(run, whole)


def test_only_damaged_checkpoints_are_refused(whole, tmp_path):
    """Nothing is trained from the beginning over a run that could not be read."""
    kill_at(same_start(tmp_path, whole), 2 * STEPS + 1)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="only damaged checkpoints .epoch_0002.pt, epoch_0001.pt."):
        build(tmp_path).checkpoint.start(True)


def test_resuming_nothing_starts_from_the_beginning(whole, tmp_path, capsys):
    """`--resume True` may stand in a script that is started again and again."""
    run = same_start(tmp_path, whole)
    assert run.checkpoint.start(True) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    run.trainer.run()
    assert_equal(run, whole)


def test_used_folder_is_refused(whole):
    """Without resume, a run's checkpoints are not overwritten."""
    with pytest.raises(InputError, match="holds a run that reached epoch 4; add --resume True"):
        build(whole.folder).checkpoint.start(False)


def test_finished_run_is_not_unfinished(whole):
    """What train.json asks before it starts the trainer."""
    fresh = build(whole.folder)
    assert fresh.checkpoint.unfinished
    assert fresh.checkpoint.start(True) == 4
    assert not fresh.checkpoint.unfinished
    assert build(whole.folder, epochs=5).checkpoint.unfinished


def test_changed_epoch_is_refused(whole):
    """Another number of steps an epoch means another cohort or batch size."""
    with pytest.raises(InputError, match="made with 3 steps an epoch, this run has 4; use the same cohort"):
        build(whole.folder, scans=8).checkpoint.start(True)


@pytest.mark.parametrize(("scans", "fits"), [(6, True), (8, False)])
def test_other_number_of_processes(whole, tmp_path, scans, fits):
    """Goes on where the steps an epoch are as many, else both numbers are named; old checkpoints are of one process."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "epoch_0004.pt"
    content = torch.load(path, weights_only=True)
    assert content["processes"] == 1
    torch.save({**content, "processes": 2}, path)
    if fits:
        assert build(tmp_path, scans=scans).checkpoint.start(True) == 4
    else:
        with pytest.raises(InputError, match="by 2 processes with 3 steps an epoch, this run of 1 has 4; start as"):
            build(tmp_path, scans=scans).checkpoint.start(True)
    del content["processes"]
    torch.save(content, path)
    assert build(tmp_path).checkpoint.start(True) == 4


def test_machines_that_do_not_share_the_folder_are_told(whole, monkeypatch):
    """One process has found a checkpoint that another has not."""
    monkeypatch.setattr("scripts.run.gathered", lambda epoch: [epoch, 0])
    with pytest.raises(InputError, match=r"different epochs \(4, 0\) in .*all machines must share 'output_dir'"):
        build(whole.folder).checkpoint.start(True)


@pytest.mark.parametrize(("change", "name"), [({"width": 6}, "network"), ({"adam": True}, "optimizer")])
def test_other_configuration_is_refused(whole, change, name):
    """Another architecture or optimizer does not fit, and the sentence names which."""
    with pytest.raises(InputError, match=rf"epoch_0004.pt does not fit this configuration .{name}."):
        build(whole.folder, **change).checkpoint.start(True)


def test_worse_validation_after_resuming_keeps_the_best(tmp_path):
    """The best epoch was before the kill: `model.pt` stays that of epoch 2, the counter goes on to two."""
    scores = [0.1, 0.9, 0.5, 0.4]
    kill_at(build(tmp_path, scores=scores), 2 * STEPS + 1)
    best = (tmp_path / "model.pt").read_bytes()
    run = resume(build(tmp_path, scores=scores))
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == (0.9, 2)
    assert (run.early_stop._handler.counter, run.early_stop._handler.best_score) == (2, 0.9)
    assert (tmp_path / "model.pt").read_bytes() == best != (tmp_path / "model_final.pt").read_bytes()


def test_early_stopping_counts_on(tmp_path):
    """Two epochs without improvement before the kill and one after it end a run of patience three, with its exports."""
    scores = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    kill_at(build(tmp_path, epochs=6, patience=3, scores=scores), 3 * STEPS + 1)
    run = resume(build(tmp_path, epochs=6, patience=3, scores=scores))
    assert run.trainer.state.epoch == 4
    assert (tmp_path / "checkpoints" / "epoch_0004.pt").exists() and (tmp_path / "model_final.pt").exists()


def test_early_stopped_run_is_not_unfinished(tmp_path):
    """Resuming a run that early stopping has ended trains no further epoch."""
    scores = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
    run = build(tmp_path, epochs=6, patience=2, scores=scores)
    run.checkpoint.start(False)
    run.trainer.run()
    assert run.trainer.state.epoch == 3
    again = build(tmp_path, epochs=6, patience=2, scores=scores)
    assert again.checkpoint.start(True) == 3
    assert not again.checkpoint.unfinished


def test_run_without_validation_exports_its_last_epoch(tmp_path):
    """No validation, no best epoch: `model.pt` is the last one, also over a file of an earlier run."""
    (tmp_path / "model.pt").write_bytes(b"of an earlier run")
    run = build(tmp_path, epochs=1, val_interval=5)
    run.checkpoint.start(False)
    run.trainer.run()
    model, final = read_state_dict(tmp_path / "model.pt"), read_state_dict(tmp_path / "model_final.pt")
    assert all(torch.equal(value, final[name]) for name, value in model.items())


@pytest.mark.parametrize("left", ["nothing", "an older one"])
def test_a_kill_before_the_final_model_is_made_good(tmp_path, left):
    """The last checkpoint is there, so nothing is left to train; `model_final.pt` is missing, or of fewer epochs."""
    run = build(tmp_path, epochs=2)
    run.checkpoint.start(False)
    run.trainer.run()
    final = tmp_path / "model_final.pt"
    expected = final.read_bytes()
    final.unlink() if left == "nothing" else final.write_bytes(b"older")
    again = build(tmp_path, epochs=2)
    again.checkpoint.start(True)
    assert not again.checkpoint.unfinished
    assert final.read_bytes() == expected


def test_a_kill_before_the_oldest_checkpoint_was_removed_is_made_good(tmp_path):
    """Nothing is left to train, and two checkpoints are kept as ever."""
    run = build(tmp_path, epochs=3)
    run.checkpoint.start(False)
    run.trainer.run()
    kept = sorted((tmp_path / "checkpoints").iterdir())
    shutil.copy(kept[0], tmp_path / "checkpoints" / "epoch_0001.pt")
    build(tmp_path, epochs=3).checkpoint.start(True)
    assert sorted((tmp_path / "checkpoints").iterdir()) == kept


@pytest.mark.parametrize(
    ("step", "remedy"),
    [
        (2, "run the same command again."),
        (STEPS + 1, "add --resume True to the same command to go on after epoch 1."),
    ],
)
@pytest.mark.parametrize(("signal", "code"), [(KeyboardInterrupt(), 130), (Interrupted(exit_code=143), 143)])
def test_an_interrupted_training_says_how_to_go_on(tmp_path, step, remedy, signal, code):
    """Before the first epoch's end, and after it."""

    def interrupt(engine: Engine) -> None:
        if engine.state.iteration == step:
            raise signal

    run = build(tmp_path)
    run.checkpoint.start(False)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, interrupt)
    with pytest.raises(Interrupted) as raised:
        run.trainer.run()
    assert (str(raised.value), raised.value.exit_code) == (remedy, code)


def test_validation_every_second_epoch(tmp_path):
    """Epochs without a validation neither export nor forget the best one."""
    scores = [0.0, 0.7, 0.0, 0.6]
    run = build(tmp_path, val_interval=2, scores=scores)
    run.checkpoint.start(False)
    run.trainer.run()
    assert (run.evaluator.state.best_metric, run.evaluator.state.best_metric_epoch) == (0.7, 2)
    content = torch.load(tmp_path / "checkpoints" / "epoch_0003.pt", weights_only=True)
    assert (content["epoch"], content["best_metric"], content["best_metric_epoch"]) == (3, 0.7, 2)


def test_other_files_are_left_alone(tmp_path):
    """What is not named as a checkpoint is neither loaded nor removed."""
    (tmp_path / "checkpoints").mkdir()
    other = tmp_path / "checkpoints" / "epoch_best.pt"
    other.write_bytes(b"mine")
    run = build(tmp_path, epochs=3)
    assert run.checkpoint.start(False) == 0
    run.trainer.run()
    assert other.read_bytes() == b"mine"


def test_start_needs_attach(tmp_path):
    """A mistake of the caller's."""
    checkpoint = RunCheckpoint(str(tmp_path), {}, nn.Linear(1, 1), str(tmp_path))
    with pytest.raises(RuntimeError, match="attach"):
        _ = checkpoint.unfinished


def test_a_start_that_no_epoch_beats_is_kept(tmp_path, capsys):
    """model.pt holds the weights that the run began with, and the run says so; model_final.pt the last epoch's."""
    run = build(tmp_path, epochs=2, scores=[1.0, 2.0, 9.0])  # epochs 1, 2, and 0, which counts from the end
    start = {name: value.clone() for name, value in run.objects["network"].state_dict().items()}
    StartValidation(run.evaluator).attach(run.trainer)
    run.checkpoint.attach(run.trainer, run.evaluator, run.early_stop)
    run.checkpoint.start(False)
    run.trainer.run()
    kept, final = (read_state_dict(tmp_path / name) for name in ("model.pt", "model_final.pt"))
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    assert not all(torch.equal(final[name], value) for name, value in start.items())
    assert "no epoch was better than the start" in capsys.readouterr().out
