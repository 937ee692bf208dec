"""Pictures of volumes as a radiologist expects them: original, reconstruction and difference; or slices in a grid.

Inference, TensorBoard, the report and the notebook use them. The one idea: every panel is laid out in millimetres, so
that shapes are right for any spacing, and carries the letters of its own edges, so that nobody has to guess left from
right. Arrays are RAS (x to the patient's right, y to anterior, z to superior), see `to_ras`; the orientation is the
neurological one, left on the left. Only matplotlib's object interface is used, never pyplot's global state.

    figure = recon_panel(image, recon, spacing, title="sub-01_T1w")
    save_png(figure, "out/sub-01_T1w.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

from scripts.files import replacing

__all__ = ["figure_to_array", "mosaic", "recon_panel", "save_png", "to_ras"]

DPI = 110
PANEL = 3.0  # inches of the volume's longest edge in `recon_panel`
GREY, FAINT, YELLOW = "#e8e8e8", "#9a9a9a", "#ffd34d"
OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="black")]  # readable on white matter
# Zero is black like the background; both sides are equally bright and differ for the colour-blind, too.
DIFFERENCE = LinearSegmentedColormap.from_list("difference", ["#a8e0ff", "#1878d8", "#000000", "#d05000", "#ffd9a0"])


@dataclass(frozen=True)
class _View:
    """A slice direction: the array's axes that run through the slices, to the right and up; letters of the edges."""

    name: str
    through: int
    across: int
    up: int
    letters: str  # left, right, top, bottom
    mirrored: bool = False

    def slice(self, volume: np.ndarray, index: int) -> np.ndarray:
        """One slice with its rows from bottom to top, columns from left to right."""
        picture = volume.take(index, self.through).T
        return picture[:, ::-1] if self.mirrored else picture


VIEWS = {
    "axial": _View("axial", through=2, across=0, up=1, letters="LRAP"),
    "coronal": _View("coronal", through=1, across=0, up=2, letters="LRSI"),
    "sagittal": _View("sagittal", through=0, across=1, up=2, letters="APSI", mirrored=True),
}


def recon_panel(
    image: np.ndarray,
    recon: np.ndarray,
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
    title: str = "",
    unit: str = "arbitrary units",
    difference_share: float = 0.25,
) -> Figure:
    """Three planes through the centre of the foreground: original, reconstruction, difference.

    Original and reconstruction share one window, from 0 to the original's 99.5th percentile. The difference's colours
    always end at the same share of that window, so that two pictures can be compared; beyond, they stay at the end.

    Args:
        image: original (D, H, W), RAS; not-finite values are drawn as 0.
        recon: reconstruction of the same shape.
        spacing: voxel size in mm.
        title: the scan's name, say.
        unit: of the intensities, for the colour bar.
        difference_share: where the difference's colours end, as a share of the window.

    Returns:
        The figure, for `save_png` or `figure_to_array`.

    Raises:
        ValueError: not three-dimensional, empty, different shapes, or impossible spacing or share.
    """
    image, recon = _checked_volume(image, "image"), _checked_volume(recon, "recon")
    if image.shape != recon.shape:
        raise ValueError(f"image and recon must have one shape, got {image.shape} and {recon.shape}")
    if not difference_share > 0:
        raise ValueError(f"difference_share must be positive, got {difference_share!r}")
    edges = _edges(image.shape, spacing)
    centre, top = _foreground_centre(image), _window_top(image)
    limit = difference_share * top
    window, signed = Normalize(0, top), Normalize(-limit, limit)
    columns: list[tuple[str, np.ndarray, Colormap | str, Normalize]] = [
        ("original", image, "gray", window),
        ("reconstruction", recon, "gray", window),
        ("difference", recon - image, DIFFERENCE, signed),
    ]

    scale = PANEL / max(edges)  # inches per mm
    width = max(1.2, scale * max(edges[0], edges[1])) + 0.3
    heights = [max(0.7, scale * edges[view.up]) + 0.3 for view in VIEWS.values()]
    left, right, head, foot = 0.95, 0.95, 0.75, 0.3
    figure = Figure((left + 3 * width + right, head + sum(heights) + foot), DPI, facecolor="black")
    _write(figure, left + 1.5 * width, figure.get_figheight() - 0.22, title, size=min(13, 1040 / max(1, len(title))))
    for row, (view, height) in enumerate(zip(VIEWS.values(), heights, strict=True)):
        middle = figure.get_figheight() - head - sum(heights[:row]) - height / 2
        index = centre[view.through]
        position = f"{view.name}\n{'xyz'[view.through]} {index + 1} of {image.shape[view.through]}"
        _write(figure, left / 2, middle, position, size=10)
        for column, (name, volume, colours, norm) in enumerate(columns):
            across = left + (column + 0.5) * width
            axes = _add_panel(figure, (across, middle), (scale * edges[view.across], scale * edges[view.up]))
            _draw(axes, view.slice(volume, index), colours, norm)
            _letter(axes, view)
            if row == 0:
                _write(figure, across, figure.get_figheight() - head + 0.12, name, size=11)
    bar = _add_panel(figure, (left + 3 * width + 0.12, foot + sum(heights) / 2), (0.13, min(3.0, 0.6 * sum(heights))))
    colour_bar = figure.colorbar(ScalarMappable(signed, DIFFERENCE), cax=bar, extend="both", ticks=[-limit, 0, limit])
    colour_bar.ax.set_yticklabels([f"-{_number(limit)}", "0", f"+{_number(limit)}"], color=GREY, fontsize=9)
    colour_bar.set_label(f"reconstruction - original ({unit})", color=GREY, fontsize=9, parse_math=False)
    colour_bar.outline.set_edgecolor(FAINT)  # type: ignore[operator]
    bar.tick_params(color=FAINT)
    _write(figure, figure.get_figwidth() / 2, foot / 2, _footer(top, unit), size=8.5, colour=FAINT)
    return figure


def mosaic(
    volume: np.ndarray,
    n_slices: int = 24,
    axis: str = "axial",
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
    title: str = "",
    unit: str = "arbitrary units",
    window_top: float | None = None,
) -> Figure:
    """Slices of one volume in a grid, evenly spread over the foreground, each with its number.

    Args:
        volume: (D, H, W), RAS; not-finite values are drawn as 0.
        n_slices: at most this many; a volume with fewer shows each once.
        axis: `axial` (from inferior), `coronal` (from posterior) or `sagittal` (from left).
        spacing: voxel size in mm.
        title: the scan's name, say.
        unit: of the intensities.
        window_top: the intensity that is white; None for the volume's 99.5th percentile.

    Returns:
        The figure, for `save_png` or `figure_to_array`.

    Raises:
        ValueError: not three-dimensional, empty, unknown axis, or impossible number or spacing.
    """
    volume = _checked_volume(volume, "volume")
    if axis not in VIEWS:
        raise ValueError(f"axis must be one of {', '.join(VIEWS)}, got {axis!r}")
    if n_slices < 1 or not (window_top is None or window_top > 0):
        raise ValueError(f"n_slices and window_top must be positive, got {n_slices!r} and {window_top!r}")
    view, edges = VIEWS[axis], _edges(volume.shape, spacing)
    top = _window_top(volume) if window_top is None else window_top
    area = _foreground(volume).sum(axis=(view.across, view.up))
    present = np.flatnonzero(area > 0.05 * area.max())
    first, last = (present[0], present[-1]) if present.size else (0, volume.shape[view.through] - 1)
    n_slices = min(n_slices, int(last - first + 1))
    # The middles of equal shares, since the outermost slices hold little.
    indices = np.floor(first + (np.arange(n_slices) + 0.5) * (last - first + 1) / n_slices).astype(int)

    scale = 1.5 / max(edges[view.across], edges[view.up])
    width, height = (max(0.6, scale * edge) + 0.06 for edge in (edges[view.across], edges[view.up]))
    wanted = ceil(sqrt(1.5 * n_slices * height / width))  # a picture three by two, with few empty places
    n_columns = min(range(max(1, wanted - 2), wanted + 3), key=lambda n: (-n_slices % n, abs(n - wanted)))
    n_rows = ceil(n_slices / n_columns)
    head, foot = 0.4, 0.3
    figure = Figure((max(6.0, n_columns * width), head + n_rows * height + foot), DPI, facecolor="black")
    middle = figure.get_figwidth() / 2
    _write(figure, middle, figure.get_figheight() - head / 2, title, size=min(12, 200 * middle / max(1, len(title))))
    for number, index in enumerate(indices):
        row, column = divmod(number, n_columns)
        across = middle + (column + 0.5 - n_columns / 2) * width
        centre = (across, figure.get_figheight() - head - (row + 0.5) * height)
        axes = _add_panel(figure, centre, (scale * edges[view.across], scale * edges[view.up]))
        _draw(axes, view.slice(volume, index), "gray", Normalize(0, top))
        _write(figure, across - width / 2 + 0.16, centre[1] - height / 2 + 0.1, str(index + 1), size=7, colour=FAINT)
        if number == 0:
            _letter(axes, view)
    _write(figure, middle, foot / 2, f"{view.name}; {_footer(top, unit)}", size=7.5, colour=FAINT)
    return figure


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Bring a volume closest to RAS by flips and swaps of its axes, without interpolation.

    Args:
        array: (D, H, W) on any grid.
        affine: 4 x 4, voxel to world, mm.

    Returns:
        The volume with x to R, y to A, z to S, and its spacing in mm.

    Raises:
        ValueError: the array is not three-dimensional.
    """
    array = np.asarray(array)
    if array.ndim != 3:
        raise ValueError(f"array must be (D, H, W), got shape {array.shape}")
    image = nib.as_closest_canonical(nib.spatialimages.SpatialImage(array, affine))
    x, y, z = (float(size) for size in nib.affines.voxel_sizes(image.affine))
    return np.asarray(image.dataobj), (x, y, z)


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a PNG that depends on the picture alone: the same figure gives the same bytes. The file is whole or absent.

    Args:
        figure: from `recon_panel` or `mosaic`.
        path: the file; its folder is made.

    Raises:
        InputError: the folder cannot be written to.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, facecolor="black", metadata={"Software": None})


def figure_to_array(figure: Figure) -> np.ndarray:
    """Draw a figure to uint8 (H, W, 3), as TensorBoard's `add_image(..., dataformats="HWC")` takes it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _checked_volume(volume: np.ndarray, name: str) -> np.ndarray:
    volume = np.asarray(volume, dtype=np.float32)
    if volume.ndim != 3 or volume.size == 0:
        raise ValueError(f"{name} must be (D, H, W) and not empty, got shape {volume.shape}")
    return np.nan_to_num(volume, nan=0, posinf=0, neginf=0)


def _edges(shape: tuple[int, ...], spacing: Sequence[float]) -> tuple[float, ...]:
    """Edge lengths of the volume in mm."""
    if len(spacing) != 3 or not all(0 < size < np.inf for size in spacing):
        raise ValueError(f"spacing must be three positive numbers (mm), got {tuple(spacing)}")
    return tuple(n * float(size) for n, size in zip(shape, spacing, strict=True))


def _window_top(volume: np.ndarray) -> float:
    """The 99.5th percentile; where that is not positive the maximum, then 1."""
    return next((float(top) for top in (np.percentile(volume, 99.5), volume.max()) if top > 0), 1.0)


def _foreground(volume: np.ndarray) -> np.ndarray:
    return volume > 0.05 * _window_top(volume)  # as in model space


def _foreground_centre(volume: np.ndarray) -> tuple[int, ...]:
    """Mean index of the foreground, or the volume's middle where there is none."""
    inside = np.argwhere(_foreground(volume))
    return tuple(int(index) for index in (inside.mean(0).round() if inside.size else np.array(volume.shape) // 2))


def _add_panel(figure: Figure, centre: tuple[float, float], size: tuple[float, float]) -> Axes:
    """Axes of a size in inches about a point in inches from the lower left."""
    width, height = figure.get_size_inches()
    lower_left = (centre[0] - size[0] / 2) / width, (centre[1] - size[1] / 2) / height
    return figure.add_axes((*lower_left, size[0] / width, size[1] / height))


def _draw(axes: Axes, picture: np.ndarray, colours: Colormap | str, norm: Normalize) -> None:
    axes.imshow(picture, cmap=colours, norm=norm, origin="lower", aspect="auto", interpolation="bilinear")
    axes.set_axis_off()


def _letter(axes: Axes, view: _View) -> None:
    """Write the letters of left, right, top and bottom just inside the panel's edges."""
    for letter, x, y in zip(view.letters, (0.03, 0.97, 0.5, 0.5), (0.5, 0.5, 0.96, 0.04), strict=True):
        drawn = axes.text(x, y, letter, transform=axes.transAxes, color=YELLOW, fontsize=9, ha="center", va="center")
        drawn.set_path_effects(OUTLINE)


def _write(figure: Figure, x: float, y: float, text: str, size: float, colour: str = GREY) -> None:
    """Centre a text on a point in inches; a dollar sign in a file's name is no formula."""
    width, height = figure.get_size_inches()
    x, y = x / width, y / height
    drawn = figure.text(x, y, text, fontsize=size, color=colour, ha="center", va="center", parse_math=False)
    drawn.set_path_effects(OUTLINE)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _footer(top: float, unit: str, bottom: float = 0) -> str:
    window = f"window {_number(bottom)} to {_number(top)} {unit}"
    return f"neurological: left is on the left (sagittal: anterior); {window}"
