"""What TensorBoard shows beside the loss: the latent of the validation scans, hyperparameters, best, layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_VAE, Job
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from scripts.latents import LatentStatistics
from scripts.networks import AutocastInferer, BrainVAE, posterior_iteration, prepare_batch
from scripts.training import LatentLog

CPU = torch.device("cpu")
CHANNELS = range(4)
EPOCHS = 4
STEP = ["learning_rate", "loss", "l1", "kl", "mse", "equivariance", "lpips", "gradient_norm"]
LATENT = ["kl", "active_units", "mu_mean", "mu_sd", "z_sd", "sigma"]
VALIDATION = ["val_psnr_brain", "val_psnr", "val_l1", "val_kl", "val_active_units", "val_z_sd"]
SCALARS = {
    "best/val_psnr_brain", *(f"step/{name}" for name in STEP), *(f"epoch/{name}" for name in STEP + VALIDATION),
    *(f"latent/{name}" for name in LATENT),
    *(f"latent_channels/{name}_{channel}" for name in ("mu_mean", "z_sd", "sigma") for channel in CHANNELS),
}  # fmt: skip


def board(folder: Path) -> EventAccumulator:
    """All that the event files of a folder hold."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Step to value."""
    return {event.step: event.value for event in events.Scalars(tag)}


def validate(folder: Path) -> SimpleNamespace:
    """Two validations of a tiny random network on three scans with a `LatentLog`."""
    torch.manual_seed(0)
    scans = [{"image": torch.rand(1, 16, 12, 16)} for _ in range(3)]
    network, writer = BrainVAE(**TINY_VAE).eval(), SummaryWriter(str(folder))
    evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(scans), batch_size=1), network, prepare_batch=prepare_batch,
        iteration_update=posterior_iteration, inferer=AutocastInferer(False, CPU), val_handlers=[LatentLog(writer)],
    )  # fmt: skip
    for epoch in (1, 2):
        evaluator.run(epoch)
    writer.close()
    return SimpleNamespace(scans=scans, network=network, metrics=evaluator.state.metrics)


@pytest.fixture(scope="module")
def events(trained: Job) -> EventAccumulator:
    """The board of a training of four epochs."""
    return board(trained.folder / "tensorboard")


def test_training_draws_every_curve(events: EventAccumulator) -> None:
    """No curve is missing, none unknown; a value a step or an epoch; histograms and a picture at each validation."""
    assert set(events.Tags()["scalars"]) == SCALARS
    for tag in SCALARS:
        first = 0 if tag.startswith(("epoch/val_", "latent")) else 3 if tag.endswith("lpips") else 1
        if not tag.startswith("step/"):
            assert list(curve(events, tag)) == list(range(first, EPOCHS + 1)), tag
    assert list(curve(events, "step/loss")) == list(range(1, 3 * EPOCHS + 1))  # six scans in batches of two
    for drawn in (*(events.Histograms(f"mu/channel_{c}") for c in CHANNELS), events.Images("reconstruction")):
        assert [event.step for event in drawn] == list(range(EPOCHS + 1))


def test_hyperparameters_stand_in_the_folder_of_the_run(trained: Job, events: EventAccumulator) -> None:
    """No second run beside it; every key of the config's list; the figures to compare have curves."""
    assert all(path.is_file() for path in (trained.folder / "tensorboard").iterdir())
    found = {
        tag: HParamsPluginData.FromString(metadata.plugin_data.content)
        for tag, metadata in events.summary_metadata.items()
        if metadata.plugin_data.plugin_name == "hparams"
    }
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    config = json.loads((ROOT / "configs" / "train.json").read_text())
    assert set(values) == set(config["hyperparameters"])
    assert values["optimizer"].string_value == "MuonAdamW" and values["channels"].string_value == "[4, 8]"
    assert (values["kl_weight"].number_value, values["train_scans"].number_value) == (3e-4, 6)
    compared = [info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos]
    assert "best/val_psnr_brain" in compared and set(compared) <= SCALARS


def test_latent_is_that_of_the_validation_scans(tmp_path: Path) -> None:
    """Curves and metrics equal `LatentStatistics` of the scans' posteriors, sigma the root mean square; a second
    validation begins anew."""
    run, statistics, variances = validate(tmp_path), LatentStatistics(), []
    for scan in run.scans:
        with torch.no_grad():
            mu, sigma = run.network.encode(scan["image"][None])
        statistics.update(mu[0], 2 * sigma[0].log())
        variances.append(sigma[0].double() ** 2)
    expected, events, variance = statistics.result(), board(tmp_path), torch.stack(variances)
    for epoch in (1, 2):
        values = [curve(events, f"latent/{name}")[epoch] for name in ("kl", "active_units", "sigma")]
        overall = [expected["kl"], expected["active_units"], variance.mean().sqrt().item()]
        assert values == pytest.approx(overall, rel=1e-5)
        for channel in CHANNELS:
            tags = [f"latent_channels/{name}_{channel}" for name in ("mu_mean", "z_sd", "sigma")]
            values = [curve(events, tag)[epoch] for tag in tags]
            noise = variance[:, channel].mean().sqrt().item()
            own = [expected["mu"]["mean"][channel], expected["z"]["sd"][channel], noise]
            assert values == pytest.approx(own, rel=1e-5)
    assert run.metrics["val_z_sd"] == pytest.approx(expected["z"]["sd_overall"], rel=1e-6)
    assert run.metrics["val_kl"] == pytest.approx(expected["kl"], rel=1e-6)
