"""Where everything stands in a picture of a volume: planes, panels in millimetres, letters of the edges, texts.

`pictures` draws with it. Arrays are RAS; the orientation is the neurological one, left on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

from scripts.conventions import FOREGROUND, PERCENTILE
from scripts.run import replacing

__all__ = [
    "DPI",
    "FAINT",
    "GREY",
    "VIEWS",
    "YELLOW",
    "View",
    "add_letters",
    "add_panel",
    "checked_volume",
    "draw",
    "edge_lengths",
    "figure_to_array",
    "footer_text",
    "foreground_of",
    "number_text",
    "save_png",
    "window_top_of",
    "write_text",
]

DPI = 110

GREY, FAINT, YELLOW = "#e8e8e8", "#9a9a9a", "#ffd34d"

OUTLINE: list[AbstractPathEffect] = [withStroke(linewidth=2, foreground="black")]  # readable on white matter


@dataclass(frozen=True)
class View:
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
    "axial": View("axial", through=2, across=0, up=1, letters="LRAP"),
    "coronal": View("coronal", through=1, across=0, up=2, letters="LRSI"),
    "sagittal": View("sagittal", through=0, across=1, up=2, letters="APSI", mirrored=True),
}


def checked_volume(volume: np.ndarray, name: str) -> np.ndarray:
    volume = np.asarray(volume, dtype=np.float32)
    if volume.ndim != 3 or volume.size == 0:
        raise ValueError(f"{name} must be (D, H, W) and not empty, got shape {volume.shape}")
    return np.nan_to_num(volume, nan=0, posinf=0, neginf=0)


def edge_lengths(shape: tuple[int, ...], spacing: Sequence[float]) -> tuple[float, ...]:
    """Edge lengths of the volume in mm."""
    if len(spacing) != 3 or not all(0 < size < np.inf for size in spacing):
        raise ValueError(f"spacing must be three positive numbers (mm), got {tuple(spacing)}")
    return tuple(n * float(size) for n, size in zip(shape, spacing, strict=True))


def window_top_of(volume: np.ndarray) -> float:
    """The 99.5th percentile; where that is not positive the maximum, then 1."""
    return next((float(top) for top in (np.percentile(volume, PERCENTILE), volume.max()) if top > 0), 1.0)


def foreground_of(volume: np.ndarray) -> np.ndarray:
    return volume > FOREGROUND * window_top_of(volume)


def add_panel(figure: Figure, centre: tuple[float, float], size: tuple[float, float]) -> Axes:
    """Axes of a size in inches about a point in inches from the lower left."""
    width, height = figure.get_size_inches()
    lower_left = (centre[0] - size[0] / 2) / width, (centre[1] - size[1] / 2) / height
    return figure.add_axes((*lower_left, size[0] / width, size[1] / height))


def draw(axes: Axes, picture: np.ndarray, colours: Colormap | str, norm: Normalize) -> None:
    axes.imshow(picture, cmap=colours, norm=norm, origin="lower", aspect="auto", interpolation="bilinear")
    axes.set_axis_off()


def add_letters(axes: Axes, view: View) -> None:
    """Write the letters of left, right, top and bottom just inside the panel's edges."""
    for letter, x, y in zip(view.letters, (0.03, 0.97, 0.5, 0.5), (0.5, 0.5, 0.96, 0.04), strict=True):
        drawn = axes.text(x, y, letter, transform=axes.transAxes, color=YELLOW, fontsize=9, ha="center", va="center")
        drawn.set_path_effects(OUTLINE)


def write_text(figure: Figure, x: float, y: float, text: str, size: float, colour: str = GREY) -> None:
    """Centre a text on a point in inches; a dollar sign in a file's name is no formula."""
    width, height = figure.get_size_inches()
    x, y = x / width, y / height
    drawn = figure.text(x, y, text, fontsize=size, color=colour, ha="center", va="center", parse_math=False)
    drawn.set_path_effects(OUTLINE)


def number_text(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def footer_text(top: float, unit: str, bottom: float = 0) -> str:
    window = f"window {number_text(bottom)} to {number_text(top)} {unit}"
    return f"neurological: left is on the left (sagittal: anterior); {window}"


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
