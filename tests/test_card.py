"""The card, metadata.json and the measurements that they quote say the same, about the weights that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from scripts.metrics import format_table
from scripts.run import file_sha256

CARD = ROOT / "docs" / "README.md"
MEASURED = ROOT / "docs" / "evaluation"
EVALUATIONS = sorted(path for path in MEASURED.glob("*.json") if path.stem != "latent_stats")
SHOWN_FREQUENCIES = (0.005, 0.015, 0.025, 0.045, 0.065, 0.105, 0.155, 0.205, 0.255, 0.305)  # cycles per mm


def test_there_are_evaluations() -> None:
    """Brain-extracted scans and whole heads, apart, and scans of no scanner of the training."""
    assert [path.stem for path in EVALUATIONS] == ["demo", "ds000011", "ds002748", "ds002748_altered"]


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_the_card_shows_the_evaluation(path: Path) -> None:
    """The table of the card is the one that the evaluation printed."""
    content = json.loads(path.read_text())
    table = format_table(
        content["systems"],
        split=content["split"],
        weights_sha256=content["weights_sha256"],
        command=content["command"],
    )
    assert table in CARD.read_text()


@pytest.mark.parametrize(("cohort", "picture"), [("ds002748", "worst_brain"), ("ds000011", "worst_head")])
def test_the_card_shows_the_worst_scan(cohort: str, picture: str) -> None:
    """By PSNR in the brain, as the evaluation found it."""
    worst = json.loads((MEASURED / f"{cohort}.json").read_text())["systems"]["model"]["psnr_brain"]["worst_name"]
    caption = f"{worst.removesuffix('_T1w')} of {cohort}, its reconstruction and the difference"
    assert f"![{caption}](images/{picture}.png)" in CARD.read_text()


@pytest.mark.parametrize("path", [*EVALUATIONS, MEASURED / "latent_stats.json"], ids=lambda path: path.stem)
def test_the_measurement_is_of_the_shipped_weights(path: Path) -> None:
    """By sha256."""
    assert json.loads(path.read_text())["weights_sha256"] == file_sha256(ROOT / "models" / "model.pt")


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_metadata_quotes_the_evaluation(path: Path) -> None:
    """eval_metrics holds the means of the model, by cohort."""
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    means = {column: figures["mean"] for column, figures in json.loads(path.read_text())["systems"]["model"].items()}
    assert metadata["eval_metrics"][path.stem] == {column: pytest.approx(mean) for column, mean in means.items()}


def test_the_card_shows_the_statistics_of_the_latent() -> None:
    """By channel; none is dead, and the KL and the share of active units are those that encoding found."""
    content = json.loads((MEASURED / "latent_stats.json").read_text())
    columns = content["mu"]["mean"], content["mu"]["sd"], content["z"]["sd"], content["scale_factor"]["channel"]
    for number, (mean, sd, z_sd, scale) in enumerate(zip(*columns, strict=True)):
        assert f"| {number} | {mean:.2f} | {sd:.2f} | {z_sd:.2f} | {scale:.3f} |\n" in CARD.read_text()
        assert sd > 0.1
    overall = content["mu"]["mean_overall"], content["mu"]["sd_overall"], content["z"]["sd_overall"]
    row = " | ".join(f"{value:.2f}" for value in overall)
    assert f"| overall | {row} | {content['scale_factor']['overall']:.3f} |\n" in CARD.read_text()
    sentence = f"KL {content['kl']:.2f} nats a value, active units {content['active_units']:.3f}"
    assert sentence in CARD.read_text()


def test_the_card_shows_the_spectra() -> None:
    """Every other line or so of `spectrum.csv`."""
    spectra = pd.read_csv(MEASURED / "ds002748_spectrum.csv").set_index("frequency")
    for frequency in SHOWN_FREQUENCIES:
        image, model, latent = spectra.loc[frequency, ["image", "model", "latent"]]
        cell = "" if pd.isna(latent) else f"{latent:.3g}"
        assert f"| {frequency:.3f} | {image:.3g} | {model:.3g} | {cell} |\n" in CARD.read_text()
