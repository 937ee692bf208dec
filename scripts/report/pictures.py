"""Pictures of volumes as a radiologist expects them: original, reconstruction and difference; or slices in a grid.

Inference, TensorBoard, the report and the notebook use them. Every panel is laid out in millimetres, so
that shapes are right for any spacing, and carries the letters of its own edges, so that nobody has to guess left from
right. Arrays are RAS (x to the patient's right, y to anterior, z to superior), see `to_ras`; the orientation is the
neurological one, left on the left. Only matplotlib's object interface is used, never pyplot's global state.

    figure = recon_panel(image, recon, spacing, title="sub-01_T1w")
    save_png(figure, "out/sub-01_T1w.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt

import nibabel as nib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from scripts.conventions import SPACING, STRIDE
from scripts.report.canvas import (
    DPI,
    FAINT,
    GREY,
    VIEWS,
    add_letters,
    add_panel,
    checked_volume,
    draw,
    edge_lengths,
    footer_text,
    foreground_of,
    number_text,
    window_top_of,
    write_text,
)

__all__ = ["latent_strip", "mosaic", "recon_panel", "to_ras", "volume_strip"]

PANEL = 3.0  # inches of the volume's longest edge in `recon_panel`

# Zero is black like the background; both sides are equally bright and differ for the colour-blind, too.
DIFFERENCE = LinearSegmentedColormap.from_list("difference", ["#a8e0ff", "#1878d8", "#000000", "#d05000", "#ffd9a0"])


def recon_panel(
    image: np.ndarray,
    recon: np.ndarray,
    spacing: Sequence[float] = (SPACING,) * 3,
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
    image, recon = checked_volume(image, "image"), checked_volume(recon, "recon")
    if image.shape != recon.shape:
        raise ValueError(f"image and recon must have one shape, got {image.shape} and {recon.shape}")
    if not difference_share > 0:
        raise ValueError(f"difference_share must be positive, got {difference_share!r}")
    edges = edge_lengths(image.shape, spacing)
    centre, top = _foreground_centre(image), window_top_of(image)
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
    write_text(
        figure, left + 1.5 * width, figure.get_figheight() - 0.22, title, size=min(13, 1040 / max(1, len(title)))
    )
    for row, (view, height) in enumerate(zip(VIEWS.values(), heights, strict=True)):
        middle = figure.get_figheight() - head - sum(heights[:row]) - height / 2
        index = centre[view.through]
        position = f"{view.name}\n{'xyz'[view.through]} {index + 1} of {image.shape[view.through]}"
        write_text(figure, left / 2, middle, position, size=10)
        for column, (name, volume, colours, norm) in enumerate(columns):
            across = left + (column + 0.5) * width
            axes = add_panel(figure, (across, middle), (scale * edges[view.across], scale * edges[view.up]))
            draw(axes, view.slice(volume, index), colours, norm)
            add_letters(axes, view)
            if row == 0:
                write_text(figure, across, figure.get_figheight() - head + 0.12, name, size=11)
    bar = add_panel(figure, (left + 3 * width + 0.12, foot + sum(heights) / 2), (0.13, min(3.0, 0.6 * sum(heights))))
    colour_bar = figure.colorbar(ScalarMappable(signed, DIFFERENCE), cax=bar, extend="both", ticks=[-limit, 0, limit])
    colour_bar.ax.set_yticklabels([f"-{number_text(limit)}", "0", f"+{number_text(limit)}"], color=GREY, fontsize=9)
    colour_bar.set_label(f"reconstruction - original ({unit})", color=GREY, fontsize=9, parse_math=False)
    colour_bar.outline.set_edgecolor(FAINT)  # type: ignore[operator]
    bar.tick_params(color=FAINT)
    write_text(figure, figure.get_figwidth() / 2, foot / 2, footer_text(top, unit), size=8.5, colour=FAINT)
    return figure


def mosaic(
    volume: np.ndarray,
    n_slices: int = 24,
    axis: str = "axial",
    spacing: Sequence[float] = (SPACING,) * 3,
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
    volume = checked_volume(volume, "volume")
    if axis not in VIEWS:
        raise ValueError(f"axis must be one of {', '.join(VIEWS)}, got {axis!r}")
    if n_slices < 1 or not (window_top is None or window_top > 0):
        raise ValueError(f"n_slices and window_top must be positive, got {n_slices!r} and {window_top!r}")
    view, edges = VIEWS[axis], edge_lengths(volume.shape, spacing)
    top = window_top_of(volume) if window_top is None else window_top
    area = foreground_of(volume).sum(axis=(view.across, view.up))
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
    write_text(
        figure, middle, figure.get_figheight() - head / 2, title, size=min(12, 200 * middle / max(1, len(title)))
    )
    for number, index in enumerate(indices):
        row, column = divmod(number, n_columns)
        across = middle + (column + 0.5 - n_columns / 2) * width
        centre = (across, figure.get_figheight() - head - (row + 0.5) * height)
        axes = add_panel(figure, centre, (scale * edges[view.across], scale * edges[view.up]))
        draw(axes, view.slice(volume, index), "gray", Normalize(0, top))
        write_text(
            figure, across - width / 2 + 0.16, centre[1] - height / 2 + 0.1, str(index + 1), size=7, colour=FAINT
        )
        if number == 0:
            add_letters(axes, view)
    write_text(figure, middle, foot / 2, f"{view.name}; {footer_text(top, unit)}", size=7.5, colour=FAINT)
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


def _foreground_centre(volume: np.ndarray) -> tuple[int, ...]:
    """Mean index of the foreground, or the volume's middle where there is none."""
    inside = np.argwhere(foreground_of(volume))
    return tuple(int(index) for index in (inside.mean(0).round() if inside.size else np.array(volume.shape) // 2))


PER_BAND = 8  # volumes side by side

EDGE = 1.5  # inches of the longest edge


def volume_strip(
    volumes: Sequence[np.ndarray],
    names: Sequence[str],
    spacing: Sequence[float] = (SPACING,) * 3,
    title: str = "",
    window_top: float = 1.0,
    window_bottom: float = 0.0,
    unit: str = "x 99.5th percentile",
) -> Figure:
    """Axial, coronal and sagittal middle of each volume; bands of eight volumes.

    Args:
        volumes: (D, H, W) each, RAS, one shape; not-finite values are drawn as 0.
        names: of the volumes.
        spacing: voxel size in mm.
        title: of the whole picture.
        window_top: the value that is white.
        window_bottom: the value that is black.
        unit: of the values.

    Returns:
        The figure, for `save_png`.

    Raises:
        ValueError: no volumes, or shapes, names or spacing do not fit.
    """
    volumes = [checked_volume(volume, "volume") for volume in volumes]
    if not volumes or len(volumes) != len(names) or len({volume.shape for volume in volumes}) > 1:
        raise ValueError(f"volumes of one shape and as many names are needed, got {len(volumes)} and {len(names)}")
    shape = volumes[0].shape
    edges = edge_lengths(shape, spacing)
    scale = EDGE / max(edges)
    views = list(VIEWS.values())
    width = scale * max(edges[0], edges[1]) + 0.08
    heights = [scale * edges[view.up] + 0.08 for view in views]
    n_columns = min(PER_BAND, len(volumes))
    n_bands = ceil(len(volumes) / PER_BAND)
    head, label, foot = (0.4 if title else 0.1), 0.3, 0.3
    band = label + sum(heights)
    figure = Figure((max(6.0, n_columns * width), head + n_bands * band + foot), DPI, facecolor="black")
    top, middle = figure.get_figheight() - head, figure.get_figwidth() / 2
    if title:
        write_text(figure, middle, figure.get_figheight() - head / 2, title, size=11)
    window = Normalize(window_bottom, window_top)
    for number, (volume, name) in enumerate(zip(volumes, names, strict=True)):
        row, column = divmod(number, PER_BAND)
        across = middle + (column + 0.5 - n_columns / 2) * width
        upper = top - row * band - label
        write_text(figure, across, upper + label / 2, name, size=min(9, 90 * width / max(8, len(name))))
        for view, height in zip(views, heights, strict=True):
            size = (scale * edges[view.across], scale * edges[view.up])
            axes = add_panel(figure, (across, upper - height / 2), size)
            draw(axes, view.slice(volume, shape[view.through] // 2), "gray", window)
            if number == 0:
                add_letters(axes, view)
            upper -= height
    footer = "middle slices; " + footer_text(window_top, unit, window_bottom)
    write_text(figure, middle, foot / 2, footer, size=min(7.5, 260 * middle / len(footer)), colour=FAINT)
    return figure


def latent_strip(mu: np.ndarray, spacing: Sequence[float] = (STRIDE * SPACING,) * 3, title: str = "") -> Figure:
    """The channels of a latent side by side, each about its own mean in units of its own standard deviation.

    Channels differ severalfold in size: in one window for all the largest would be clipped and the smallest flat.

    Args:
        mu: posterior mean (C, D, H, W), RAS.
        spacing: of the latent's grid in mm, four times that of model space.
        title: of the whole picture.

    Returns:
        The figure, for `save_png`.

    Raises:
        ValueError: as in `volume_strip`.
    """
    means, deviations = mu.mean(axis=(1, 2, 3)), mu.std(axis=(1, 2, 3))
    channels = [(x - mean) / (sd or 1) for x, mean, sd in zip(mu, means, deviations, strict=True)]
    names = [f"channel {i}: sd {sd:.2f}" for i, sd in enumerate(deviations)]
    return volume_strip(channels, names, spacing, title, window_top=3, window_bottom=-3, unit="standard deviations")
