"""The figures of a reconstruction, defined once for training's validation, the evaluation and the report.

`reconstruction_metrics` makes one row a volume, `summarise` one summary of many rows, `format_table` the table that
is printed; `VolumeMetric` brings the same columns into MONAI's validation handlers. The one idea: `x` is the scan in
model space and `y` its reconstruction, both are clamped to [0, 1], each volume gives one figure a column, and what is
reported is mean, standard deviation and the worst volume. What could not be computed shows, it is never left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from monai.metrics import CumulativeIterationMetric, SSIMMetric

__all__ = ["VolumeMetric", "format_paired", "format_table", "reconstruction_metrics", "summarise", "summary_frame"]

# Column: whether a large figure is a good one. The order is that of every table.
COLUMNS: dict[str, bool] = {"l1": False, "psnr": True, "psnr_brain": True, "ssim": True, "lpips": False, "kl": False}
FOREGROUND = 0.05
SSIM_WINDOW = 11


def reconstruction_metrics(
    x: torch.Tensor,
    y: torch.Tensor,
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Compare one volume with its reconstruction.

    Args:
        x: the scan in model space, (1, 1, D, H, W) or (D, H, W), sides of 11 voxels or more (SSIM's window).
        y: its reconstruction, same shape.
        lpips: called with y and x as (1, 1, D, H, W) in [0, 1]; gives one value. None leaves the column out.

    Returns:
        l1, psnr (dB), psnr_brain (dB, voxels where x > 0.05), ssim and, if asked for, lpips. A PSNR is inf where
        both are equal, psnr_brain is nan where there is no foreground.

    Raises:
        ValueError: the shapes differ, or are none of those above.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    if x.ndim != 3 and not (x.ndim == 5 and x.shape[:2] == (1, 1)):
        raise ValueError(f"x must be (1, 1, D, H, W) or (D, H, W), got {tuple(x.shape)}.")
    x, y = (_clamped(volume.reshape(1, 1, *volume.shape[-3:])) for volume in (x, y))
    row = {column: float(figure(x, y)) for column, figure in _FIGURES.items()}
    if lpips is not None:
        with torch.no_grad():
            row["lpips"] = float(lpips(y, x))
    return row


class VolumeMetric(CumulativeIterationMetric):
    """One column of `reconstruction_metrics` as a MONAI metric, averaged over all volumes of all ranks.

    In a config: `IgniteMetricHandler(metric_fn=VolumeMetric("psnr_brain"), output_transform=from_engine(["pred",
    "image"]))`. Mind the order, MONAI's: first the reconstruction, then the scan.

    Args:
        column: l1, psnr, psnr_brain or ssim; ValueError for another.
    """

    def __init__(self, column: str) -> None:
        if column not in _FIGURES:
            raise ValueError(f"column must be one of {', '.join(_FIGURES)}, got {column!r}.")
        super().__init__()
        self.column = column

    def aggregate(self) -> torch.Tensor:
        """Mean over the volumes since the last reset, a scalar, nan and inf included; ValueError if there are none."""
        values = self.get_buffer()
        if not isinstance(values, torch.Tensor):
            raise ValueError(f"{self.column} of no volumes; call the metric before aggregate.")
        return values.mean()

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Figures (B, 1) of reconstructions `y_pred` and scans `y`, both (B, 1, D, H, W)."""
        if y_pred.shape != y.shape or y.ndim != 5 or y.shape[1] != 1:
            raise ValueError(f"y_pred and y must be (B, 1, D, H, W), got {tuple(y_pred.shape)} and {tuple(y.shape)}.")
        return _FIGURES[self.column](_clamped(y), _clamped(y_pred))[:, None]


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
        *_aligned(table),
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
    """The rows of `comparison.paired_differences` as text, no newline at its end."""
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
    return "\n".join([*lines, *_aligned(pd.DataFrame(rows, columns=names))])


def _aligned(table: pd.DataFrame) -> list[str]:
    lines = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _clamped(volume: torch.Tensor) -> torch.Tensor:
    """Plain float32 in [0, 1], without MetaTensor's bookkeeping and without a graph."""
    return volume.detach().as_subclass(torch.Tensor).float().clamp(0, 1)


def _l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().flatten(1).mean(1)


def _psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10((x - y).square().flatten(1).mean(1))


def _psnr_brain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    foreground = (x > FOREGROUND).float()
    squares = ((x - y).square() * foreground).flatten(1).sum(1)
    return -10 * torch.log10(squares / foreground.flatten(1).sum(1))


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} voxels or more, got {tuple(x.shape[2:])}.")
    # Autocast's half precision would drown the variances, which are differences of nearly equal numbers.
    with torch.autocast(x.device.type, enabled=False):
        return torch.as_tensor(SSIMMetric(spatial_dims=3, data_range=1.0)(y, x)).flatten()


# Each takes clamped x and y, (B, 1, D, H, W), and gives (B,).
_FIGURES = {"l1": _l1, "psnr": _psnr, "psnr_brain": _psnr_brain, "ssim": _ssim}


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
