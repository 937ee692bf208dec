"""The charts of a report: every volume counted and in its place, colours that follow the page, the same bytes."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scripts.report import cumulative_charts, curve_charts, distribution_charts, spectrum_chart
from scripts.report.charts import INK

N = 12
FRAME = pd.DataFrame(
    {
        "system": ["model"] * N + ["dct"] * N,
        "label": (["patient"] * 4 + ["control"] * 8) * 2,
        "psnr": np.linspace(20, 31, 2 * N),
        "l1": np.linspace(0.03, 0.01, 2 * N),
        "kl": [1.0] * N + [np.nan] * N,
    }
)
MODEL = FRAME[FRAME["system"] == "model"]
EPOCHS = pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, np.nan, 1.0], "val_l1": [np.nan] * 3})
SPECTRA = pd.DataFrame({"frequency": [0.1, 0.2, 0.3], "image": [9.0, 4.0, 1.0], "latent": [9.0, 2.0, np.nan]})
CHARTS = {
    "distribution": lambda: distribution_charts(MODEL, ["psnr", "l1", "kl"], "label"),
    "cumulative": lambda: cumulative_charts(FRAME, {"psnr": True, "l1": False, "kl": False}, ["model", "dct"]),
    "curve": lambda: curve_charts(EPOCHS, "epoch", ["loss", "val_l1"]),
    "spectrum": lambda: [spectrum_chart(SPECTRA)],
}
# a figure of one system is no comparison, a curve without values is none
COUNTS = {"distribution": 3, "cumulative": 2, "curve": 1, "spectrum": 1}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the charts made in a test, before they are text."""
    made: list[Figure] = []
    monkeypatch.setattr("scripts.report.charts._svg", lambda figure: made.append(figure) or "")
    return made


def points(figure: Figure) -> list[list[list[float]]]:
    """Of every line of a chart."""
    return [np.asarray(line.get_xydata()).tolist() for line in figure.axes[0].lines]


@pytest.mark.parametrize("kind", CHARTS)
def test_texts_take_the_pages_colour(kind: str) -> None:
    """Black or white would vanish in one of the page's two modes; and the same data give the same bytes."""
    charts = CHARTS[kind]()
    assert len(charts) == COUNTS[kind] and CHARTS[kind]() == charts
    for _, svg in charts:
        assert svg.startswith("<svg") and "currentColor" in svg and INK not in svg
        assert not re.search(r"fill: *#(000000|ffffff)", svg)


def test_not_finite_volumes_are_counted(figures: list[Figure]) -> None:
    """They are left out of points and median, and the caption says how many; a group is named with its size."""
    (caption, _), *_ = distribution_charts(MODEL.assign(psnr=[np.inf, np.nan, *range(N - 2)]), ["psnr"])
    assert caption == f"psnr of {N - 2} volumes, the line is the median; 2 not finite"
    distribution_charts(MODEL, ["psnr"], "label")
    assert [label.get_text() for label in figures[1].axes[0].get_yticklabels()] == ["control (8)", "patient (4)"]
    dots, median = points(figures[0])
    assert [x for x, _ in dots] == list(range(N - 2)) and [x for x, _ in median] == [4.5, 4.5]


@pytest.mark.parametrize(("column", "more_is_better", "best"), [("psnr", True, "max"), ("l1", False, "min")])
def test_a_share_of_volumes_is_at_least_that_good(
    figures: list[Figure], column: str, more_is_better: bool, best: str
) -> None:
    """From one volume, the best, to all of them at the worst; the better end is on the left."""
    cumulative_charts(FRAME, {column: more_is_better}, ["model", "dct"])
    for line, (_, rows) in zip(points(figures[0]), FRAME.groupby("system", sort=False), strict=True):
        assert line[0] == [getattr(rows[column], best)(), pytest.approx(1 / N)] and line[-1][1] == 1
        assert [x for x, _ in line] == sorted(rows[column], reverse=more_is_better)
    assert figures[0].axes[0].xaxis_inverted() == more_is_better


def test_a_curve_and_a_spectrum_show_their_values(figures: list[Figure]) -> None:
    """Missing values are left out; power is on a logarithmic axis."""
    curve_charts(EPOCHS, "epoch", ["loss"])
    spectrum_chart(SPECTRA)
    assert points(figures[0]) == [[[1, 3], [3, 1]]]
    assert points(figures[1]) == [[[0.1, 9], [0.2, 4], [0.3, 1]], [[0.1, 9], [0.2, 2]]]
    assert figures[1].axes[0].get_yscale() == "log"
