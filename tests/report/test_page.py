"""The page of a report: whole in itself, the same bytes for the same data, safe from what names contain."""

from __future__ import annotations

import base64
import gzip
import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from scripts.report import CEILING, Report, add_volumes, facts_of, group_of, quantised
from scripts.report import page as report

VOLUME = np.linspace(0, 1, 8 * 9 * 7, dtype=np.float32).reshape(8, 9, 7)
NASTY = ["</script><script>alert(1)</script>", "<b>&amp;", "'\"", "sub-01\u2028é"]
# values, decimals
DIGITS = [
    ([1, 2, 30], 0), ([0.0143, 0.0371], 5), ([28.93, 24.1], 2), ([0.0, 0.0, 0.5], 4), ([0.002, 3.5], None),
    ([1e-9], 6), ([], 0), ([np.nan], 0),
]  # fmt: skip


def own(text: str) -> str:
    """The page without the library's code."""
    return re.sub(r'<script type="text/plain" id="niivue-library">.*?</script>', "", text, flags=re.DOTALL)


def page(n_volumes: int = 1, text: str = "a name") -> Report:
    """With a section of each kind, every text of it the same."""
    made = Report(text, {"weights": text})
    frame = pd.DataFrame({"name": [text, "a"], "psnr": [20.5, 21.25], "label": [text, "y"]})
    made.add_table(text, frame, ["label"], {"label": "y"}, {"psnr": True}, {"psnr": text})
    made.add_charts(text, [(text, "<svg></svg>")])
    made.add_pictures(text, [(text, Figure((1, 1)))])
    rng = np.random.default_rng(0)
    pairs = [rng.integers(0, 255, (2, 30, 30, 30), np.uint8) for _ in range(n_volumes)]
    made.add_viewer(text, [(f"{text} {n}", *pair, (1.5, 1.5, 1.5)) for n, pair in enumerate(pairs)])
    return made


def test_the_page_is_whole_in_itself() -> None:
    """No element names another place, the policy would forbid it too, and the same sections give the same bytes."""
    text = page().render()
    assert page().render() == text
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)|@import|url\(", own(text))
    assert "default-src 'none'" in text


def test_niivue_comes_only_with_a_viewer() -> None:
    """A page without volumes is small; one with them holds the library and its licence."""
    without, whole = Report("Title", {}).render(), page().render()
    assert len(without) < 50_000 and "BSD 2-Clause" not in without
    assert 'id="niivue-library"' in whole and "Copyright (c) 2021, Niivue" in whole


@pytest.mark.parametrize("text", NASTY)
def test_names_cannot_become_markup(text: str) -> None:
    """Neither in tags nor in the JSON of a script element."""
    rendered = own(page(text=text).render())
    assert "<script>alert" not in rendered and "<b>" not in rendered
    assert rendered.count("</script>") == rendered.count("<script")


def test_the_viewer_stops_where_the_page_would_be_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first volumes are kept, and the page says how many are not."""
    size = len(page(1).render())
    monkeypatch.setattr(report, "MOST_BYTES", size + 10_000)
    monkeypatch.setattr(report, "RESERVE", 0)
    text = page(5).render()
    assert len(text) <= size + 10_000 and "4 more would make this page too large" in text


def test_systems_share_the_image_of_a_scan() -> None:
    """One image with three reconstructions is stored once."""
    volumes = np.random.default_rng(0).integers(0, 255, (4, 30, 30, 30), np.uint8)
    made = Report("Title", {})
    made.add_viewer("Viewer", [("a", volumes[0], recon, (1, 1, 1)) for recon in volumes[1:]])
    assert made.render().count("data-pack=") - made.render().count('[data-pack="$') == 4


def test_a_packed_volume_is_a_nifti_in_units_of_the_scan() -> None:
    """Spacing and intensity are the volume's, to half of one of 256 steps."""
    made = Report("Title", {})
    made.add_viewer("Viewer", [("a", quantised(VOLUME)[0], None, (1.5, 2.0, 3.0))])
    (packed,) = made.sections[0]["packs"]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
    assert image.header.get_zooms() == (1.5, 2.0, 3.0)
    np.testing.assert_allclose(image.get_fdata(), VOLUME, atol=CEILING / 255 / 2 + 1e-6)


@given(top=st.floats(0.1, 1e4), value=st.floats(-10, 10))
def test_quantised_is_monotone_and_bounded(top: float, value: float) -> None:
    """Never off by more than half a step inside the range, at its ends outside."""
    step = CEILING * top / 255
    got = float(quantised(np.full((2, 2, 2), value * top), top)[0][0, 0, 0]) * step
    assert abs(got - np.clip(value * top, 0, CEILING * top)) <= step / 2 + 1e-3 * top


def test_fine_volumes_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over cubes, a remainder at the far edge cut off; what is not finite is black."""
    monkeypatch.setattr(report, "MOST_VOXELS", 8)
    packed, factor = quantised(np.kron(np.array([[[0.2, 0.4], [0.6, 0.8]]] * 2), np.ones((2, 2, 2))))
    assert factor == 2
    np.testing.assert_array_equal(packed[0], np.rint(np.array([[0.2, 0.4], [0.6, 0.8]]) * 255 / CEILING))
    packed, factor = quantised(np.pad(np.full((3, 3, 3), 0.5), ((0, 1), (0, 2), (0, 0)), constant_values=9.0))
    assert factor == 2 and packed.shape == (2, 2, 1)
    monkeypatch.undo()
    assert quantised(np.array([[[np.nan, np.inf, -np.inf, 0.5]]]))[0].tolist() == [[[0, 0, 0, 106]]]


@pytest.mark.parametrize(("values", "digits"), DIGITS)
def test_digits_show_four_figures(values: list[float], digits: int | None) -> None:
    """As many decimals as the column's typical value needs; None where sizes differ by a thousand."""
    made = Report("Title", {})
    made.add_table("T", pd.DataFrame({"x": pd.Series(values, dtype=float)}))
    assert f'"digits":{"null" if digits is None else digits},' in made.render()


def test_a_table_says_what_is_not_finite() -> None:
    """JSON has neither inf nor nan: they are texts, and a missing text is a dash."""
    made = Report("Title", {})
    made.add_table("T", pd.DataFrame({"psnr": [np.inf, np.nan, 1.5], "name": ["a", None, "c"]}), better={"psnr": True})
    rendered = made.render()
    assert '"rows":[["inf","a"],["nan",null],[1.5,"c"]]' in rendered and '"better":"more"' in rendered


def test_the_table_of_volumes_leaves_out_what_is_empty() -> None:
    """Session or label without a value is no column; volumes are told apart by label, else by split, else not."""
    rows = pd.DataFrame({"name": ["a", "b"], "session": "", "label": "", "split": ["train", "val"], "l1": [0.1, 0.2]})
    made = Report("Title", {})
    add_volumes(made, rows, {"split": "val"})
    table = json.loads(made.sections[0]["json"])
    assert [column["name"] for column in table["columns"]] == ["name", "split", "l1"]
    assert (table["filters"], table["initial"]) == (["split"], {"split": "val"})
    kinds = [rows.assign(label=["x", "y"]), rows, rows.assign(split="val")]
    assert [group_of(kind) for kind in kinds] == ["label", "split", ""]
    facts = facts_of(rows.assign(subject="s"), {"weights": "w"}, "val", command=False)
    assert facts["data"] == "2 volumes of 1 subjects, split val" and list(facts) == ["data", "weights", "bundle"]
