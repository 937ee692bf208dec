"""Strips: every volume has its column, its name and one window; bands of eight."""

from __future__ import annotations

import numpy as np
import pytest

from scripts.report import figure_to_array, volume_strip

SHAPE = (28, 34, 28)


def blob(side: str = "right") -> np.ndarray:
    """A bright box in one half."""
    volume = np.zeros(SHAPE, np.float32)
    volume[{"right": slice(16, 24), "left": slice(4, 12)}[side], 8:26, 6:22] = 1
    return volume


@pytest.mark.parametrize(("n", "panels"), [(1, 3), (8, 24), (9, 27), (16, 48)])
def test_every_volume_has_three_planes(n: int, panels: int) -> None:
    """Axial, coronal, sagittal of each, and all names are written."""
    names = [f"volume {number}" for number in range(n)]
    figure = volume_strip([blob()] * n, names)
    assert len(figure.axes) == panels
    assert set(names) <= {text.get_text() for text in figure.texts}


def test_left_is_on_the_left() -> None:
    """A box in the right half of RAS is bright right of its panel's middle, in the axial and the coronal plane."""
    for side, brighter in (("right", 1), ("left", 0)):
        figure = volume_strip([blob(side)], ["x"])
        for axes in figure.axes[:2]:
            shown = np.asarray(axes.images[0].get_array())
            halves = shown[:, : shown.shape[1] // 2].mean(), shown[:, shown.shape[1] // 2 :].mean()
            assert halves[brighter] > halves[1 - brighter]


def test_all_volumes_share_one_window() -> None:
    """A volume at half the intensity is drawn half as bright, so that samples can be compared."""
    figure = volume_strip([blob(), 0.5 * blob()], ["a", "b"])
    assert {axes.images[0].norm.vmax for axes in figure.axes} == {1.0}


def test_nothing_is_cut_off() -> None:
    """No text reaches beyond the picture, however narrow it is or long the name."""
    figure = volume_strip([blob()], ["a name as long as some scanners write it"], title="a title")
    figure_to_array(figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for text in figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text.get_text()


@pytest.mark.parametrize(
    ("volumes", "names"),
    [([], []), ([blob()], []), ([blob(), blob()[:-1]], ["a", "b"]), ([blob()[0]], ["a"])],
    ids=["none", "no names", "shapes", "a slice"],
)
def test_what_cannot_be_drawn_is_refused(volumes: list[np.ndarray], names: list[str]) -> None:
    """ValueError, no empty picture."""
    with pytest.raises(ValueError, match="volume"):
        volume_strip(volumes, names)
