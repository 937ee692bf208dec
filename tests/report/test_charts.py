"""The charts of a report: every volume counted, colours that follow the page, the same bytes each time."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest

from scripts.report import cumulative_charts, curve_charts, distribution_charts
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
CHARTS = {
    "distribution": lambda: distribution_charts(MODEL, ["psnr", "l1", "kl"], "label"),
    "cumulative": lambda: cumulative_charts(FRAME, {"psnr": True, "l1": False}, ["model", "dct"]),
    "curve": lambda: curve_charts(pd.DataFrame({"epoch": [1, 2, 3], "loss": [3.0, 2.0, 1.0]}), "epoch", ["loss"]),
}
COUNTS = {"distribution": 3, "cumulative": 2, "curve": 1}


@pytest.mark.parametrize("kind", CHARTS)
def test_texts_take_the_pages_colour(kind):
    charts = CHARTS[kind]()
    assert len(charts) == COUNTS[kind]
    for _, svg in charts:
        assert svg.startswith("<svg") and "currentColor" in svg and INK not in svg
        assert not re.search(r"fill: *#(000000|ffffff)", svg), "black or white would vanish in one of the two modes"


@pytest.mark.parametrize("kind", CHARTS)
def test_same_data_give_the_same_bytes(kind):
    assert CHARTS[kind]() == CHARTS[kind]()


def test_groups_are_named_with_their_size():
    (_, svg), *_ = distribution_charts(MODEL, ["psnr"], "label")
    assert "patient (4)" in svg and "control (8)" in svg


def test_not_finite_volumes_are_counted():
    frame = MODEL.assign(psnr=[np.inf, np.nan, *range(N - 2)])
    (caption, _), *_ = distribution_charts(frame, ["psnr"])
    assert caption == f"psnr of {N - 2} volumes, the line is the median; 2 not finite"


def test_a_figure_of_one_system_is_no_comparison():
    assert cumulative_charts(FRAME, {"kl": False}, ["model", "dct"]) == []


def test_a_curve_without_values_is_left_out():
    assert curve_charts(pd.DataFrame({"epoch": [1, 2], "val_l1": [np.nan, np.nan]}), "epoch", ["val_l1"]) == []
