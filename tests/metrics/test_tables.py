"""Figures of many volumes: their summary, their table, and the paired test between systems."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scripts.metrics import format_paired, format_table, paired_differences, summarise

NAN, INF = math.nan, math.inf
# column, values of volumes a, b, c ... -> mean, sd, worst, worst's name, and the number of exact ones
SUMMARIES = [
    ("l1", [0.1, 0.3, 0.2], (0.2, 0.1, 0.3, "b"), {}),
    ("psnr", [30.0, INF, 32.0], (31.0, math.sqrt(2), 30.0, "a"), {"n_exact": 1}),
    ("psnr", [INF, INF], (None, None, None, "a"), {"n_exact": 2}),
    ("psnr_brain", [30.0, NAN, 20.0], (None, None, None, "b"), {}),
    ("ssim", [0.9], (0.9, None, 0.9, "a"), {}),
]


@pytest.mark.parametrize(("column", "values", "expected", "n_exact"), SUMMARIES)
def test_summary(column: str, values: list[float], expected: tuple, n_exact: dict[str, int]) -> None:
    """Mean, sd and worst by column; exact volumes are counted, failed ones spoil the mean; JSON takes it."""
    rows = [{"name": "abc"[i], "subject": "s", column: value} for i, value in enumerate(values)]
    found = json.loads(json.dumps(summarise(rows), allow_nan=False))
    named = dict(zip(("mean", "sd", "worst", "worst_name"), expected, strict=True))
    assert found == {column: pytest.approx({"n": len(values), **named, **n_exact})}


def test_table_says_where_it_comes_from_and_names_the_worst() -> None:
    """Split, n, weights; a line a system; the model's worst volumes; exact ones."""
    rows = [{"name": f"sub-0{i}", "l1": 0.01 * i, "psnr": 30.0 + i, "kl": 2.0} for i in (1, 2, 3)]
    exact = [{"name": f"sub-0{i}", "l1": 0.0, "psnr": INF if i > 1 else 90.0} for i in (1, 2, 3)]
    summaries = {"model": summarise(rows, active_units=0.75), "identity": summarise(exact)}
    text = format_table(summaries, split="test", weights_sha256="ab12", command="python -m monai.bundle run")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[5] == "model 3 0.0200 ± 0.0100 32.00 ± 1.00 2.0000 ± 0.0000 0.7500"
    assert lines[6] == "identity 3 0.0000 ± 0.0000 90.00 - -"
    assert lines[8:12] == ["worst volume of 'model'", "l1 0.0300 sub-03", "psnr 31.00 sub-01", "kl 2.0000 sub-01"]


def figures(model: list[float], other: list[float], subjects: list[str] | None = None) -> pd.DataFrame:
    """Rows of an evaluation with the column psnr."""
    rows: list[dict[str, Any]] = []
    for system, column in (("model", model), ("other", other)):
        for number, value in enumerate(column):
            subject = subjects[number] if subjects else f"s{number}"
            rows.append({"name": f"v{number}", "subject": subject, "system": system, "psnr": value})
    return pd.DataFrame(rows)


def test_paired_test_is_students() -> None:
    """System minus model, with scipy's interval and both tests; the text has the same figures."""
    rng = np.random.default_rng(0)
    model = rng.normal(25, 2, 10)
    other = model + rng.normal(0.5, 0.3, 10)
    paired = paired_differences(figures(list(model), list(other)), ["psnr"])
    row, test = paired.iloc[0], stats.ttest_rel(other, model)
    assert row["difference"] == pytest.approx(np.mean(other - model))
    assert (row["low"], row["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert row["p"] == pytest.approx(test.pvalue)
    assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(other, model).pvalue)
    cells = format_paired(paired).splitlines()[-1].split()
    assert cells[:5] == ["other", "psnr", "10", f"{row['difference']:+.2f}", f"{row['low']:+.2f}"]


def test_sessions_of_a_subject_count_once() -> None:
    """Twenty sessions of one subject are one witness, not twenty."""
    subjects = ["a", "b", *["c"] * 20]
    frame = figures([20.0] * 22, [21.0, 22.0, *[26.0, 22.0] * 10], subjects)
    row = paired_differences(frame, ["psnr"]).iloc[0]
    assert row["n"] == 3 and row["difference"] == pytest.approx((1 + 2 + 4) / 3)


def test_what_is_not_defined_is_nan() -> None:
    """Never left out: a figure that is not finite, one subject, equal differences."""
    for model, other, expected in (
        ([20.0, 20.5, 21.0], [INF, 21.0, 22.0], [NAN] * 5),
        ([20.0], [21.0], [1, NAN, NAN, NAN, NAN]),
        ([20.0, 21.0], [21.0, 22.0], [1, 1, 1, NAN, NAN]),
    ):
        row = paired_differences(figures(model, other), ["psnr"]).iloc[0]
        found = [row[key] for key in ("difference", "low", "high", "p", "p_wilcoxon")]
        np.testing.assert_array_equal(found, expected)
