"""One picture of many volumes: a column each, three planes below each other, one window for all.

Decoding, sampling and interpolation show their results with it. See `pictures` for panels of one volume.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from scripts import pictures

__all__ = ["latent_strip", "volume_strip"]

PER_BAND = 8  # volumes side by side
EDGE = 1.5  # inches of the longest edge


def volume_strip(
    volumes: Sequence[np.ndarray],
    names: Sequence[str],
    spacing: Sequence[float] = (1.5, 1.5, 1.5),
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
    volumes = [pictures._checked_volume(volume, "volume") for volume in volumes]
    if not volumes or len(volumes) != len(names) or len({volume.shape for volume in volumes}) > 1:
        raise ValueError(f"volumes of one shape and as many names are needed, got {len(volumes)} and {len(names)}")
    shape = volumes[0].shape
    edges = pictures._edges(shape, spacing)
    scale = EDGE / max(edges)
    views = list(pictures.VIEWS.values())
    width = scale * max(edges[0], edges[1]) + 0.08
    heights = [scale * edges[view.up] + 0.08 for view in views]
    n_columns = min(PER_BAND, len(volumes))
    n_bands = ceil(len(volumes) / PER_BAND)
    head, label, foot = (0.4 if title else 0.1), 0.3, 0.3
    band = label + sum(heights)
    figure = Figure((max(6.0, n_columns * width), head + n_bands * band + foot), pictures.DPI, facecolor="black")
    top, middle = figure.get_figheight() - head, figure.get_figwidth() / 2
    if title:
        pictures._write(figure, middle, figure.get_figheight() - head / 2, title, size=11)
    window = Normalize(window_bottom, window_top)
    for number, (volume, name) in enumerate(zip(volumes, names, strict=True)):
        row, column = divmod(number, PER_BAND)
        across = middle + (column + 0.5 - n_columns / 2) * width
        upper = top - row * band - label
        pictures._write(figure, across, upper + label / 2, name, size=min(9, 90 * width / max(8, len(name))))
        for view, height in zip(views, heights, strict=True):
            size = (scale * edges[view.across], scale * edges[view.up])
            axes = pictures._add_panel(figure, (across, upper - height / 2), size)
            pictures._draw(axes, view.slice(volume, shape[view.through] // 2), "gray", window)
            if number == 0:
                pictures._letter(axes, view)
            upper -= height
    footer = "middle slices; " + pictures._footer(window_top, unit, window_bottom)
    pictures._write(figure, middle, foot / 2, footer, size=min(7.5, 260 * middle / len(footer)), colour=pictures.FAINT)
    return figure


def latent_strip(mu: np.ndarray, spacing: Sequence[float] = (6.0, 6.0, 6.0), title: str = "") -> Figure:
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
