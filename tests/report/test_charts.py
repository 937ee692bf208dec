"""The charts of a report: every volume counted and in its place."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from scripts.report import cumulative_charts, distribution_charts

N = 12
FRAME = pd.DataFrame(
    {
        "system": ["model"] * N + ["dct"] * N, "label": (["patient"] * 4 + ["control"] * 8) * 2,
        "psnr": np.linspace(20, 31, 2 * N), "l1": np.linspace(0.03, 0.01, 2 * N), "kl": [1.0] * N + [np.nan] * N,
    }
)  # fmt: skip
MODEL = FRAME[FRAME["system"] == "model"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of the charts made in a test, before they are text."""
    made: list[Figure] = []
    monkeypatch.setattr("scripts.report.charts._svg", lambda figure: made.append(figure) or "")
    return made


def points(figure: Figure) -> list[list[list[float]]]:
    """Of every line of a chart."""
    return [np.asarray(line.get_xydata()).tolist() for line in figure.axes[0].lines]


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
