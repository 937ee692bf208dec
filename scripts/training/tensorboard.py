"""What TensorBoard shows of a training beside its loss: the latent, a picture, and the run as a whole.

`train.json` lists `LatentLog` and `PictureLog` in `validate#handlers` and `RunBoard` in `train#handlers`. The latent's
statistics are those of `encode.json`, of the validation scans, so that the curves end at the figures of the encoded
cohort.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from scripts.latents import LatentStatistics
from scripts.report import figure_to_array, recon_panel
from scripts.run import gathered

__all__ = ["LatentLog", "PictureLog", "RunBoard", "latent_scalars"]

COMPARED = ["epoch/loss", "latent/kl", "latent/active_units", "latent/z_sd"]
# Chart to the regular expressions of its tags, which TensorBoard matches from the tag's first character.
LAYOUT = {
    "Reconstruction": {
        "PSNR in dB: in the foreground, its best, everywhere": [
            "epoch/val_psnr_brain$",
            "best/val_psnr_brain$",
            "epoch/val_psnr$",
        ],
        "mean absolute error: training, validation": ["epoch/l1$", "epoch/val_l1$"],
    },
    "Latent": {
        "KL in nats per value: training, validation": ["epoch/kl$", "latent/kl$"],
        "share of active units": ["latent/active_units$"],
        "standard deviation of z: overall, by channel": ["latent/z_sd$", "latent_channels/z_sd_"],
        "mean of mu: overall, by channel": ["latent/mu_mean$", "latent_channels/mu_mean_"],
        "posterior sigma: overall, by channel": ["latent/sigma$", "latent_channels/sigma_"],
    },
    "Optimization": {
        "loss, weighted sum": ["epoch/loss$"],
        "gradient norm before clipping": ["step/gradient_norm$"],
        "learning rate": ["step/learning_rate$"],
    },
}


class LatentLog:
    """The posterior of the validation scans, once a validation: scalars, histograms of mu, columns of `metrics.csv`.

    The evaluator keeps mu and logvar (`posterior_iteration`), so nothing is encoded twice. Three of the figures join
    the evaluator's metrics: `val_kl`, `val_z_sd` and, with two scans or more, `val_active_units`. In several
    processes they are those of all their scans, and the histograms those of the first scan of all.

    Args:
        writer: TensorBoard's writer; used in the first process only.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer
        self.statistics = LatentStatistics()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose outputs hold `mu` and `logvar`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._clear)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._scan)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._validation)

    def _clear(self, engine: Engine) -> None:
        self.statistics = LatentStatistics()

    def _scan(self, engine: Engine) -> None:
        for output in engine.state.output:
            self.statistics.update(output["mu"].detach(), output["logvar"].detach())
        if engine.state.rank != 0:
            return
        if engine.state.iteration == 1:  # one scan shows the shape of the distribution; all would have to be kept
            for channel, mu in enumerate(engine.state.output[0]["mu"].detach().float().cpu()):
                self.writer.add_histogram(f"mu/channel_{channel}", np.asarray(mu), engine.state.epoch)

    def _validation(self, engine: Engine) -> None:
        statistics = LatentStatistics()
        for share in gathered(self.statistics):
            statistics.merge(share)
        scalars = latent_scalars(statistics.result())
        for tag, value in scalars.items() if engine.state.rank == 0 else ():
            self.writer.add_scalar(tag, value, engine.state.epoch)
        for name in ("kl", "active_units", "z_sd"):
            if f"latent/{name}" in scalars:
                engine.state.metrics[f"val_{name}"] = scalars[f"latent/{name}"]


class RunBoard:
    """What TensorBoard knows of a run as a whole: its hyperparameters, its best validation, its charts' layout.

    The hyperparameters stand in the run's own folder (`SummaryWriter.add_hparams` would make a second run beside it).
    A resumed run repeats them; TensorBoard keeps those that it read first.

    Args:
        writer: TensorBoard's writer; used in the first process only.
        evaluator: MONAI's evaluator, for its best key metric.
        hyperparameters: name to value; what is neither a number nor a text is written as text.
    """

    def __init__(self, writer: SummaryWriter, evaluator: Engine, hyperparameters: Mapping[str, Any]) -> None:
        self.writer, self.evaluator = writer, evaluator
        values = {name: _as_hyperparameter(value) for name, value in hyperparameters.items()}
        compared = dict.fromkeys([f"best/{evaluator.state.key_metric_name}", *COMPARED], 0.0)  # only the names count
        self.experiment, self.start, self.end = hparams(values, compared)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after its validation."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._best)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _start(self, engine: Engine) -> None:
        if engine.state.rank != 0:
            return
        charts = {group: {title: ["Multiline", tags] for title, tags in LAYOUT[group].items()} for group in LAYOUT}
        self.writer.add_custom_scalars(charts)
        self._write(self.experiment, self.start)

    def _best(self, engine: Engine) -> None:
        state = self.evaluator.state
        if engine.state.rank == 0 and state.epoch == engine.state.epoch:  # a validation ran in this epoch
            self.writer.add_scalar(f"best/{state.key_metric_name}", float(state.best_metric), engine.state.epoch)

    def _end(self, engine: Engine) -> None:
        if engine.state.rank == 0:
            self._write(self.end)

    def _write(self, *summaries: Any) -> None:
        files: Any = self.writer.file_writer
        for summary in summaries:
            files.add_summary(summary)
        self.writer.flush()


def latent_scalars(statistics: Mapping[str, Any]) -> dict[str, float]:
    """The figures that are drawn as curves.

    Args:
        statistics: what `LatentStatistics.result` returns.

    Returns:
        Tag to value: `latent/...` over all channels, `latent_channels/..._<channel>` for each. `sigma` is the root
        mean square of the posterior's standard deviation. `latent/active_units` is left out for a single scan.
    """
    mu, z = statistics["mu"], statistics["z"]
    scalars = {
        "latent/kl": statistics["kl"],
        "latent/mu_mean": mu["mean_overall"],
        "latent/mu_sd": mu["sd_overall"],
        "latent/z_sd": z["sd_overall"],
        "latent/sigma": _noise(z["sd_overall"], mu["sd_overall"]),
    }
    if statistics["active_units"] is not None:
        scalars["latent/active_units"] = statistics["active_units"]
    for channel, (mean, mu_sd, z_sd) in enumerate(zip(mu["mean"], mu["sd"], z["sd"], strict=True)):
        scalars[f"latent_channels/mu_mean_{channel}"] = mean
        scalars[f"latent_channels/z_sd_{channel}"] = z_sd
        scalars[f"latent_channels/sigma_{channel}"] = _noise(z_sd, mu_sd)
    return scalars


def _noise(z_sd: float, mu_sd: float) -> float:
    """The variance of z is that of mu and the mean of sigma^2."""
    return math.sqrt(max(z_sd**2 - mu_sd**2, 0.0))


def _as_hyperparameter(value: Any) -> float | int | str:
    # A bool is an int in Python, and TensorBoard would show it as 0 or 1.
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


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
