"""The page of a report: whole in itself, the same bytes for the same data, safe from what names contain."""

from __future__ import annotations

import base64
import gzip
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from scripts.report import CEILING, Report, quantised
from scripts.report import page as report
from scripts.report.page import _digits

VOLUME = np.linspace(0, 1, 8 * 9 * 7, dtype=np.float32).reshape(8, 9, 7)
NASTY = ["</script><script>alert(1)</script>", "<b>&amp;", "'\"", "sub-01\u2028é"]
# values, decimals
DIGITS = [
    ([1, 2, 30], 0),
    ([0.0143, 0.0371], 5),
    ([28.93, 24.1], 2),
    ([0.0, 0.0, 0.5], 4),
    ([0.002, 3.5], None),
    ([1e-9], 6),
    ([], 0),
    ([np.nan], 0),
]


def own(text: str) -> str:
    """The page without the library's code."""
    return re.sub(r'<script type="text/plain" id="niivue-library">.*?</script>', "", text, flags=re.DOTALL)


def page(n_volumes: int = 1) -> Report:
    made = Report("Title", {"weights": "sha256 abc"})
    frame = pd.DataFrame({"name": ["b", "a"], "psnr": [20.5, 21.25], "label": ["x", "y"]})
    made.add_table("Volumes", frame, ["label"], {"label": "x"}, {"psnr": True}, {"psnr": "dB"})
    made.add_charts("Charts", [("a chart", "<svg></svg>")])
    made.add_pictures("Pictures", [("a picture", Figure((1, 1)))])
    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, 255, (2, 30, 30, 30), np.uint8) for _ in range(n_volumes)]
    made.add_viewer("Viewer", [(f"volume {n}", *pair, (1.5, 1.5, 1.5)) for n, pair in enumerate(pairs)])
    return made


def test_nothing_is_fetched():
    """No element of the page names another place; the policy would forbid it, too."""
    text = own(page().render())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", text)
    assert "default-src 'none'" in text and not re.search(r"@import|url\(", text)


def test_same_sections_give_the_same_bytes():
    assert page().render() == page().render()


def test_niivue_comes_only_with_a_viewer():
    """A page without volumes is small; one with them holds the library and its licence."""
    without, whole = Report("Title", {}).render(), page().render()
    assert len(without) < 50_000 and "BSD 2-Clause" not in without
    assert 'id="niivue-library"' in whole and "Copyright (c) 2021, Niivue" in whole


@pytest.mark.parametrize("text", NASTY)
def test_names_cannot_become_markup(text):
    made = Report(text, {"data": text})
    made.add_table(text, pd.DataFrame({"name": [text], "label": [text]}), ["label"])
    packed = quantised(VOLUME)[0]
    made.add_viewer(text, [(text, packed, None, (1, 1, 1))])
    made.add_pictures(text, [(text, Figure((1, 1)))])
    rendered = own(made.render())
    assert "<script>alert" not in rendered and "<b>" not in rendered
    assert rendered.count("</script>") == rendered.count("<script")


def test_viewer_stops_where_the_page_would_be_too_large(monkeypatch):
    """The first volumes are kept, and the page says how many are not."""
    size = len(page(1).render())
    monkeypatch.setattr(report, "MOST_BYTES", size + 10_000)
    monkeypatch.setattr(report, "RESERVE", 0)
    text = page(5).render()
    assert len(text) <= size + 10_000 and "4 more would make this page too large" in text


def test_systems_share_the_image_of_a_scan():
    """One image with three reconstructions is stored once."""
    volumes = np.random.default_rng(0).integers(0, 255, (4, 30, 30, 30), np.uint8)
    made = Report("Title", {})
    made.add_viewer("Viewer", [("a", volumes[0], recon, (1, 1, 1)) for recon in volumes[1:]])
    assert made.render().count("data-pack=") - made.render().count('[data-pack="$') == 4


def test_packed_volume_is_a_nifti_in_units_of_the_scan():
    packed = report._packed(quantised(VOLUME)[0], (1.5, 2.0, 3.0))
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
    assert image.header.get_zooms() == (1.5, 2.0, 3.0)
    np.testing.assert_allclose(image.get_fdata(), VOLUME, atol=CEILING / 255 / 2 + 1e-6)


@given(top=st.floats(0.1, 1e4), value=st.floats(-10, 10))
def test_quantised_is_monotone_and_bounded(top, value):
    """Never off by more than half a step inside the range, at its ends outside."""
    step = CEILING * top / 255
    got = float(quantised(np.full((2, 2, 2), value * top), top)[0][0, 0, 0]) * step
    assert abs(got - np.clip(value * top, 0, CEILING * top)) <= step / 2 + 1e-3 * top


def test_fine_volumes_are_averaged(monkeypatch):
    monkeypatch.setattr(report, "MOST_VOXELS", 8)
    volume = np.kron(np.array([[[0.2, 0.4], [0.6, 0.8]]] * 2), np.ones((2, 2, 2)))
    packed, factor = quantised(np.pad(volume, ((0, 1), (0, 0), (0, 0)), constant_values=9.0))
    assert factor == 3 or packed.shape == (2, 2, 2)
    packed, factor = quantised(volume)
    assert factor == 2
    np.testing.assert_array_equal(packed[0], np.rint(np.array([[0.2, 0.4], [0.6, 0.8]]) * 255 / CEILING))


def test_not_finite_voxels_are_black():
    assert quantised(np.array([[[np.nan, np.inf, -np.inf, 0.5]]]))[0].tolist() == [[[0, 0, 0, 106]]]


@pytest.mark.parametrize("values, digits", DIGITS)
def test_digits_show_four_figures(values, digits):
    assert _digits(pd.Series(values, dtype=float)) == digits


def test_table_says_what_is_not_finite():
    """JSON has neither inf nor nan: they are texts, and a missing text is a dash."""
    made = Report("Title", {})
    made.add_table("T", pd.DataFrame({"psnr": [np.inf, np.nan, 1.5], "name": ["a", None, "c"]}))
    assert '"rows":[["inf","a"],["nan",null],[1.5,"c"]]' in made.render()
