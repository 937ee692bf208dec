"""What TensorBoard shows beside the loss: the latent of the validation scans, hyperparameters, best, layout."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_VAE, Job
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from scripts.latents import LatentStatistics
from scripts.metrics import VolumeMetric
from scripts.networks import AutocastInferer, BrainVAE, posterior_iteration, prepare_batch
from scripts.training import LatentLog, PictureLog, RunBoard, latent_scalars
from scripts.training.tensorboard import LAYOUT

CPU = torch.device("cpu")
CHANNELS = range(4)
EPOCHS = 4
TERMS = ["loss", "l1", "kl", "mse", "equivariance", "lpips"]
LATENT = ["kl", "active_units", "mu_mean", "mu_sd", "z_sd", "sigma"]
VALIDATION = ["val_psnr_brain", "val_psnr", "val_l1", "val_kl", "val_active_units", "val_z_sd"]
PER_CHANNEL = [f"{name}_{channel}" for name in ("mu_mean", "z_sd", "sigma") for channel in CHANNELS]
SCALARS = {
    *(f"step/{name}" for name in ("learning_rate", *TERMS, "gradient_norm")),
    *(f"epoch/{name}" for name in ("learning_rate", *TERMS, "gradient_norm", *VALIDATION)),
    *(f"latent/{name}" for name in LATENT),
    *(f"latent_channels/{name}" for name in PER_CHANNEL),
    "best/val_psnr_brain",
}


def board(folder: Path) -> EventAccumulator:
    """All that the event files of a folder hold."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    return events.Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    """Step to value."""
    return {event.step: event.value for event in events.Scalars(tag)}


def hyperparameters(events: EventAccumulator) -> dict[str, HParamsPluginData]:
    """What the hyperparameter tab reads: tag to its message."""
    found = events.summary_metadata
    return {
        tag: HParamsPluginData.FromString(metadata.plugin_data.content)
        for tag, metadata in found.items()
        if metadata.plugin_data.plugin_name == "hparams"
    }


def validate(folder: Path, n_scans: int, rank: int = 0, epochs: int = 1) -> SimpleNamespace:
    """Validations of a tiny random network with a `LatentLog`."""
    torch.manual_seed(0)
    scans = [{"image": torch.rand(1, 16, 12, 16)} for _ in range(n_scans)]
    writer = SummaryWriter(str(folder))
    run = SimpleNamespace(scans=scans, network=BrainVAE(**TINY_VAE).eval())
    metric = IgniteMetricHandler(VolumeMetric("psnr"), output_transform=from_engine(["pred", "image"]))
    run.evaluator = SupervisedEvaluator(
        CPU, DataLoader(Dataset(scans), batch_size=1), run.network, prepare_batch=prepare_batch,
        iteration_update=posterior_iteration, inferer=AutocastInferer(False, CPU),
        val_handlers=[LatentLog(writer), PictureLog(writer, 2.0)], key_val_metric={"val_psnr_brain": metric},
    )  # fmt: skip
    run.evaluator.state.rank = rank
    for epoch in range(1, epochs + 1):
        run.evaluator.run(epoch)
    writer.close()
    return run


def by_hand(run: SimpleNamespace) -> dict:
    """`LatentStatistics` of the same scans."""
    statistics = LatentStatistics()
    with torch.no_grad():
        for scan in run.scans:
            mu, sigma = run.network.encode(scan["image"][None])
            statistics.update(mu[0], 2 * sigma[0].log())
    return statistics.result()


@pytest.fixture(scope="module")
def events(trained: Job) -> EventAccumulator:
    """The board of a training of four epochs."""
    return board(trained.folder / "tensorboard")


def test_training_draws_every_curve(events: EventAccumulator) -> None:
    """No curve is missing and none is unknown to the page; each has a value a step or an epoch."""
    assert set(events.Tags()["scalars"]) == SCALARS
    for tag in SCALARS:
        first = 0 if tag.startswith(("epoch/val_", "latent")) else 3 if tag.endswith("lpips") else 1
        if not tag.startswith("step/"):
            assert list(curve(events, tag)) == list(range(first, EPOCHS + 1)), tag
    assert list(curve(events, "step/loss")) == list(range(1, 3 * EPOCHS + 1))  # six scans in batches of two


def test_training_draws_histograms_and_pictures(events: EventAccumulator) -> None:
    """One of mu a channel and one picture, at each validation."""
    tags = events.Tags()
    assert set(tags["histograms"]) == {f"mu/channel_{channel}" for channel in CHANNELS}
    assert tags["images"] == ["reconstruction"]
    for drawn in (events.Histograms("mu/channel_0"), events.Images("reconstruction")):
        assert [event.step for event in drawn] == list(range(EPOCHS + 1))


def test_table_and_board_agree(trained: Job, events: EventAccumulator) -> None:
    """metrics.csv has the values of the curves, and the best is the best of them."""
    table = pd.read_csv(trained.folder / "metrics.csv", index_col="epoch")
    for name in table:
        assert table[name].dropna().to_dict() == pytest.approx(curve(events, f"epoch/{name}"), rel=1e-6)
    assert curve(events, "best/val_psnr_brain")[EPOCHS] == pytest.approx(table["val_psnr_brain"].max(), rel=1e-6)


def test_hyperparameters_stand_in_the_folder_of_the_run(trained: Job, events: EventAccumulator) -> None:
    """No second run beside it; every key of the config's list; the figures to compare have curves."""
    assert all(path.is_file() for path in (trained.folder / "tensorboard").iterdir())
    found = hyperparameters(events)
    assert len(found) == 3
    values = found["_hparams_/session_start_info"].session_start_info.hparams
    config = json.loads((ROOT / "configs" / "train.json").read_text())
    assert set(values) == set(config["hyperparameters"])
    assert values["optimizer"].string_value == "MuonAdamW" and values["channels"].string_value == "[4, 8]"
    assert values["kl_weight"].number_value == 3e-4
    assert (values["train_scans"].number_value, values["val_scans"].number_value) == (6, 2)
    compared = [info.name.tag for info in found["_hparams_/experiment"].experiment.metric_infos]
    assert "best/val_psnr_brain" in compared and set(compared) <= SCALARS


def test_every_curve_of_the_layout_exists(events: EventAccumulator) -> None:
    """TensorBoard matches its expressions from a tag's first character."""
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    for category in layout.category:
        for chart in category.chart:
            assert all(any(re.match(expression, tag) for tag in SCALARS) for expression in chart.multiline.tag)


def test_latent_is_that_of_the_validation_scans(tmp_path: Path) -> None:
    """Curves and metrics equal `LatentStatistics` of the scans' posteriors; a second validation begins anew."""
    run = validate(tmp_path, 3, epochs=2)
    expected, events = by_hand(run), board(tmp_path)
    for epoch in (1, 2):
        assert curve(events, "latent/kl")[epoch] == pytest.approx(expected["kl"], rel=1e-6)
        assert curve(events, "latent/active_units")[epoch] == pytest.approx(expected["active_units"], rel=1e-6)
        for channel in CHANNELS:
            values = [curve(events, f"latent_channels/{name}_{channel}")[epoch] for name in ("mu_mean", "z_sd")]
            assert values == pytest.approx([expected["mu"]["mean"][channel], expected["z"]["sd"][channel]], rel=1e-6)
    metrics = run.evaluator.state.metrics
    assert metrics["val_z_sd"] == pytest.approx(expected["z"]["sd_overall"], rel=1e-6)
    assert metrics["val_kl"] == pytest.approx(expected["kl"], rel=1e-6)


def test_sigma_is_the_root_mean_square() -> None:
    """It follows from the variances of z and mu, overall and in each channel."""
    statistics = LatentStatistics()
    mu, logvar = torch.randn(2, 4, 5, 6, 7), torch.randn(2, 4, 5, 6, 7) - 4
    for index in range(2):
        statistics.update(mu[index], logvar[index])
    scalars = latent_scalars(statistics.result())
    variance = logvar.double().exp()
    assert scalars["latent/sigma"] == pytest.approx(variance.mean().sqrt().item(), rel=1e-9)
    for channel in CHANNELS:
        expected = variance[:, channel].mean().sqrt().item()
        assert scalars[f"latent_channels/sigma_{channel}"] == pytest.approx(expected, rel=1e-9)


def test_one_scan_has_no_active_units(tmp_path: Path) -> None:
    """Whether a unit varies shows with two scans; the other curves need one."""
    run = validate(tmp_path, 1)
    assert "latent/active_units" not in board(tmp_path).Tags()["scalars"]
    assert {"val_kl", "val_z_sd"} <= run.evaluator.state.metrics.keys()
    assert "val_active_units" not in run.evaluator.state.metrics


def test_histogram_and_picture_are_of_the_first_scan(tmp_path: Path) -> None:
    """All values of its mu by channel, and one picture in colour; the second is not drawn."""
    run = validate(tmp_path, 2)
    events = board(tmp_path)
    with torch.no_grad():
        mu, _ = run.network.encode(run.scans[0]["image"][None])
    for channel in CHANNELS:
        histogram = events.Histograms(f"mu/channel_{channel}")[0].histogram_value
        assert histogram.num == mu[0, channel].numel()
        assert np.isclose(histogram.min, mu[0, channel].min()) and np.isclose(histogram.max, mu[0, channel].max())
    (picture,) = events.Images("reconstruction")
    pixels = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    assert pixels.shape == (picture.height, picture.width, 3) and pixels.max() > 100


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    """Only rank 0 writes to the board."""
    run = validate(tmp_path, 2, rank=1)
    whole_run(tmp_path, run, {"seed": 0}, epochs=1, rank=1)
    tags = board(tmp_path).Tags()
    assert not any(tags[kind] for kind in ("scalars", "histograms", "images", "tensors"))


def whole_run(folder: Path, run: SimpleNamespace, values: dict[str, Any], epochs: int, rank: int = 0) -> None:
    """A `RunBoard` through some epochs of an engine that does nothing."""
    writer, engine = SummaryWriter(str(folder)), Engine(lambda engine, batch: None)
    engine.state.rank = rank
    RunBoard(writer, run.evaluator, values).attach(engine)
    engine.run([0], max_epochs=epochs)
    writer.close()


def test_values_of_hyperparameters(tmp_path: Path) -> None:
    """Numbers stay numbers; switches, lists and None are texts, so that a column has one type in every run."""
    values = {"rate": 0.5, "epochs": 3, "augment": True, "amp": "False", "label": None, "channels": [1, 2]}
    whole_run(tmp_path / "board", validate(tmp_path / "run", 1), values, epochs=2)
    assert list(curve(board(tmp_path / "board"), "best/val_psnr_brain")) == [1]  # only epoch 1 is validated
    written = hyperparameters(board(tmp_path / "board"))["_hparams_/session_start_info"].session_start_info.hparams
    assert (written["rate"].number_value, written["epochs"].number_value) == (0.5, 3)
    texts = [written[name].string_value for name in ("augment", "amp", "label", "channels")]
    assert texts == ["True", "False", "None", "[1, 2]"]
