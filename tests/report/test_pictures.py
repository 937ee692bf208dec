"""Pictures of volumes: left is on the left, shapes are right in millimetres, one window, the same bytes each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.figure import Figure

from scripts.report import figure_to_array, latent_strip, mosaic, recon_panel, save_png, to_ras, volume_strip

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
CUBE = np.ones((4, 4, 4), np.float32)
WRONG: list[tuple[Callable[..., Figure], dict[str, Any], str]] = [
    (recon_panel, {"image": CUBE[0]}, r"image must be \(D, H, W\)"),
    (recon_panel, {"recon": CUBE[1:]}, "one shape"),
    (recon_panel, {"spacing": (1.5, 0, 1.5)}, "spacing"),
    (recon_panel, {"difference_share": 0}, "difference_share"),
    (mosaic, {"axis": "oblique"}, "axis"),
    (mosaic, {"window_top": -1.0}, "window_top"),
    (volume_strip, {"names": []}, "volume"),
    (volume_strip, {"volumes": [CUBE, CUBE[1:]], "names": ["a", "b"]}, "volume"),
]
RIGHT = {
    recon_panel: {"image": CUBE, "recon": CUBE}, mosaic: {"volume": CUBE},
    volume_strip: {"volumes": [CUBE], "names": ["a"]},
}  # fmt: skip


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
        quarters = {
            (x, y): pixels[int(height * (0.15 + 0.5 * y)) : int(height * (0.35 + 0.5 * y))][
                :, int(width * (0.15 + 0.5 * x)) : int(width * (0.35 + 0.5 * x))
            ].mean()
            for x in (0, 1)
            for y in (0, 1)
        }
        assert max(quarters, key=quarters.__getitem__) == (across, down)
        assert quarters[across, down] > 200 and sorted(quarters.values())[-2] < 80


def test_the_picture_says_what_it_shows() -> None:
    """Convention, title, columns, window, unit and slice positions are on it; a dollar sign is plain text."""
    figure = recon_panel(blob_volume((0, 0, 0)), blob_volume((0, 0, 0)), title="sub-$1$_T1w", unit="scanner units")
    said = "\n".join(text.get_text() for text in figure.texts)
    words = ["neurological", "sub-$1$_T1w", "original", "reconstruction", "difference", "0 to 1 scanner units"]
    assert [word for word in [*words, "x 15 of 30", "y 21 of 40", "z 19 of 36"] if word not in said] == []
    assert "reconstruction - original (scanner units)" in figure.axes[9].get_ylabel()


@pytest.mark.parametrize("spacing", [(0.8, 1.5, 3.0), (5.0, 1.5, 1.5)])
def test_panels_have_the_shape_of_the_body(spacing: tuple[float, ...]) -> None:
    """Whatever the spacing, a panel's extent in pixels is its extent in millimetres, one scale for all."""
    figure = recon_panel(np.ones(SHAPE), np.ones(SHAPE), spacing)
    x, y, z = (size * step for size, step in zip(SHAPE, spacing, strict=True))
    scale = 330 / max(x, y, z)  # 3 inches at 110 dpi
    rows, columns = figure_to_array(figure).shape[:2]
    for row, (across, up) in enumerate([(x, y), (x, z), (y, z)]):
        _, _, width, height = figure.axes[3 * row].get_position().bounds
        assert (width * columns, height * rows) == pytest.approx((across * scale, up * scale), abs=1)
        assert np.quantile(panel_pixels(figure, row, 0), 0.1) > 250  # the volume fills it, but for the letters


def test_windows_and_colours() -> None:
    """One window from the original; no difference is black, too bright warm, too dark cold, both ends equally far."""
    volume = np.full(SHAPE, 100, np.float32)
    figures = [recon_panel(volume, volume + step) for step in (0, 12, -12)]
    same, bright, dark = (panel_pixels(figure, 0, 2)[60:100, 60:100] for figure in figures)
    assert same.max() <= 1
    assert bright[..., 0].mean() > 2 * bright[..., 2].mean() and dark[..., 2].mean() > 2 * dark[..., 0].mean()
    norms = [axes.images[0].norm for axes in figures[1].axes[:3]]
    assert [(norm.vmin, norm.vmax) for norm in norms] == [(0, 100), (0, 100), (-25, 25)]


@pytest.mark.parametrize(
    ("shape", "value"), [((1, 1, 1), 0), ((3, 2, 5), np.nan), ((1, 60, 2), -3), ((2, 2, 90), np.inf)]
)
@pytest.mark.filterwarnings("error")
def test_odd_volumes_make_a_picture(shape: tuple[int, ...], value: float) -> None:
    """Tiny, flat, constant, empty and not-finite volumes are drawn without a warning."""
    volume = np.full(shape, value)
    assert figure_to_array(recon_panel(volume, volume)).shape[2] == 3
    assert figure_to_array(mosaic(volume, 4, "sagittal")).dtype == np.uint8


@pytest.mark.parametrize(("draw", "change", "message"), WRONG)
def test_wrong_arguments_are_named(draw: Callable[..., Figure], change: dict[str, Any], message: str) -> None:
    """A programming error raises with the argument's name."""
    with pytest.raises(ValueError, match=message):
        draw(**{**RIGHT[draw], **change})


def test_mosaic_spreads_over_the_foreground() -> None:
    """Slices are in order, distinct, inside the foreground, and as many as asked for or as there are."""
    volume = np.zeros((20, 20, 60), np.float32)
    volume[5:15, 5:15, 20:50] = 1
    numbers = [int(text.get_text()) for text in mosaic(volume, 6).texts if text.get_text().isdigit()]
    assert numbers == [23, 28, 33, 38, 43, 48]  # counted from 1
    assert (len(mosaic(volume, 100).axes), len(mosaic(volume, 100, "coronal").axes)) == (30, 10)
    assert mosaic(volume, 1, window_top=100).axes[0].images[0].norm.vmax == 100


@pytest.mark.parametrize("n", [1, 8, 9])
def test_a_strip_shows_every_volume(n: int) -> None:
    """Three planes of each and its name, in bands of eight, in one window, so that samples can be compared."""
    names = [f"volume {number}" for number in range(n)]
    figure = volume_strip([blob_volume((1, 0, 0)) / (number + 1) for number in range(n)], names)
    assert len(figure.axes) == 3 * n and set(names) <= {text.get_text() for text in figure.texts}
    assert {axes.images[0].norm.vmax for axes in figure.axes} == {1.0}
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == (3 if n <= 8 else 6)
    assert edge_letters(figure, 0) == LETTERS[0] and edge_letters(figure, 2) == LETTERS[2]
    axial = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(axial, blob_volume((1, 0, 0))[:, :, SHAPE[2] // 2].T)  # R to the right, A up


def test_channels_of_a_latent_are_in_their_own_units() -> None:
    """Each about its mean in standard deviations, from -3 to 3; one that is constant is grey."""
    mu = np.random.default_rng(0).normal([[[[5.0]]], [[[-1.0]]]], [[[[0.1]]], [[[9.0]]]], (2, 6, 7, 8))
    figure = latent_strip(np.concatenate([mu, np.full((1, 6, 7, 8), 4.0)]))
    shown = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[::3]]
    for picture, channel in zip(shown, mu, strict=False):
        np.testing.assert_allclose(picture, ((channel - channel.mean()) / channel.std())[:, :, 4].T, atol=1e-5)
    assert not shown[2].any()
    assert (figure.axes[0].images[0].norm.vmin, figure.axes[0].images[0].norm.vmax) == (-3, 3)


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    """No date, no software name: same input, same bytes; the file has the size of the array."""
    for name in ("a", "b"):
        figure = recon_panel(blob_volume((1, 0, 1)), 0.9 * blob_volume((1, 0, 1)), title="sub-01")
        save_png(figure, tmp_path / "new" / f"{name}.png")
    first, second = ((tmp_path / "new" / f"{name}.png").read_bytes() for name in ("a", "b"))
    assert pyplot.get_fignums() == []  # threads and notebooks keep their own state
    assert first == second and not any(word in first for word in (b"Software", b"matplotlib", b"tEXt", b"tIME"))
    height, width = figure_to_array(figure).shape[:2]
    assert first[16:24] == width.to_bytes(4, "big") + height.to_bytes(4, "big")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while writing leaves the former picture and no rubbish."""
    (tmp_path / "picture.png").write_bytes(b"old")
    figure = mosaic(CUBE, 1)
    monkeypatch.setattr(figure, "savefig", lambda path, **_: Path(path).write_bytes(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        save_png(figure, tmp_path / "picture.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


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
