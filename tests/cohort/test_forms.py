"""Every form of a cohort becomes the same kind of scans, and every mistake in it one sentence that names the place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scripts.cohort import read_cohort, recognise, scan_stem
from scripts.run import InputError

KEYS = ["image", "name", "subject", "session", "label", "split", "cohort"]
START = "participant_id\tage\n"
STEMS = {"a/scan.nii": "scan", "scan.v1.2.nii.gz": "scan.v1.2", "T1.MGH": "T1", "notes.txt": "notes.txt"}
FORMS = {"a.csv": "csv", "a.TSV": "csv", "a.json": "datalist", "a.nii": "file", "one": "bids", "two": "folder"}
# path in the folder, expected subject, expected session
PERSONS = [
    ("sub-07/ses-2/T1.nii.gz", "sub-07", "ses-2"),
    ("sub-study/site_sub-07_T1w.nii", "sub-07", ""),
    ("bert/mri/T1.mgz", "bert", ""),
    ("patient1/T1.nii.gz", "patient1_T1", ""),
]
# how it lies on disk, more arguments, what the error says; beside it lie scans a.nii, b.nii, b.txt and c.dcm
BAD: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"t.csv": "file,age\nx,3\n"}, {}, "no column 'image' but file, age"),
    ({"t.csv": "image\n"}, {}, "lists no scan"),
    ({"t.csv": "image,image\na.nii,b.nii\n"}, {}, "the column 'image' twice"),
    ({"t.csv": "image,split\na.nii,fold1\n"}, {}, "row 2: the split is 'fold1'"),
    ({"t.csv": "image\na.nii\nb.txt\n"}, {}, "row 3: b.txt has the suffix '.txt'"),
    ({"t.csv": "image\n.\n"}, {}, "row 2: . is a folder"),
    ({"t.csv": "image,x\na.nii,1\n,1\ngone.nii,1\n"}, {}, "2 of 3 .*row 3: no file given; row 4: gone.nii"),
    ({"t.csv": "image\na.nii\n./a.nii\n"}, {}, "listed twice"),
    ({"t.csv": "image,subject\na.nii,../../etc\n"}, {}, "row 2: the subject '../../etc' looks like a path"),
    ({"t.csv": "image,session\na.nii,..\n"}, {}, "row 2: the session '..' looks like a path"),
    ({"t.csv": "image\na.nii,1,2\n"}, {}, "row 2, has 3 fields for 1 columns"),
    ({"t.csv": "image,subject,split\na.nii,s,train\nb.nii,s,val\n"}, {}, "Subject s of t is in the splits train and v"),
    ({"t.csv": "image\na.nii\n"}, {"label": "age"}, "no column 'age' .* it has image"),
    ({"t.json": '{"training": ['}, {}, "not valid JSON"),
    ({"t.json": '{"images": []}'}, {}, "it has the keys images"),
    ({"t.json": '{"training": [{"img": "a.nii"}]}'}, {}, r"training\[0\]: an item is"),
    ({"t.json": '{"training": ["a.nii"], "validation": ["no.nii"]}'}, {}, r"1 of 2 scans .*validation\[0\]: no.nii"),
    ({"participants.tsv": f"{START}sub-01\t3\n01\t4\n"}, {}, "lists sub-01 twice .row 2, row 3"),
    ({"participants.tsv": f"{START}sub-01\t3\n"}, {"label": "group"}, "no column 'group' .* it has participant_id"),
    ({"participants.tsv": "name\tage\nsub-01\t3\n"}, {}, "no column 'participant_id' but name, age"),
    ({}, {"label": "group"}, "has no participants.tsv"),
]
# names in a folder, what of it is given, more arguments, what the error says
NO_SCANS: list[tuple[list[str], str, dict[str, Any], str]] = [
    ([], ".", {}, "no files"),
    (["1.dcm", "2.dcm"], ".", {}, "2 x .dcm .*dcm2niix"),
    (["sub-01/anat/sub-01_T2w.nii.gz"], ".", {}, "holds no sub-"),
    (["c.dcm"], "c.dcm", {}, "dcm2niix"),
    (["b.txt"], "b.txt", {}, r"'.txt'.*\.nii\.gz"),
    ([], "gone.nii", {}, "not exist"),
    (["a.nii"], ".", {"form": "csv"}, "the form 'csv' needs a file"),
    (["a.nii"], "a.nii", {"form": "bids"}, "the form 'bids' needs a folder"),
    (["a.nii"], "a.nii", {"label": "age"}, "has no labels, so no 'age'"),
]


def touch(root: Path, *paths: str) -> Path:
    """Make files with the given paths; a cohort is listed without opening its scans."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"scan")
    return root


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    """Write a table or datalist."""
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_stem_and_form_follow_from_the_path(tmp_path: Path) -> None:
    """Dots inside a name stay; a folder's layout tells its form."""
    assert {path: scan_stem(path) for path in STEMS} == STEMS
    touch(tmp_path, "a.csv", "a.TSV", "a.json", "a.nii", "one/sub-1/ses-1/anat/x", "two/sub-1/x")
    assert {name: recognise(tmp_path / name) for name in FORMS} == FORMS


def test_bids_takes_sessions_and_runs(tmp_path: Path) -> None:
    """Sessions, runs and both suffixes are found, other contrasts and hidden files are not; all texts."""
    touch(tmp_path, "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii", "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_run-1_T1w.nii.gz", "sub-01/func/sub-01_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/anat/._sub-01_T1w.nii.gz")
    table = "participant_id\tage\tgroup\tsplit\nsub-01\t30.0\tcönträl\tvalidation\n02\tn/a\tpatient\t\n"
    write(tmp_path / "participants.tsv", table, "utf-8-sig")  # Excel puts a byte order mark first
    records = read_cohort(str(tmp_path), label="group", val_fraction=0, test_fraction=1)
    assert [list(record) for record in records] == [KEYS] * 3
    assert [list(record.values())[1:] for record in records] == [
        ["sub-01_run-1_T1w", "sub-01", "", "cönträl", "val", tmp_path.name],
        ["sub-02_ses-1_T1w", "sub-02", "ses-1", "patient", "test", tmp_path.name],
        ["sub-02_ses-2_T1w", "sub-02", "ses-2", "patient", "test", tmp_path.name],
    ]
    assert [r["label"] for r in read_cohort(str(tmp_path), label="age")] == ["30.0", "", ""]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_table_with_every_column(tmp_path: Path, delimiter: str) -> None:
    """Paths resolve against the table; missing texts, n/a and empty lines are understood; numbers keep their text."""
    touch(tmp_path, "x/a.nii", "x/b.nii.gz", "c.mgz")
    rows = ["image,subject,session,split,dose", f"{tmp_path}/c.mgz,p1,v2,Training,1.50", "x/a.nii,p2,,,n/a", "",
            "x/b.nii.gz"]  # fmt: skip
    text = "\r\n".join(rows).replace(",", delimiter) + "\r\n"
    records = read_cohort(write(tmp_path / f"t.{'tsv' if delimiter == chr(9) else 'csv'}", text), label="dose")
    found = {r["name"]: (r["subject"], r["session"], r["label"]) for r in records}
    assert found == {"c": ("p1", "v2", "1.50"), "a": ("p2", "", ""), "b": ("x_b", "", "")}
    assert {r["name"]: r["split"] for r in records}["c"] == "train"
    assert {r["cohort"] for r in records} == {"t"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_text_that_is_not_utf8(tmp_path: Path, encoding: str) -> None:
    """Other encodings are refused with the remedy, in tables and datalists."""
    for name, text in (("t.csv", "image\nä.nii\n"), ("t.json", '["ä.nii"]')):
        with pytest.raises(InputError, match=f"{name} is not UTF-8 text; save it as UTF-8"):
            read_cohort(write(tmp_path / name, text, encoding))


def test_datalist_keys_give_the_split(tmp_path: Path) -> None:
    """Sections become splits; numbers keep their text; null is empty; a plain path is an item; other keys are left;
    a plain list is split by its items' key, else by hash."""
    touch(tmp_path, "a.nii", "b.nii", "c.nii", "d.nii")
    content = """{"modality": {"0": "T1"}, "numTraining": 2, "training": [
        {"image": "a.nii", "subject": 7, "age": 30.50}, {"image": "./b.nii", "subject": null}],
        "validation": [{"image": "c.nii"}], "testing": ["d.nii"]}"""
    found = [
        (r["subject"], r["split"], r["label"]) for r in read_cohort(write(tmp_path / "t.json", content), label="age")
    ]
    assert found == [("7", "train", "30.50"), ("b", "train", ""), ("c", "val", ""), ("d", "test", "")]
    path = write(tmp_path / "list.json", '[{"image": "a.nii", "split": "valid"}, {"image": "b.nii"}]')
    assert [r["split"] for r in read_cohort(path, val_fraction=0, test_fraction=1)] == ["val", "test"]


@pytest.mark.parametrize(("files", "arguments", "says"), BAD)
def test_mistakes_name_file_and_place(
    tmp_path: Path, files: dict[str, str], arguments: dict[str, Any], says: str
) -> None:
    """Row, section, column or subject: where the user has to mend the table, datalist or participants.tsv."""
    name = next(iter(files), "participants.tsv")
    touch(tmp_path, "a.nii", "b.nii", "b.txt", "c.dcm", *["sub-01/anat/sub-01_T1w.nii"] * (name[0] == "p"))
    for file, text in files.items():
        write(tmp_path / file, text)
    with pytest.raises(InputError, match=says) as caught:
        read_cohort(str(tmp_path if name[0] == "p" else tmp_path / name), **arguments)
    assert name.partition(".")[0] in str(caught.value) or "a.nii" in str(caught.value)


@pytest.mark.parametrize(("path", "subject", "session"), PERSONS)
def test_folder_reads_person_off_the_path(tmp_path: Path, path: str, subject: str, session: str) -> None:
    """Subject and session come from BIDS-like parts, FreeSurfer's folder, else the path."""
    record = read_cohort(str(touch(tmp_path / "scans", path) / "."), form="folder")[0]
    assert (record["subject"], record["session"]) == (subject, session)


def test_folder_finds_all_images(tmp_path: Path) -> None:
    """All suffixes at any depth, of FreeSurfer's files the T1 alone; none that is hidden; a link to itself ends."""
    touch(tmp_path, "a.nii", "x/b.nii.gz", "x/y/c.mgz", "d.NII", "notes.txt", "._a.nii", ".git/e.nii")
    touch(tmp_path, *(f"z/mri/{name}" for name in ("T1.mgz", "aseg.mgz", "orig/001.mgz")))
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    assert {r["name"] for r in read_cohort(str(tmp_path))} == {"a", "b", "c", "d", "T1"}


@pytest.mark.parametrize(("files", "given", "arguments", "says"), NO_SCANS)
def test_no_scan_is_explained(
    tmp_path: Path, files: list[str], given: str, arguments: dict[str, Any], says: str
) -> None:
    """What a folder holds instead, which suffixes are supported, which form a path can have."""
    with pytest.raises(InputError, match=says):
        read_cohort(str(touch(tmp_path, *files) / given), **arguments)
