"""Pictures of volumes: left is on the left, shapes are right in millimetres, one window."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from scripts.report import figure_to_array, latent_strip, recon_panel, to_ras

SHAPE = (30, 40, 36)  # three different edges, so that a swapped axis shows
# Corner of the volume towards R, A, S (1) or L, P, I (0); then, for each row of the panel, the half of the picture in
# which it must appear: column (left 0, right 1), row (top 0, bottom 1). Sagittal: anterior is on the left.
CORNERS = [
    ((0, 0, 0), [(0, 1), (0, 1), (1, 1)]),
    ((1, 0, 0), [(1, 1), (1, 1), (1, 1)]),
    ((0, 1, 0), [(0, 0), (0, 1), (0, 1)]),
    ((0, 0, 1), [(0, 1), (0, 0), (1, 0)]),
]
LETTERS = ["LRAP", "LRSI", "APSI"]  # of axial, coronal, sagittal: left, right, top, bottom


def blob_volume(corner: tuple[int, ...]) -> np.ndarray:
    """A grey volume with a bright octant in one corner; the octant reaches the middle slices of all three axes."""
    volume = np.full(SHAPE, 0.2, np.float32)
    sides = zip(SHAPE, corner, strict=True)
    volume[tuple(slice(size // 2 - 2, None) if side else slice(size // 2 + 2) for size, side in sides)] = 1
    return volume


def panel_pixels(figure: Figure, row: int, column: int) -> np.ndarray:
    """Pixels (height, width, 3) of one panel of `recon_panel`; its axes are added row by row."""
    picture = figure_to_array(figure)
    left, bottom, width, height = figure.axes[3 * row + column].get_position().bounds
    rows, columns = picture.shape[:2]
    top = round((1 - bottom - height) * rows)
    return picture[top : top + round(height * rows), round(left * columns) : round((left + width) * columns)]


def edge_letters(figure: Figure, panel: int) -> str:
    """What stands left, right, at the top and at the bottom of a panel."""
    at = figure.axes[panel].texts
    picks: list[tuple[Any, int]] = [(min, 0), (max, 0), (max, 1), (min, 1)]
    return "".join(pick(at, key=lambda t, axis=axis: t.get_position()[axis]).get_text() for pick, axis in picks)


@pytest.mark.parametrize(("corner", "halves"), CORNERS)
def test_a_corner_appears_where_the_letters_say(corner: tuple[int, ...], halves: list[tuple[int, int]]) -> None:
    """The bright corner of an asymmetric volume is in the expected quarter of each rendered panel."""
    figure = recon_panel(blob_volume(corner), blob_volume(corner))
    for row, (across, down) in enumerate(halves):
        assert [edge_letters(figure, 3 * row + column) for column in range(3)] == [LETTERS[row]] * 3
        pixels = panel_pixels(figure, row, 0)[..., 0].astype(float)
        height, width = pixels.shape
        # The middles of the quarters: letters are at the edges and cannot touch them.
        spans = [[slice(int(n * (0.15 + half)), int(n * (0.35 + half))) for half in (0, 0.5)] for n in (width, height)]
        quarters = {(x, y): pixels[spans[1][y], spans[0][x]].mean() for x in (0, 1) for y in (0, 1)}
        assert max(quarters, key=quarters.__getitem__) == (across, down)
        assert quarters[across, down] > 200 and sorted(quarters.values())[-2] < 80


def test_panels_have_the_shape_of_the_body() -> None:
    """Whatever the spacing, a panel's extent in pixels is its extent in millimetres, one scale for all."""
    figure = recon_panel(np.ones(SHAPE), np.ones(SHAPE), (0.8, 1.5, 3.0))
    x, y, z = np.multiply(SHAPE, (0.8, 1.5, 3.0))
    scale = 330 / max(x, y, z)  # 3 inches at 110 dpi
    rows, columns = figure_to_array(figure).shape[:2]
    for row, (across, up) in enumerate([(x, y), (x, z), (y, z)]):
        _, _, width, height = figure.axes[3 * row].get_position().bounds
        assert (width * columns, height * rows) == pytest.approx((across * scale, up * scale), abs=1)
        assert np.quantile(panel_pixels(figure, row, 0), 0.1) > 250  # the volume fills it, but for the letters


def test_windows_are_the_originals() -> None:
    """From 0 to the original's 99.5th percentile; the difference's ends are a quarter of it away from 0."""
    volume = np.full(SHAPE, 100, np.float32)
    norms = [axes.images[0].norm for axes in recon_panel(volume, volume + 12).axes[:3]]
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(0, 100), (0, 100), (-25, 25)]


def test_channels_of_a_latent_are_in_their_own_units() -> None:
    """Each about its mean in standard deviations, from -3 to 3; one that is constant is grey."""
    mu = np.random.default_rng(0).normal([[[[5.0]]], [[[-1.0]]]], [[[[0.1]]], [[[9.0]]]], (2, 6, 7, 8))
    figure = latent_strip(np.concatenate([mu, np.full((1, 6, 7, 8), 4.0)]))
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[::3]]
    for picture, channel in zip(shown, mu, strict=False):
        np.testing.assert_allclose(picture, ((channel - channel.mean()) / channel.std())[:, :, 4].T, atol=1e-5)
    assert not shown[2].any()
    assert (figure.axes[0].images[0].norm.vmin, figure.axes[0].images[0].norm.vmax) == (-3, 3)


@settings(max_examples=12, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([1, -1])] * 3))
def test_to_ras_undoes_any_storage(order: list[int], signs: tuple[int, ...]) -> None:
    """However the voxels are stored, the world decides: the RAS volume and its spacing come back."""
    volume, affine = np.arange(24, dtype=np.int64).reshape(2, 3, 4), np.diag([1.0, 1.5, 2.0, 1.0])
    turn = np.column_stack([order, signs])
    stored = nib.orientations.apply_orientation(volume, turn)
    array, spacing = to_ras(stored, affine @ nib.orientations.inv_ornt_aff(turn, volume.shape))
    np.testing.assert_array_equal(array, volume)
    assert spacing == pytest.approx((1.0, 1.5, 2.0))
