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
from monai.handlers import LrScheduleHandler, ValidationHandler
from monai.inferers import SimpleInferer
from monai.transforms import Compose, RandFlipd, RandGaussianNoised
from torch import nn

from scripts.networks import prepare_batch, read_state_dict
from scripts.run import InputError, Interrupted
from scripts.training import EpochSeed, MuonAdamW, RunCheckpoint, StartValidation, VAELoss, WarmEMA, batch_sampler

CPU = torch.device("cpu")
SCORES = [0.1, 0.9, 0.5, 0.4]  # of a run that is best in its second epoch
WORSE = [0.9, 0.5, 0.4, 0.3, 0.2, 0.1]
# what the next run changes, whether it resumes, and what it is told
REFUSED: list[tuple[dict[str, Any], bool, str]] = [
    ({}, False, "holds a run that reached epoch 4; add --resume True"),
    ({"scans": 8}, True, "made with 3 steps an epoch, this run has 4; use the same cohort"),
    ({"width": 6}, True, "epoch_0004.pt does not fit this configuration .network."),
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


def given(scores: Sequence[float]) -> SimpleNamespace:
    """Stands in for the key metric: the validation of epoch n gives the n-th score."""

    def attach(engine: Engine, name: str) -> None:
        completed = Events.EPOCH_COMPLETED
        engine.add_event_handler(completed, lambda e: e.state.metrics.update({name: scores[e.state.epoch - 1]}))

    return SimpleNamespace(attach=attach)


def build(
    folder: Path, *, epochs=4, width=16, scans=6, val_interval=1, patience=10, workers=0, from_0=False, scores=SCORES
) -> SimpleNamespace:
    """A training as train.json builds it, of a tiny network on random volumes, with the same weights each time."""
    generator = torch.Generator().manual_seed(5)
    records = [{"image": torch.rand(1, 8, 8, 8, generator=generator)} for _ in range(scans + 2)]
    augmentation = Compose([RandFlipd("image", 0.5, 0), RandGaussianNoised("image", prob=0.7, std=0.1)])
    dataset = Dataset(records[:scans], augmentation)
    loader = DataLoader(dataset, batch_sampler=batch_sampler(dataset.data, 2, False, 3), num_workers=workers)
    torch.manual_seed(1)
    network = TinyVAE(width)
    optimizer = MuonAdamW(network, adam_lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)
    ema = WarmEMA(network, 0.9)
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(records[scans:]), batch_size=1), ema.ema_model, prepare_batch=prepare_batch,
        inferer=SimpleInferer(), key_val_metric={"score": given(scores)},
    )  # fmt: skip
    handlers = [
        ema, *[StartValidation(evaluator)] * from_0, EpochSeed(11),
        LrScheduleHandler(schedule, print_lr=False), ValidationHandler(val_interval, evaluator),
    ]  # fmt: skip
    trainer = SupervisedTrainer(
        CPU, epochs, loader, network, optimizer, VAELoss(), prepare_batch=prepare_batch, inferer=SimpleInferer(),
        train_handlers=handlers,
    )  # fmt: skip
    objects = {"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": schedule}
    checkpoint = RunCheckpoint(str(folder / "checkpoints"), objects, ema.ema_model, str(folder))
    checkpoint.attach(trainer, evaluator, patience)
    return SimpleNamespace(trainer=trainer, evaluator=evaluator, checkpoint=checkpoint, objects=objects)


def train(run: SimpleNamespace) -> SimpleNamespace:
    """Start the run from the beginning and let it end."""
    assert run.checkpoint.start(False) == 0
    run.trainer.run()
    return run


def kill_at(run: SimpleNamespace, step: int, error: BaseException | None = None) -> Any:
    """Start the run from the beginning and end it after `step` steps; what came out of it."""

    def end(engine: Engine) -> None:
        if engine.state.iteration == step:
            raise error or KeyboardInterrupt

    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    with pytest.raises(Interrupted) as raised:
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
    ours, theirs = (
        (r.trainer.state.epoch, r.trainer.state.iteration, float(r.evaluator.state.best_metric),
         r.evaluator.state.best_metric_epoch, tensors(dict(r.checkpoint.early_stop.state_dict())))
        for r in (run, other)
    )  # fmt: skip
    assert ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of four epochs that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return SimpleNamespace(folder=folder, **vars(train(build(folder))))


def test_a_run_leaves_its_averaged_weights_and_two_checkpoints(whole: SimpleNamespace):
    """`model.pt` is of the best epoch, `model_final.pt` the EMA's state dict after the last; nothing else stays."""
    assert sorted(path.name for path in (whole.folder / "checkpoints").iterdir()) == ["epoch_0003.pt", "epoch_0004.pt"]
    assert sorted(path.name for path in whole.folder.iterdir()) == ["checkpoints", "model.pt", "model_final.pt"]
    final = read_state_dict(whole.folder / "model_final.pt")
    assert tensors(final) == tensors(dict(whole.objects["ema"].state_dict()))
    assert not torch.equal(final["hidden.weight"], whole.objects["network"].hidden.weight)  # it averages
    assert (whole.evaluator.state.best_metric, whole.evaluator.state.best_metric_epoch) == (0.9, 2)
    assert whole.checkpoint.early_stop.counter == 2
    assert (whole.folder / "model.pt").read_bytes() != (whole.folder / "model_final.pt").read_bytes()


@pytest.mark.parametrize("step", [2 * STEPS, 2 * STEPS + 1])
def test_resumed_run_is_equal(whole: SimpleNamespace, tmp_path: Path, step: int):
    """Killed at the end of the second epoch before it was saved, or within the third, after the best: the same end."""
    kill_at(build(tmp_path), step)
    assert_equal(resume(build(tmp_path)), whole)
    for name in ("model.pt", "model_final.pt"):
        assert (tmp_path / name).read_bytes() == (whole.folder / name).read_bytes()


def test_resumed_run_is_equal_with_workers(tmp_path: Path):
    """With two worker processes augmentation draws from the workers' states; they too are the epoch's."""
    kill_at(build(tmp_path / "killed", epochs=2, workers=2), STEPS + 1)
    whole = train(build(tmp_path / "whole", epochs=2, workers=2))
    assert_equal(resume(build(tmp_path / "killed", epochs=2, workers=2)), whole)


def test_more_epochs_can_be_added(whole: SimpleNamespace, tmp_path: Path):
    """A finished run of two epochs, resumed with four, ends as the run of four."""
    train(build(tmp_path, epochs=2))
    assert_equal(resume(build(tmp_path)), whole)


def test_damaged_checkpoints(whole: SimpleNamespace, tmp_path: Path):
    """The one before it serves, and the end is still the same; where there is none, nothing begins over the run."""
    kill_at(build(tmp_path), 3 * STEPS + 1)
    newest = tmp_path / "checkpoints" / "epoch_0003.pt"
    newest.write_bytes(newest.read_bytes()[:-500])
    assert_equal(resume(build(tmp_path)), whole)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="only damaged checkpoints .epoch_0004.pt, epoch_0003.pt."):
        build(tmp_path).checkpoint.start(True)


@pytest.mark.parametrize(("change", "resumes", "message"), REFUSED)
def test_another_run_is_refused(whole: SimpleNamespace, change: dict[str, Any], resumes: bool, message: str):
    """A run is not overwritten; another cohort or architecture does not fit, and the sentence names which."""
    with pytest.raises(InputError, match=message):
        build(whole.folder, **change).checkpoint.start(resumes)


def test_other_processes(whole: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Goes on where the steps an epoch are as many, else both numbers are named; all must find one epoch."""
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "epoch_0004.pt"
    torch.save({**torch.load(path, weights_only=True), "processes": 2}, path)
    assert build(tmp_path).checkpoint.start(True) == 4
    with pytest.raises(InputError, match="by 2 processes with 3 steps an epoch, this run of 1 has 4; start as"):
        build(tmp_path, scans=8).checkpoint.start(True)
    monkeypatch.setattr("scripts.training.checkpoints.gathered", lambda epoch: [epoch, 0])
    with pytest.raises(InputError, match=r"different epochs \(4, 0\) in .*all machines must share 'output_dir'"):
        build(tmp_path).checkpoint.start(True)


def test_early_stopping_counts_on(tmp_path: Path):
    """Two epochs without improvement before the kill and one after it end a run of patience three, for good."""
    kill_at(build(tmp_path, epochs=6, patience=3, scores=WORSE), 3 * STEPS + 1)
    assert resume(build(tmp_path, epochs=6, patience=3, scores=WORSE)).trainer.state.epoch == 4
    assert (tmp_path / "checkpoints" / "epoch_0004.pt").exists() and (tmp_path / "model_final.pt").exists()
    again = build(tmp_path, epochs=6, patience=3, scores=WORSE)
    assert again.checkpoint.start(True) == 4 and not again.checkpoint.unfinished


def test_run_without_validation_exports_its_last_epoch(tmp_path: Path):
    """No validation, no best epoch: `model.pt` is the last one, also over a file of an earlier run."""
    (tmp_path / "model.pt").write_bytes(b"of an earlier run")
    train(build(tmp_path, epochs=1, val_interval=5))
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "model_final.pt").read_bytes()


def test_a_kill_after_the_last_checkpoint_is_made_good(tmp_path: Path):
    """Nothing is left to train; the final model was of fewer epochs."""
    train(build(tmp_path, epochs=2))
    final, again = tmp_path / "model_final.pt", build(tmp_path, epochs=2)
    expected = final.read_bytes()
    final.write_bytes(b"of fewer epochs")
    assert again.checkpoint.start(True) == 2 and not again.checkpoint.unfinished
    assert final.read_bytes() == expected


def test_an_interrupted_training_says_how_to_go_on(tmp_path: Path):
    """Before the first epoch's end, and after it."""
    early = kill_at(build(tmp_path / "early"), 2, KeyboardInterrupt())
    late = kill_at(build(tmp_path / "late"), 4, Interrupted(exit_code=143))
    assert (str(early), early.exit_code) == ("run the same command again.", 130)
    assert build(tmp_path / "early").checkpoint.start(True) == 0  # --resume True may stand there from the beginning
    assert (str(late), late.exit_code) == ("add --resume True to the same command to go on after epoch 1.", 143)


def test_a_start_that_no_epoch_beats_is_kept(tmp_path: Path):
    """model.pt holds the weights that the run began with, model_final.pt the last epoch's."""
    run = build(tmp_path, epochs=2, from_0=True, scores=[1.0, 2.0, 9.0])  # epochs 1, 2 and 0
    start = tensors({name: value.clone() for name, value in run.objects["network"].state_dict().items()})
    train(run)
    kept, final = (tensors(read_state_dict(tmp_path / name)) for name in ("model.pt", "model_final.pt"))
    assert kept == start != final
