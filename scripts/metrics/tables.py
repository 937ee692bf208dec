"""Figures of many volumes in one table: mean, standard deviation, worst volume, and differences with a paired test.

What could not be computed shows, it is never left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import ttest_rel, wilcoxon

from scripts.metrics.reconstruction import COLUMNS

__all__ = ["format_paired", "format_table", "paired_differences", "summarise", "summary_frame"]


def summarise(rows: Sequence[Mapping[str, Any]], active_units: float | None = None) -> dict[str, dict[str, Any]]:
    """Summary of one system over a set of volumes; everything in it can be written as JSON.

    JSON has no inf and no nan. A volume that is reconstructed exactly (PSNR inf) is counted in `n_exact` and left out
    of mean and sd, which can only lower them. One undefined figure (nan) makes the column's mean and sd None and that
    volume the worst: a mean that leaves failures out flatters.

    Args:
        rows: one dict a volume: "name" and columns of `COLUMNS`, the same in each; other keys are not looked at.
        active_units: `ActiveUnits.share()` of the set, where there is a latent.

    Returns:
        Per column: n; n_exact (where not 0); mean; sd (of the sample, None for one volume); worst; worst_name.
        "active_units", if given, holds n and mean.

    Raises:
        ValueError: no rows, or a column that only some rows have.
    """
    if not rows:
        raise ValueError("rows is empty; there is nothing to summarise.")
    summary: dict[str, dict[str, Any]] = {}
    for column, more_is_better in COLUMNS.items():
        values = {str(row["name"]): float(row[column]) for row in rows if column in row}
        if not values:
            continue
        if len(values) < len(rows):
            raise ValueError(f"{len(rows)} rows, but '{column}' for {len(values)} names; is a name given twice?")
        summary[column] = _summary_of_column(values, more_is_better)
    if active_units is not None:
        summary["active_units"] = {"n": len(rows), "mean": _json_number(active_units)}
    return summary


def format_table(
    summaries: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    split: str,
    weights_sha256: str,
    command: str,
    model: str = "model",
) -> str:
    """The table of an evaluation as text: what it is of, one line a system, the model's worst volumes.

    Args:
        summaries: `summarise`'s result by system, in the table's order (model, identity, trilinear, dct, patch_pca).
        split: the split's name.
        weights_sha256: of the model's weights file.
        command: what the user ran.
        model: the system whose worst volumes are listed; ValueError if it is none of them.

    Returns:
        The text, no newline at its end.
    """
    if model not in summaries or not all(summaries.values()):
        raise ValueError(f"'{model}' and columns for every system are needed, got {list(summaries)}.")
    table = summary_frame(summaries)
    n_volumes = table.loc[table["system"] == model, "n"].item()
    lines = [
        f"split: {split}   n: {n_volumes} volumes, mean ± sd over volumes",
        f"weights: sha256 {weights_sha256}",
        f"command: {command}",
        "",
        table.to_string(index=False),
        "",
        f"worst volume of '{model}'",
    ]
    for column, figures in summaries[model].items():
        if "worst_name" in figures:
            lines.append(f"  {column:<10}  {_number(column, figures['worst'], figures):>8}  {figures['worst_name']}")
    for system, summary in summaries.items():
        for column, figures in summary.items():
            if 0 < figures.get("n_exact", 0) < figures["n"]:
                share = f"{figures['n_exact']} of {figures['n']}"
                lines.append(f"{column} of '{system}': {share} volumes are exact (inf) and not in mean ± sd")
    return "\n".join(lines)


def summary_frame(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> pd.DataFrame:
    """The table of `format_table`: one row a system with `system`, `n` and each figure's mean ± sd, all of it text."""
    columns = [c for c in (*COLUMNS, "active_units") if any(c in summary for summary in summaries.values())]
    rows = []
    for system, summary in summaries.items():
        n = max(figures["n"] for figures in summary.values())
        rows.append([system, str(n), *(_cell(column, summary.get(column)) for column in columns)])
    return pd.DataFrame(rows, columns=["system", "n", *columns])


def format_paired(paired: pd.DataFrame) -> str:
    """The rows of `paired_differences` as text, no newline at its end."""
    rows = []
    for _, row in paired.iterrows():
        digits = 2 if row["figure"].startswith("psnr") else 4
        low, high = (f"{row[key]:+.{digits}f}" for key in ("low", "high"))
        tests = (f"{row[key]:.2g}" for key in ("p", "p_wilcoxon"))
        rows.append(
            [
                row["system"],
                row["figure"],
                str(row["n"]),
                f"{row['difference']:+.{digits}f}",
                f"{low} to {high}",
                *tests,
            ]
        )
    names = ["system", "figure", "n", "minus model", "95 % interval", "p (t)", "p (Wilcoxon)"]
    lines = ["paired with 'model': mean over subjects, Student's t and Wilcoxon's signed ranks"]
    return "\n".join([*lines, pd.DataFrame(rows, columns=names).to_string(index=False)])


def _summary_of_column(values: dict[str, float], more_is_better: bool) -> dict[str, Any]:
    sign = -1 if more_is_better else 1
    badness = {name: math.inf if math.isnan(value) else sign * value for name, value in values.items()}
    worst = max(badness, key=badness.__getitem__)
    failed = badness[worst] == math.inf
    n_exact = sum(value == -math.inf for value in badness.values())
    finite = torch.tensor([value for value in values.values() if math.isfinite(value)], dtype=torch.float64)
    return {
        "n": len(values),
        **({"n_exact": n_exact} if n_exact else {}),
        "mean": float(finite.mean()) if len(finite) and not failed else None,
        "sd": float(finite.std()) if len(finite) > 1 and not failed else None,
        "worst": _json_number(values[worst]),
        "worst_name": worst,
    }


def _json_number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(column: str, value: float | None, figures: Mapping[str, Any]) -> str:
    """A figure as text; None is inf where all volumes are exact, else undefined."""
    if value is None:
        return "inf" if figures.get("n_exact") == figures["n"] else "nan"
    return f"{value:.2f}" if column.startswith("psnr") else f"{value:.4f}"


def _cell(column: str, figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    mean = _number(column, figures["mean"], figures)
    sd = figures.get("sd")
    return mean if sd is None else f"{mean} ± {_number(column, sd, figures)}"


def paired_differences(frame: pd.DataFrame, columns: Sequence[str], reference: str = "model") -> pd.DataFrame:
    """How far each system is from the reference on the same volumes.

    The volumes of one subject are no independent witnesses: their differences are averaged first. n counts subjects.

    Args:
        frame: one row a volume and system, with `name`, `subject` and `system`.
        columns: the figures.
        reference: the system that the others are compared with.

    Returns:
        One row a system and column: `system`, `figure`, `n`, `difference` (mean of system minus reference), `low` and
        `high` (95 % confidence interval of Student's paired t-test), `p` of that test and `p_wilcoxon` of the signed
        ranks. nan where it is not defined: fewer than two subjects, or a figure that is not finite.
    """
    table = frame.pivot(index=["subject", "name"], columns="system", values=list(columns))
    rows = []
    for system in (system for system in frame["system"].unique() if system != reference):
        for column in columns:
            pair = table[column][[system, reference]]
            if pair.isna().all().any():
                continue
            means = pair.groupby("subject").mean()
            row: dict[str, Any] = {"system": system, "figure": column, "n": len(means)}
            rows.append({**row, **_paired_test(means[system].to_numpy(float), means[reference].to_numpy(float))})
    return pd.DataFrame(rows, columns=["system", "figure", "n", "difference", "low", "high", "p", "p_wilcoxon"])


def _paired_test(values: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    undefined = dict.fromkeys(("difference", "low", "high", "p", "p_wilcoxon"), float("nan"))
    if not (np.isfinite(values).all() and np.isfinite(reference).all()):
        return undefined
    differences = values - reference
    result = {**undefined, "difference": float(differences.mean())}
    if len(values) < 2:
        return result
    if not differences.std() > 0:  # the same difference everywhere, no variance to test against
        return {**result, "low": result["difference"], "high": result["difference"]}
    test = ttest_rel(values, reference)
    interval = test.confidence_interval(0.95)
    result |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    return {**result, "p_wilcoxon": float(wilcoxon(values, reference).pvalue)}
