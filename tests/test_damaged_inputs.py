"""Damaged inputs through the readers that the jobs use: a clear sentence, or a correct result."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from damaged_inputs import CORPUS, LATENTS, SCAN, Case, Make, beside, flipped, latent_folder, outcome, written
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")

ANY = " "  # the sentence may name a scan or a subject of the table instead of the table
FEW = settings(max_examples=30, deadline=None)

bytes_changed = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
keys = st.sampled_from(["image", "subject", "session", "split", "label", "x", "training", "test", "scale_factor"])
texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["a.nii", "../a.nii", "n/a", "train"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys | texts, inner, max_size=4)
)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: ascii(case.name))
def test_every_input_ends_as_expected(case: Case, tmp_path: Path) -> None:
    """Refused in one sentence that names the file, or read; within 4 GB and 20 s; no file beside the input."""
    found, said = outcome(case, tmp_path)
    assert found == case.expected, said


def check(reader: str, make: Make, folder: Path, named: str = "") -> None:
    """An input that hypothesis has made up is refused clearly or read."""
    found, said = outcome(Case("", reader, make, "other", named), folder)
    assert found in ("refused", "same", "other"), said


@pytest.mark.parametrize(
    ("reader", "name", "within"),
    [("scan", "a.nii", 352), ("scan", "a.nii", len(SCAN)), *(("latent", f"x{ending}", 400) for ending in LATENTS)],
)
@FEW
@given(changes=bytes_changed)
def test_any_bytes(
    reader: str, name: str, within: int, changes: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of a scan or a latent, mostly among the first, where the headers are, set to values."""
    content = bytearray(SCAN if reader == "scan" else LATENTS[name[1:]])
    for share, value in changes:
        content[int(share * within)] = value
    check(reader, written(name, bytes(content)), tmp_path_factory.mktemp("bytes"), name)


@FEW
@given(document=documents, rows=st.lists(st.lists(texts | keys, max_size=5), max_size=6))
def test_any_document(document: Any, rows: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any JSON as datalist, as a line of the manifest and as statistics, and any table."""
    table = "\n".join(",".join(row) for row in [["image", *(rows[0] if rows else [])], *rows])
    text = json.dumps(document)
    check("cohort", beside("t.csv", table), tmp_path_factory.mktemp("table"), ANY)
    check("cohort", beside("t.json", text), tmp_path_factory.mktemp("datalist"), ANY)
    check("folder", latent_folder(document), tmp_path_factory.mktemp("folder"), "manifest.jsonl")
    check("statistics", written("latent_stats.json", text), tmp_path_factory.mktemp("statistics"), "latent_stats.json")


@pytest.mark.slow
def test_every_bit_of_a_header(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each bit of a NIfTI-1 header and its extension, one at a time; docs/robustness.md gives the counts."""
    counts: Counter[str] = Counter()
    for number in range(8 * 352):
        case = Case("", "scan", written("a.nii", flipped(SCAN, number // 8, number % 8)), "same")
        counts[outcome(case, tmp_path_factory.mktemp("bit"))[0]] += 1
    assert counts["same"] > counts["refused"] > counts["other"] > 0
    assert counts["same"] + counts["refused"] + counts["other"] == 8 * 352, counts
