"""The charts of a report, as SVG that takes the page's text colour: right in light, in dark and on paper.

Colours are those of Okabe and Ito (Color Universal Design, 2008), told apart by the colour-blind; lines differ in
their dashes, too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["cumulative_charts", "curve_charts", "distribution_charts", "spectrum_chart"]

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
DASHES: list[str | tuple[int, tuple[int, ...]]] = ["-", "--", "-.", ":", (0, (6, 1, 1, 1)), (0, (1, 3))]
INK = "#010203"  # becomes the page's text colour
SIZE = (4.4, 3.0)  # inches
MOST_POINTS = 300  # of a group; beyond, the shape of the violin says more
LEAST_FOR_VIOLIN = 10
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "brain_t1_vae",  # the same chart gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


def distribution_charts(frame: pd.DataFrame, columns: Sequence[str], group: str = "") -> list[tuple[str, str]]:
    """How a figure is spread over the volumes: points, median, and a violin where there are enough.

    Args:
        frame: one row a volume.
        columns: the figures, a chart each; what is not finite is left out and counted in the caption.
        group: column by which the volumes are told apart; "" for none.

    Returns:
        Caption and SVG of each chart.
    """
    charts = []
    for column in columns:
        finite = frame[np.isfinite(frame[column].astype(float))]
        groups = {str(name): rows[column] for name, rows in finite.groupby(group)} if group else {"all": finite[column]}
        if finite.empty:
            continue
        figure, axes = _axes(height=0.9 + 0.65 * len(groups))
        for number, (values, colour) in enumerate(zip(groups.values(), _cycle(len(groups)), strict=True)):
            values = values.to_numpy(float)
            if len(values) >= LEAST_FOR_VIOLIN and np.ptp(values) > 0:
                violin = axes.violinplot(
                    values, positions=[number], orientation="horizontal", widths=0.8, showextrema=False
                )
                for body in violin["bodies"]:  # type: ignore[attr-defined]
                    body.set(facecolor=colour, alpha=0.3)
            if len(values) <= MOST_POINTS:
                # Evenly spread by rank, so that equal values do not hide each other and nothing is random.
                offset = 0.25 * (((np.arange(len(values)) * 0.618) % 1) - 0.5)
                axes.plot(values, number + offset, "o", color=colour, markersize=3.5, alpha=0.7)
            axes.plot([np.median(values)] * 2, [number - 0.3, number + 0.3], color=INK, linewidth=1.5)
        names = [f"{name} ({len(values)})" for name, values in groups.items()]
        axes.set(xlabel=column, yticks=range(len(groups)), yticklabels=names, ylim=(len(groups) - 0.5, -0.5))
        missing = len(frame) - len(finite)
        note = f"; {missing} not finite" if missing else ""
        charts.append((f"{column} of {len(finite)} volumes, the line is the median{note}", _svg(figure)))
    return charts


def cumulative_charts(frame: pd.DataFrame, better: Mapping[str, bool], systems: Sequence[str]) -> list[tuple[str, str]]:
    """For each figure, the share of volumes that a system reconstructs at least that well.

    Args:
        frame: one row a volume and system, with the column `system`.
        better: for each column, whether large is good.
        systems: those that are drawn, in this order.

    Returns:
        Caption and SVG of each chart; a figure that fewer than two systems have is left out.
    """
    charts = []
    for column, more_is_better in better.items():
        figure, axes = _axes()
        drawn = 0
        for system, colour, dash in zip(systems, _cycle(len(systems)), _dashes(len(systems)), strict=True):
            values = np.sort(frame.loc[frame["system"] == system, column].dropna().to_numpy(float))
            if not len(values):
                continue
            drawn += 1
            share = np.arange(1, len(values) + 1) / len(values)
            if more_is_better:
                values, share = values[::-1], share
            axes.step(values, share, where="post", color=colour, linestyle=dash, label=system, linewidth=1.8)
        if drawn < 2:
            continue
        axes.set(xlabel=f"{column} ({'higher' if more_is_better else 'lower'} is better)", ylabel="share of volumes")
        axes.set_ylim(0, 1.02)
        if more_is_better:
            axes.invert_xaxis()
        axes.legend(frameon=False, fontsize=8, loc="lower right", labelcolor=INK)
        charts.append((f"share of volumes that reach a {column}, by system", _svg(figure)))
    return charts


def curve_charts(frame: pd.DataFrame, x: str, columns: Sequence[str]) -> list[tuple[str, str]]:
    """One line a chart over `x`, such as the epochs of a training.

    Args:
        frame: the rows of the curves; missing values leave the line out there.
        x: the column of the horizontal axis.
        columns: a chart each.

    Returns:
        Caption and SVG of each chart.
    """
    charts = []
    for column in columns:
        rows = frame[[x, column]].dropna()
        if rows.empty:
            continue
        figure, axes = _axes()
        axes.plot(rows[x], rows[column], "o-", color=COLOURS[0], markersize=3, linewidth=1.5)
        axes.set(xlabel=x, ylabel=column)
        charts.append(
            (f"{column} over {x}, from {rows[column].iloc[0]:.4g} to {rows[column].iloc[-1]:.4g}", _svg(figure))
        )
    return charts


def spectrum_chart(frame: pd.DataFrame) -> tuple[str, str]:
    """Power spectra on a logarithmic axis.

    Args:
        frame: from `spectrum.MeanSpectra.result`.

    Returns:
        Caption and SVG.
    """
    kinds = [column for column in frame if column != "frequency"]
    figure, axes = _axes()
    for kind, colour, dash in zip(kinds, _cycle(len(kinds)), _dashes(len(kinds)), strict=True):
        rows = frame[["frequency", kind]].dropna()
        axes.semilogy(rows["frequency"], rows[kind], color=colour, linestyle=dash, label=kind)
    axes.set(xlabel="cycles per mm", ylabel="power density, mm³")
    axes.legend(frameon=False)
    return f"mean power by spatial frequency, {', '.join(kinds)}", _svg(figure)


def _axes(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure((SIZE[0], height), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _cycle(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _dashes(n: int) -> list[str | tuple[int, tuple[int, ...]]]:
    return [DASHES[i % len(DASHES)] for i in range(n)]
