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
from matplotlib.figure import Figure

from scripts.report import CEILING, Report, add_volumes, quantised

VOLUME = np.linspace(0, 1, 8 * 9 * 7, dtype=np.float32).reshape(8, 9, 7)
NASTY = ["</script><script>alert(1)</script>", "<b>&amp;", "'\""]


def own(text: str) -> str:
    """The page without the library's code."""
    return re.sub(r'<script type="text/plain" id="niivue-library">.*?</script>', "", text, flags=re.DOTALL)


def page(text: str = "a name") -> Report:
    """With a section of each kind, every text of it the same."""
    made = Report(text, {"weights": text})
    frame = pd.DataFrame({"name": [text, "a"], "psnr": [20.5, 21.25], "label": [text, "y"]})
    made.add_table(text, frame, ["label"], {"label": "y"}, {"psnr": True}, {"psnr": text})
    made.add_charts(text, [(text, "<svg></svg>")])
    made.add_pictures(text, [(text, Figure((1, 1)))])
    volume = np.random.default_rng(0).integers(0, 255, (30, 30, 30), np.uint8)
    made.add_viewer(text, [(text, volume, volume, (1.5, 1.5, 1.5))])
    return made


def test_the_page_is_whole_in_itself() -> None:
    """No element names another place, the policy would forbid it too, and the same sections give the same bytes."""
    text = page().render()
    assert page().render() == text
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)|@import|url\(", own(text))
    assert "default-src 'none'" in text and "Copyright (c) 2021, Niivue" in text
    assert len(Report("Title", {}).render()) < 50_000, "the library comes only with a viewer"


@pytest.mark.parametrize("text", NASTY)
def test_names_cannot_become_markup(text: str) -> None:
    """Neither in tags nor in the JSON of a script element."""
    rendered = own(page(text=text).render())
    assert "<script>alert" not in rendered and "<b>" not in rendered
    assert rendered.count("</script>") == rendered.count("<script")


def test_a_packed_volume_is_a_nifti_in_units_of_the_scan() -> None:
    """Spacing and intensity are the volume's, to half of one of 256 steps."""
    made = Report("Title", {})
    made.add_viewer("Viewer", [("a", quantised(VOLUME)[0], None, (1.5, 2.0, 3.0))])
    (packed,) = made.sections[0]["packs"]
    image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(packed)))
    assert image.header.get_zooms() == (1.5, 2.0, 3.0)
    np.testing.assert_allclose(image.get_fdata(), VOLUME, atol=CEILING / 255 / 2 + 1e-6)


def test_a_table_says_what_is_not_finite() -> None:
    """JSON has neither inf nor nan: they are texts, and a missing text is a dash."""
    made = Report("Title", {})
    made.add_table("T", pd.DataFrame({"psnr": [np.inf, np.nan, 1.5], "name": ["a", None, "c"]}), better={"psnr": True})
    rendered = made.render()
    assert '"rows":[["inf","a"],["nan",null],[1.5,"c"]]' in rendered and '"better":"more"' in rendered


def test_the_table_of_volumes_leaves_out_what_is_empty() -> None:
    """Session or label without a value is no column."""
    rows = pd.DataFrame({"name": ["a", "b"], "session": "", "label": "", "split": ["train", "val"], "l1": [0.1, 0.2]})
    made = Report("Title", {})
    add_volumes(made, rows, {"split": "val"})
    table = json.loads(made.sections[0]["json"])
    assert [column["name"] for column in table["columns"]] == ["name", "split", "l1"]
    assert (table["filters"], table["initial"]) == (["split"], {"split": "val"})
