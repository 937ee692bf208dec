"""The card, metadata.json and the evaluations that they quote say the same, about the weights that are shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.files import file_sha256
from scripts.metrics import format_table

EVALUATIONS = sorted((ROOT / "docs" / "evaluation").glob("*.json"))


def test_there_are_evaluations() -> None:
    """Brain-extracted scans and whole heads, apart."""
    assert [path.stem for path in EVALUATIONS] == ["ds000011", "ds002748"]


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
    assert table in (ROOT / "docs" / "README.md").read_text()


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_the_evaluation_is_of_the_shipped_weights(path: Path) -> None:
    """By sha256."""
    assert json.loads(path.read_text())["weights_sha256"] == file_sha256(ROOT / "models" / "model.pt")


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_metadata_quotes_the_evaluation(path: Path) -> None:
    """eval_metrics holds the means of the model, by cohort."""
    metadata = json.loads((ROOT / "configs" / "metadata.json").read_text())
    means = {column: figures["mean"] for column, figures in json.loads(path.read_text())["systems"]["model"].items()}
    assert metadata["eval_metrics"][path.stem] == {column: pytest.approx(mean) for column, mean in means.items()}
