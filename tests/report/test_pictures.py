from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from scripts.report import figure_to_array, mosaic, recon_panel, save_png, to_ras
from scripts.run import InputError

SHAPE = (30, 40, 36)  # three different edges, so that a swapped axis shows
# Corner of the volume towards R, A, S (1) or L, P, I (0); then, for each row of the panel, the half of the picture in
# which it must appear: column (left 0, right 1), row (top 0, bottom 1). Sagittal: anterior is on the left.
CORNERS = [
    ((0, 0, 0), {"axial": (0, 1), "coronal": (0, 1), "sagittal": (1, 1)}),
    ((1, 0, 0), {"axial": (1, 1), "coronal": (1, 1), "sagittal": (1, 1)}),
    ((0, 1, 0), {"axial": (0, 0), "coronal": (0, 1), "sagittal": (0, 1)}),
    ((0, 0, 1), {"axial": (0, 1), "coronal": (0, 0), "sagittal": (1, 0)}),
    ((1, 1, 1), {"axial": (1, 0), "coronal": (1, 0), "sagittal": (0, 0)}),
]
LETTERS = {"axial": "LRAP", "coronal": "LRSI", "sagittal": "APSI"}  # left, right, top, bottom
ROWS = ["axial", "coronal", "sagittal"]
BAD_CALLS = [
    (dict(image=np.zeros((4, 4))), r"image must be \(D, H, W\)"),
    (dict(image=np.zeros((0, 4, 4)), recon=np.zeros((0, 4, 4))), "not empty"),
    (dict(recon=np.zeros((4, 4, 5))), "one shape"),
    (dict(spacing=(1.5, 0, 1.5)), "spacing"),
    (dict(spacing=(1.5, 1.5)), "spacing"),
    (dict(difference_share=0), "difference_share"),
]


def blob_volume(corner: tuple[int, ...], shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """A grey volume with a bright octant in one corner; the octant reaches the middle slices of all three axes."""
    volume = np.full(shape, 0.2, np.float32)
    sides = zip(shape, corner, strict=True)
    octant = tuple(slice(size // 2 - 2, None) if side else slice(size // 2 + 2) for size, side in sides)
    volume[octant] = 1
    return volume


def panel_pixels(figure: Figure, row: int, column: int) -> np.ndarray:
    """Pixels (height, width, 3) of one panel of `recon_panel`; its axes are added row by row."""
    picture = figure_to_array(figure)
    left, bottom, width, height = figure.axes[3 * row + column].get_position().bounds
    rows, columns = picture.shape[:2]
    top = round((1 - bottom - height) * rows)
    return picture[top : top + round(height * rows), round(left * columns) : round((left + width) * columns)]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize("corner, halves", CORNERS)
def test_a_corner_appears_where_the_letters_say(corner: tuple[int, ...], halves: dict[str, tuple[int, int]]) -> None:
    """The bright corner of an asymmetric volume is in the expected quarter of each rendered panel."""
    volume = blob_volume(corner)
    figure = recon_panel(volume, volume)
    for row, name in enumerate(ROWS):
        pixels = panel_pixels(figure, row, 0)[..., 0].astype(float)
        height, width = pixels.shape
        across, down = halves[name]
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


@pytest.mark.parametrize("row, name", list(enumerate(ROWS)))
def test_letters_stand_at_their_edges(row: int, name: str) -> None:
    """Each panel names its left, right, top and bottom edge."""
    volume = blob_volume((1, 1, 1))
    for column in range(3):
        texts_of_panel = recon_panel(volume, volume).axes[3 * row + column].texts
        left, right, top, bottom = (
            pick(texts_of_panel, key=lambda text: text.get_position()[axis]).get_text()
            for pick, axis in ((min, 0), (max, 0), (max, 1), (min, 1))
        )
        assert left + right + top + bottom == LETTERS[name]


def test_the_picture_says_what_it_shows() -> None:
    """Convention, title, columns, window, unit and slice positions are on the picture; a dollar sign is plain text."""
    figure = recon_panel(blob_volume((0, 0, 0)), blob_volume((0, 0, 0)), title="sub-$1$_T1w", unit="scanner units")
    for word in ("neurological", "sub-$1$_T1w", "original", "reconstruction", "difference", "0 to 1 scanner units"):
        assert word in texts(figure)
    for position in ("x 15 of 30", "y 21 of 40", "z 19 of 36"):
        assert position in texts(figure)
    assert "reconstruction - original (scanner units)" in figure.axes[9].get_ylabel()
    figure_to_array(figure)


@settings(max_examples=5, deadline=None)
@given(st.tuples(*[st.sampled_from([0.8, 1.5, 3.0, 5.0])] * 3))
def test_panels_have_the_shape_of_the_body(spacing: tuple[float, ...]) -> None:
    """Whatever the spacing, a panel's extent in pixels is its extent in millimetres, one scale for all."""
    volume = np.ones(SHAPE, np.float32)
    figure = recon_panel(volume, volume, spacing)
    x, y, z = (size * step for size, step in zip(SHAPE, spacing, strict=True))
    scale = 330 / max(x, y, z)  # 3 inches at 110 dpi
    white = (figure_to_array(figure) > 250).all(axis=-1)
    for row, (across, up) in enumerate([(x, y), (x, z), (y, z)]):
        left, bottom, width, height = figure.axes[3 * row].get_position().bounds
        rows, columns = white.shape
        # A line of pixels along each axis, through the panel but beside the letters on its middle lines.
        line = white[round((1 - bottom - height * 0.7) * rows), : round((left + width) * columns) + 3]
        column = white[:, round((left + width * 0.3) * columns)]
        column = column[round((1 - bottom - height) * rows) - 3 : round((1 - bottom) * rows) + 3]
        # One pixel of rounding at each edge.
        assert line.sum() == pytest.approx(across * scale, abs=2)
        assert column.sum() == pytest.approx(up * scale, abs=2)


def test_original_and_reconstruction_share_one_window() -> None:
    """A reconstruction at half the brightness is half as bright; the window comes from the original alone."""
    volume = np.full(SHAPE, 800, np.float32)
    figure = recon_panel(volume, volume / 2)
    original, recon = (panel_pixels(figure, 0, column)[60:100, 60:100].mean() for column in (0, 1))
    assert original == 255 and recon == pytest.approx(127.5, abs=1)


def test_difference_is_black_at_zero_and_symmetric() -> None:
    """No difference is black; too bright is warm, too dark is cold; both ends are the same intensity apart."""
    volume = np.full(SHAPE, 100, np.float32)
    figures = [recon_panel(volume, volume + step) for step in (0, 12, -12)]
    same, bright, dark = (panel_pixels(figure, 0, 2)[60:100, 60:100] for figure in figures)
    assert same.max() <= 1
    assert bright[..., 0].mean() > 2 * bright[..., 2].mean() and dark[..., 2].mean() > 2 * dark[..., 0].mean()
    norm = recon_panel(volume, volume).axes[2].images[0].norm
    assert (norm.vmin, norm.vmax) == (-25, 25)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (1, 60, 2), (2, 2, 90)])
@pytest.mark.parametrize("value", [0.0, -3.0, 7.0, np.nan, np.inf])
def test_odd_volumes_make_a_picture(shape: tuple[int, ...], value: float) -> None:
    """Tiny, flat, constant, empty and not-finite volumes are drawn without a warning."""
    volume = np.full(shape, value)
    assert figure_to_array(recon_panel(volume, volume)).shape[2] == 3
    assert figure_to_array(mosaic(volume, 4, "sagittal")).dtype == np.uint8


@pytest.mark.parametrize("change, message", BAD_CALLS)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    """A programming error raises with the argument's name."""
    with pytest.raises(ValueError, match=message):
        recon_panel(**{"image": np.zeros((4, 4, 4)), "recon": np.zeros((4, 4, 4)), **change})


@pytest.mark.parametrize("change", [{"axis": "oblique"}, {"n_slices": 0}, {"window_top": -1.0}, {"volume": np.ones(3)}])
def test_mosaic_refuses_wrong_arguments(change: dict) -> None:
    """As above, for the mosaic."""
    with pytest.raises(ValueError, match=next(iter(change))):
        mosaic(**{"volume": np.ones((4, 4, 4)), **change})


def test_mosaic_spreads_over_the_foreground() -> None:
    """Slices are in order, distinct, inside the foreground, and as many as asked for or as there are."""
    volume = np.zeros((20, 20, 60), np.float32)
    volume[5:15, 5:15, 20:50] = 1
    figure = mosaic(volume, 6)
    numbers = [int(text.get_text()) for text in figure.texts if text.get_text().isdigit()]
    assert numbers == [23, 28, 33, 38, 43, 48]  # counted from 1
    assert len(mosaic(volume, 100).axes) == 30
    assert len(mosaic(volume, 100, "coronal").axes) == 10


def test_mosaic_window_can_be_given() -> None:
    """Two mosaics can share a window."""
    figure = mosaic(np.full((9, 9, 9), 50, np.float32), 1, window_top=100)
    height, width = figure_to_array(figure).shape[:2]
    # Off the centre, where no letter stands.
    assert figure_to_array(figure)[int(height * 0.4), int(width * 0.45)].mean() == pytest.approx(127.5, abs=1)


def test_the_same_picture_is_the_same_file(tmp_path: Path) -> None:
    """No date, no software name: same input, same bytes; the file has the size of the array."""
    volume = blob_volume((1, 0, 1))
    for name in ("a", "b"):
        save_png(recon_panel(volume, 0.9 * volume, title="sub-01"), tmp_path / "new" / f"{name}.png")
    first, second = (tmp_path / "new" / f"{name}.png" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert not any(word in first.read_bytes() for word in (b"Software", b"matplotlib", b"tEXt", b"tIME"))
    height, width = figure_to_array(recon_panel(volume, volume)).shape[:2]
    assert first.read_bytes()[16:24] == width.to_bytes(4, "big") + height.to_bytes(4, "big")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while writing leaves the former picture and no rubbish."""
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")
    figure = mosaic(np.ones((4, 4, 4)), 1)

    def broken(path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("disk")

    monkeypatch.setattr(figure, "savefig", broken)
    with pytest.raises(RuntimeError):
        save_png(figure, target)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"] and target.read_bytes() == b"old"


def test_a_folder_that_is_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    """The error is one sentence about the folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_png(mosaic(np.ones((4, 4, 4)), 1), tmp_path / "file" / "picture.png")


@settings(max_examples=12, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([1, -1])] * 3))
def test_to_ras_undoes_any_storage(order: list[int], signs: tuple[int, ...]) -> None:
    """However the voxels are stored, the world decides: the RAS volume and its spacing come back."""
    volume = np.arange(24, dtype=np.int64).reshape(2, 3, 4)
    affine = np.diag([1.0, 1.5, 2.0, 1.0])
    turn = np.column_stack([order, signs])
    stored = nib.orientations.apply_orientation(volume, turn)
    array, spacing = to_ras(stored, affine @ nib.orientations.inv_ornt_aff(turn, volume.shape))
    np.testing.assert_array_equal(array, volume)
    assert spacing == pytest.approx((1.0, 1.5, 2.0))


def test_pyplot_is_never_imported() -> None:
    """Threads and notebooks keep their own global state."""
    code = "import sys, scripts.report.pictures; sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
