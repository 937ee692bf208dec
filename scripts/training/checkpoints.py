"""Training runs that survive being killed: save at every epoch's end, go on exactly where the run stood.

`train.json` builds one `RunCheckpoint` and attaches it in `run`, after all other handlers, so that what it saves is
the state after them. Random states are not stored: `EpochSeed` derives them from the seed and the epoch, so a resumed
run draws the same numbers as one that was never interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import EarlyStopping
from torch import nn

from scripts.networks import UNREADABLE, is_packed
from scripts.run import InputError, Interrupted, gathered, replacing

__all__ = ["RunCheckpoint"]

KEPT = 2
PATTERN = re.compile(r"epoch_(\d+)\.pt")
PARTS: dict[str, Any] = {  # of a whole checkpoint, and their types
    "epoch": int,
    "epoch_length": int,
    "objects": dict,
    "best_metric": float,
    "best_metric_epoch": int,
    "early_stop": (dict, type(None)),
}


class RunCheckpoint:
    """Save, resume and export one training run.

    `<folder>/epoch_NNNN.pt` holds everything, the last two are kept, so that a kill during a save loses nothing.
    `<model_dir>/model.pt` is the bare state dict of the best validation, the start's (epoch 0) included, and
    `model_final.pt` that of the last epoch.

    Args:
        folder: folder of the run's checkpoints.
        objects: what has `state_dict` and `load_state_dict` and must go on: network, EMA, optimizer, scheduler.
        model: the weights to export (the EMA's network).
        model_dir: folder of `model.pt` and `model_final.pt`.
    """

    def __init__(self, folder: str, objects: Mapping[str, Any], model: nn.Module, model_dir: str) -> None:
        self.folder = Path(folder)
        self.objects = dict(objects)
        self.model = model
        self.model_dir = Path(model_dir)
        self.trainer: Engine | None = None
        self.evaluator: Engine | None = None
        self.early_stop: EarlyStopping | None = None

    def attach(self, trainer: Engine, evaluator: Engine, patience: int = 0) -> None:
        """Save after every epoch of `trainer`.

        Args:
            trainer: MONAI's trainer.
            evaluator: MONAI's evaluator, whose key metric chooses `model.pt`.
            patience: validations without a better key metric after which the run ends; 0 for never.
        """
        self.trainer, self.evaluator = trainer, evaluator
        if patience:
            self.early_stop = EarlyStopping(patience, _key_metric, trainer)
            evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.early_stop)
        trainer.add_event_handler(Events.STARTED, self._keep_start)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save)
        trainer.add_event_handler(Events.COMPLETED, self._save_final)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self._explain)

    def start(self, resume: bool) -> int:
        """Load the newest whole checkpoint of the folder, or make sure that there is none to be overwritten.

        Args:
            resume: whether to go on with the run in `folder`; where there is none, the run starts from the beginning.

        Returns:
            The number of epochs already done.

        Raises:
            InputError: the folder holds a run and `resume` is False; or no checkpoint fits or can be read; or the
                processes of the run do not see the same folder.
        """
        epoch = self._start(resume)
        epochs = gathered(epoch)
        if len(set(epochs)) > 1:
            seen = ", ".join(map(str, epochs))
            raise InputError(
                f"the processes found checkpoints of different epochs ({seen}) in {self.folder}; "
                "all machines must share 'output_dir'."
            )
        return epoch

    @property
    def unfinished(self) -> bool:
        """Whether epochs are left to train; none are where early stopping has ended the run."""
        state = self._engines()[0].state
        if self.early_stop is not None and self.early_stop.counter >= self.early_stop.patience:
            return False
        return state.epoch < state.max_epochs

    def _start(self, resume: bool) -> int:
        found = self._found()
        if not resume:
            if found:
                raise InputError(
                    f"{self.folder} holds a run that reached epoch {max(found)}; add --resume True to go on with it, "
                    "or give another --output_dir."
                )
            return 0
        damaged = []
        for epoch in sorted(found, reverse=True):
            try:
                content = {} if is_packed(found[epoch]) else torch.load(found[epoch], "cpu", weights_only=True)
            except UNREADABLE:
                content = {}
            if not _is_whole(content):
                damaged.append(found[epoch].name)
                continue
            self._load(content, found[epoch])
            if not self.unfinished:  # a kill after the last checkpoint has left no or an older final model
                self._save_final(self._engines()[0])
                self._remove_old()
            print(f"going on after epoch {epoch} ({found[epoch].name})")
            return epoch
        if damaged:
            raise InputError(f"{self.folder} holds only damaged checkpoints ({', '.join(damaged)}); delete it.")
        print(f"{self.folder} holds no checkpoint yet: starting from the beginning")
        return 0

    def _found(self) -> dict[int, Path]:
        matches = {path: PATTERN.fullmatch(path.name) for path in self.folder.glob("epoch_*.pt")}
        return {int(match.group(1)): path for path, match in matches.items() if match}

    def _engines(self) -> tuple[Engine, Engine]:
        if self.trainer is None or self.evaluator is None:
            raise RuntimeError("attach() the checkpoint to the trainer first")
        return self.trainer, self.evaluator

    def _load(self, content: dict[str, Any], path: Path) -> None:
        trainer, evaluator = self._engines()
        before, now = content.get("processes", 1), idist.get_world_size()
        if content["epoch_length"] != trainer.state.epoch_length and before != now:
            raise InputError(
                f"{path} was made by {before} processes with {content['epoch_length']} steps an epoch, this run of "
                f"{now} has {trainer.state.epoch_length}; start as many processes as before, or change 'batch_size' "
                "so that the steps are as many."
            )
        if content["epoch_length"] != trainer.state.epoch_length:
            raise InputError(
                f"{path} was made with {content['epoch_length']} steps an epoch, this run has "
                f"{trainer.state.epoch_length}; use the same cohort, split and batch size, or another --output_dir."
            )
        try:
            for name, item in self.objects.items():
                item.load_state_dict(content["objects"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not fit this configuration ({name}); use the config that began the run, or another "
                "--output_dir."
            ) from error
        trainer.state.epoch = content["epoch"]
        trainer.state.iteration = content["epoch"] * content["epoch_length"]
        evaluator.state.best_metric = content["best_metric"]
        evaluator.state.best_metric_epoch = content["best_metric_epoch"]
        if self.early_stop is not None and content["early_stop"] is not None:
            self.early_stop.load_state_dict(content["early_stop"])

    def _keep_start(self, engine: Engine) -> None:
        """The weights of a start that has been validated are the best until an epoch is better."""
        if engine.state.rank == 0 and engine.state.iteration == 0 and self._engines()[1].state.best_metric_epoch == 0:
            self._export("model.pt")

    def _save(self, engine: Engine) -> None:
        _, evaluator = self._engines()
        if engine.state.rank != 0:
            return
        epoch = engine.state.epoch
        if evaluator.state.best_metric_epoch == epoch:
            self._export("model.pt")
        content = {
            "epoch": epoch,
            "epoch_length": engine.state.epoch_length,
            "processes": idist.get_world_size(),
            "objects": {name: item.state_dict() for name, item in self.objects.items()},
            "best_metric": float(evaluator.state.best_metric),
            "best_metric_epoch": evaluator.state.best_metric_epoch,
            "early_stop": None if self.early_stop is None else dict(self.early_stop.state_dict()),
        }
        # Into a stream: given a path, torch writes the temporary name, and so the computer's, into the file.
        with replacing(self.folder / f"epoch_{epoch:04d}.pt") as temporary, temporary.open("wb") as stream:
            torch.save(content, stream)
        self._remove_old()

    def _remove_old(self) -> None:
        found = self._found()
        for old in sorted(found)[:-KEPT]:
            found[old].unlink(missing_ok=True)

    def _save_final(self, engine: Engine) -> None:
        if engine.state.rank != 0:
            return
        self._export("model_final.pt")
        best = self._engines()[1].state.best_metric_epoch
        if best == -1:  # no validation has run
            self._export("model.pt")
        if best == 0:
            print(f"no epoch was better than the start: {self.model_dir / 'model.pt'} holds the weights it began with")

    def _explain(self, engine: Engine, error: BaseException) -> None:
        """Pass an error on; an interruption with what is kept of the run."""
        if isinstance(error, KeyboardInterrupt):
            code, found = getattr(error, "exit_code", 130), self._found()
            remedy = f"add --resume True to the same command to go on after epoch {max(found)}." if found else ""
            raise (Interrupted(remedy, code) if remedy else Interrupted(exit_code=code)) from error
        raise error

    def _export(self, name: str) -> None:
        state = {key: value.detach().cpu().contiguous() for key, value in self.model.state_dict().items()}
        with replacing(self.model_dir / name) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)


def _key_metric(evaluator: Engine) -> float:
    return float(evaluator.state.metrics[evaluator.state.key_metric_name])


def _is_whole(content: Any) -> bool:
    return isinstance(content, dict) and all(
        part in content and isinstance(content[part], kind) for part, kind in PARTS.items()
    )
