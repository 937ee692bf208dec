"""Records: names that are safe and hold still, splits that move nobody, cohorts that stay apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forms import touch, write

from scripts.cohort import demo, read_cohort, select, split_of
from scripts.run import InputError

# arguments, what the error says
BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"form": "dicom"}, "form is 'dicom'"),
    ({"val_fraction": float("nan")}, "val_fraction is nan"),
    ({"test_fraction": -0.1}, "test_fraction is -0.1"),
    ({"val_fraction": 0.6, "test_fraction": 0.6}, "more than 1"),
    ({"max_scans": 1.5}, "max_scans is 1.5"),
    *(({"dataset_dir": bad}, "dataset_dir is") for bad in ("['a", "[1, 2]", 7)),
]


def bids_root(root: Path, *subjects: str) -> Path:
    """Make a BIDS root."""
    return touch(root, *(f"{s}/anat/{s}_T1w.nii.gz" for s in subjects))


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], says: str) -> None:
    """Arguments are checked, with the value in the error."""
    with pytest.raises(InputError, match=says):
        read_cohort(**{"dataset_dir": str(touch(tmp_path, "a.nii")), **arguments})


@pytest.mark.parametrize("as_text", [False, True])
def test_several_cohorts(tmp_path: Path, as_text: bool) -> None:
    """A list, also as a command line's text, is put together; equal folder names and subjects stay apart."""
    folders = [str(bids_root(tmp_path / site / "data", "sub-01", "sub-02")) for site in "ab"]
    records = read_cohort(str(folders) if as_text else folders)
    assert [r["cohort"] for r in records] == ["data", "data", "data_2", "data_2"]
    assert [r["name"] for r in records] == [f"{c}_{s}_T1w" for c in ("data", "data_2") for s in ("sub-01", "sub-02")]


def test_persons_of_two_cohorts_differ(tmp_path: Path) -> None:
    """Explicit splits bind a person of one cohort; a file counts once, however it is reached."""
    touch(tmp_path, "x.nii", "y.nii")
    one = write(tmp_path / "x.csv", "image,subject,split\nx.nii,s,train\n")
    two = write(tmp_path / "y.csv", "image,subject,split\ny.nii,s,test\n")
    assert [(r["cohort"], r["split"]) for r in read_cohort([one, two])] == [("x", "train"), ("y", "test")]
    with pytest.raises(InputError, match="listed twice"):
        read_cohort([one, str(tmp_path / "x.nii")])


def test_names_tell_equal_stems_apart_and_hold_still(tmp_path: Path) -> None:
    """Sessions, folders, suffixes and case make different names; a short run and a split give those of the whole."""
    touch(tmp_path, "sub-1/ses-1/T1.nii", "sub-1/ses-2/T1.nii", "p/x/T1.nii", "p/y/t1.nii")
    touch(tmp_path, "s.nii", "s.nii.gz", "-o.nii")
    names = [r["name"] for r in read_cohort(str(tmp_path), form="folder")]
    assert {"sub-1_ses-1_T1", "sub-1_ses-2_T1", "p_x_T1", "p_y_t1", "o"} < set(names)
    assert len({name.casefold() for name in names}) == 7
    assert [r["name"] for r in read_cohort(str(tmp_path), "folder", max_scans=1, val_fraction=1)] == names[:1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "A", "b_a", "-a", "- a", "a.b", "x" * 120, "ü"]), min_size=1, max_size=5), st.data()
)
def test_names_are_safe_and_unique(
    tmp_path_factory: pytest.TempPathFactory, folders: list[str], data: st.DataObject
) -> None:
    """Whatever the paths, names are unique without case, keep to their folder and fit a file name."""
    parts = st.lists(st.sampled_from(folders), min_size=0, max_size=3)
    stems = data.draw(st.lists(st.tuples(parts, st.sampled_from(folders)), min_size=1, max_size=8))
    root = touch(tmp_path_factory.mktemp("n"), *("/".join([*where, f"{stem}.nii"]) for where, stem in stems))
    names = [r["name"] for r in read_cohort([str(root)], form="folder")]
    assert len({name.casefold() for name in names}) == len(names)
    assert all("/" not in n and n[0] not in ".-" and len(n.encode()) <= 200 for n in names)


def test_split_is_the_hash_of_the_subject() -> None:
    """The split of an id is fixed for ever; over 2,000 ids the shares lie within four standard errors (0.04)."""
    # printf sub-01 | sha256sum, first 16 digits over 16^16: 0.25686; sub-02: 0.06165
    found = [split_of("sub-01", 0.256, 0.01), split_of("sub-01", 0.257), split_of("sub-02", 0.06)]
    assert found == ["test", "val", "train"]
    counts = Counter(split_of(f"sub-{i}", 0.2, 0.3) for i in range(2000))
    assert abs(counts["val"] / 2000 - 0.2) < 0.04 and abs(counts["test"] / 2000 - 0.3) < 0.04


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text("abc0123", min_size=1, max_size=4), min_size=2, max_size=12), st.floats(0, 1), st.data())
def test_new_subject_moves_nobody(
    tmp_path_factory: pytest.TempPathFactory, subjects: set[str], fraction: float, data: st.DataObject
) -> None:
    """Adding a subject leaves every other one's split as it was; sessions fall together."""
    root = tmp_path_factory.mktemp("s")
    rows = [f"{s}{i}.nii,{s}" for s in sorted(subjects) for i in (1, 2)]
    touch(root, *(row.split(",")[0] for row in rows))
    fewer = [row for row in rows if not row.endswith("," + data.draw(st.sampled_from(sorted(subjects)), label="new"))]
    splits = []
    for number, lines in enumerate((rows, fewer or rows)):
        table = write(root / f"{number}.csv", "image,subject\n" + "\n".join(lines))
        records = read_cohort(table, val_fraction=fraction, test_fraction=(1 - fraction) / 2)
        splits.append({(r["subject"], r["split"]) for r in records})
    assert splits[1] <= splits[0]
    assert len(splits[0]) == len(subjects)


def test_empty_split_follows_the_subject(tmp_path: Path) -> None:
    """A row without a split goes where the subject's other rows go, else by hash."""
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    table = write(tmp_path / "t.csv", "image,subject,split\na.nii,s1,testing\nb.nii,s1,\nc.nii,s2,n/a\n")
    assert [r["split"] for r in read_cohort(table, val_fraction=1.0)] == ["test", "test", "val"]


def test_select(tmp_path: Path) -> None:
    """One split or all of them; what is empty or unknown is explained."""
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    records = read_cohort(write(tmp_path / "t.csv", "image,split\na.nii,train\nb.nii,val\nc.nii,train\n"))
    assert select(records, "all") == records
    assert select(records, "train") == records[::2] and select(records, "validation") == [records[1]]
    counts = r"3 subjects \(2 in train, 1 in val, 0 in test\).*raise test_fraction.*column 'split'"
    with pytest.raises(InputError, match=counts):
        select(records, "test")
    with pytest.raises(InputError, match="split is 'dev'"):
        select(records, "dev")


def test_demo_cohort_where_nothing_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty dataset_dir makes the demo cohort, of no more subjects than wanted."""
    asked: list[int] = []

    def made(n_subjects: int) -> Path:
        asked.append(n_subjects)
        return bids_root(tmp_path / "demo", "sub-01", "sub-02", "sub-03")

    monkeypatch.setattr(demo, "demo_cohort", made)
    assert [len(read_cohort(nothing)) for nothing in ("", [])] == [3, 3]
    assert [len(read_cohort("", max_scans=n)) for n in (2, 100)] == [2, 3]
    assert asked == [24, 24, 2, 24]
