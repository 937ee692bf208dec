"""Every form of a cohort becomes the same kind of scans, and every mistake in it one sentence that names the place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from scripts.cohort import read_cohort, recognise, scan_stem
from scripts.run import InputError

KEYS = ["image", "name", "subject", "session", "label", "split", "cohort"]
START = "participant_id\tage\n"

STEMS = {
    "a/scan.nii": "scan", "scan.v1.2.nii.gz": "scan.v1.2", "T1.MGH": "T1", "SCAN.NII.GZ": "SCAN", "a.mgz": "a",
    "scan.nii.nii.gz": "scan.nii", "notes.txt": "notes.txt",
}  # fmt: skip
FORMS = {
    "a.csv": "csv", "a.TSV": "csv", "a.json": "datalist", "a.nii": "file", "one": "bids", "two": "bids",
    "three": "folder",
}  # fmt: skip
# path in the folder, expected subject, expected session
PERSONS = [
    ("sub-07/ses-2/T1.nii.gz", "sub-07", "ses-2"),
    ("sub-07_ses-2_T1w.nii", "sub-07", "ses-2"),
    ("sub-study/sub-07_T1w.nii", "sub-07", ""),
    ("sub-a-b/x.nii", "sub-a-b", ""),
    ("site_sub-07_T1w.nii", "sub-07", ""),
    ("bert/mri/T1.mgz", "bert", ""),
    ("sub-07_ses-2/mri/T1.mgz", "sub-07", "ses-2"),
    ("patient1/T1.nii.gz", "patient1_T1", ""),
    ("scan.v1.nii.gz", "scan.v1", ""),
]
# how it lies on disk, more arguments, what the error says; beside it lie scans a.nii, b.nii, b.txt and c.dcm
BAD: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"t.csv": ""}, {}, "no column 'image' but nothing"),
    ({"t.csv": "file,age\nx,3\n"}, {}, "no column 'image' but file, age"),
    ({"t.csv": "image\n"}, {}, "lists no scan"),
    ({"t.csv": "image,image\na.nii,b.nii\n"}, {}, "the column 'image' twice"),
    ({"t.csv": "image,split\na.nii,fold1\n"}, {}, "row 2: the split is 'fold1'"),
    ({"t.csv": "image\na.nii\nb.txt\n"}, {}, "row 3: b.txt has the suffix '.txt'"),
    ({"t.csv": "image\na.nii\nc.dcm\n"}, {}, "dcm2niix"),
    ({"t.csv": "image\n.\n"}, {}, "row 2: . is a folder"),
    ({"t.csv": "image\na.nii\n./a.nii\n"}, {}, "listed twice"),
    ({"t.csv": "image,subject\na.nii,../../etc\n"}, {}, "row 2: the subject '../../etc' looks like a path"),
    ({"t.csv": "image,session\na.nii,..\n"}, {}, "row 2: the session '..' looks like a path"),
    ({"t.csv": "image\na.nii,1,2\n"}, {}, "row 2, has 3 fields for 1 columns"),
    ({"t.csv": "image,subject,split\na.nii,s,train\nb.nii,s,val\n"}, {}, "Subject s of t is in the splits train and v"),
    ({"t.csv": "image\na.nii\n"}, {"label": "age"}, "no column 'age' .* it has image"),
    ({"t.json": '{"training": ['}, {}, "not valid JSON"),
    ({"t.json": '{"images": []}'}, {}, "it has the keys images"),
    ({"t.json": "3"}, {}, "should hold a list"),
    ({"t.json": '{"training": [{"img": "a.nii"}]}'}, {}, r"training\[0\]: an item is"),
    ({"t.json": '[{"image": ["a.nii", "b.nii"]}]'}, {}, r"item\[0\]: an item is"),
    ({"t.json": '{"training": ["a.nii"], "validation": ["no.nii"]}'}, {}, r"1 of 2 scans .*validation\[0\]: no.nii"),
    ({"t.json": '{"training": []}'}, {}, "lists no scan"),
    ({"participants.tsv": f"{START}sub-01\t3\n01\t4\n"}, {}, "lists sub-01 twice .row 2, row 3"),
    (
        {"participants.tsv": f"{START}sub-01\t3\n"},
        {"label": "group"},
        "no column 'group' .* it has participant_id, age",
    ),
    ({"participants.tsv": "name\tage\nsub-01\t3\n"}, {}, "no column 'participant_id' but name, age"),
    ({"participants.tsv": "participant_id\tsplit\nsub-01\tlater\n"}, {}, "row 2: the split is 'later'"),
    ({}, {"label": "group"}, "has no participants.tsv"),
]
# names in a folder, what the error says of the folder, or of the one file
NO_SCANS = [
    ([], "no files"),
    (["1.dcm", "2.dcm"], "2 x .dcm .*dcm2niix"),
    (["IM1"], "dcm2niix"),
    (["sub-01/anat/sub-01_T2w.nii.gz"], "holds no sub-"),
]
NO_SCAN = {"c.dcm": "dcm2niix", "b.txt": r"'.txt'.*\.nii\.gz", "gone.nii": "not exist"}


def touch(root: Path, *paths: str) -> Path:
    """Make files with the given paths; a cohort is listed without opening its scans."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"scan")
    return root


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Write a table or datalist."""
    path.write_bytes(text.encode(encoding))
    return path


def test_stem_loses_only_image_suffixes() -> None:
    """Dots inside a name stay."""
    assert {path: scan_stem(path) for path in STEMS} == STEMS


def test_form_is_recognised(tmp_path: Path) -> None:
    """The form follows from the suffix or from the folder's layout."""
    touch(tmp_path, "a.csv", "a.TSV", "a.json", "a.nii", "one/sub-1/anat/x", "two/sub-1/ses-1/anat/x", "three/sub-1/x")
    assert {name: recognise(tmp_path / name) for name in FORMS} == FORMS


@pytest.mark.parametrize(("name", "form", "needs"), [(".", "csv", "a file"), ("a.nii", "bids", "a folder"),
                                                     ("a.nii", "folder", "a folder")])  # fmt: skip
def test_form_that_cannot_be(tmp_path: Path, name: str, form: str, needs: str) -> None:
    """A file is not read as a folder, nor a folder as a file."""
    with pytest.raises(InputError, match=f"the form '{form}' needs {needs}"):
        read_cohort(str(touch(tmp_path, "a.nii") / name), form=form)


def test_bids_takes_sessions_and_runs(tmp_path: Path) -> None:
    """Sessions, runs and both suffixes are found, other contrasts and hidden files are not; all texts."""
    touch(tmp_path, "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii", "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_run-2_T1w.nii.gz", "sub-01/anat/sub-01_run-1_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/anat/._sub-01_T1w.nii.gz", "sub-01/func/sub-01_T1w.nii.gz")
    table = "participant_id\tage\tgroup\nsub-01\t30.0\tcönträl\n02\tn/a\tpatient\n"
    write(tmp_path / "participants.tsv", table, "utf-8-sig")  # Excel puts a byte order mark first
    records = read_cohort(str(tmp_path), label="group")
    assert [list(record) for record in records] == [KEYS] * 4
    assert all(isinstance(value, str) for record in records for value in record.values())
    assert [(r["name"], r["subject"], r["session"], r["label"]) for r in records] == [
        ("sub-01_run-1_T1w", "sub-01", "", "cönträl"),
        ("sub-01_run-2_T1w", "sub-01", "", "cönträl"),
        ("sub-02_ses-1_T1w", "sub-02", "ses-1", "patient"),
        ("sub-02_ses-2_T1w", "sub-02", "ses-2", "patient"),
    ]
    assert {r["cohort"] for r in records} == {tmp_path.name}
    assert all(Path(r["image"]).is_file() for r in records)
    assert [r["label"] for r in read_cohort(str(tmp_path), label="age")] == ["30.0", "30.0", "", ""]


def test_bids_split_column(tmp_path: Path) -> None:
    """A column split in participants.tsv wins over the hash."""
    touch(tmp_path, *(f"sub-0{i}/anat/sub-0{i}_T1w.nii" for i in (1, 2)))
    write(tmp_path / "participants.tsv", "participant_id\tsplit\nsub-01\tvalidation\n")
    assert [r["split"] for r in read_cohort(str(tmp_path), val_fraction=0, test_fraction=1)] == ["val", "test"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_table_with_every_column(tmp_path: Path, delimiter: str) -> None:
    """Paths resolve against the table; missing texts, n/a and empty lines are understood; numbers keep their text."""
    touch(tmp_path, "x/a.nii", "x/b.nii.gz", "c.mgz")
    rows = ["image,subject,session,split,dose", f"{tmp_path}/c.mgz,p1,v2,Training,1.50", "x/a.nii,p2,,,n/a", "",
            "x/b.nii.gz"]  # fmt: skip
    text = "\r\n".join(rows).replace(",", delimiter) + "\r\n"
    records = read_cohort(str(write(tmp_path / f"t.{'tsv' if delimiter == chr(9) else 'csv'}", text)), label="dose")
    found = {r["name"]: (r["subject"], r["session"], r["label"]) for r in records}
    assert found == {"c": ("p1", "v2", "1.50"), "a": ("p2", "", ""), "b": ("x_b", "", "")}
    assert {r["name"]: r["split"] for r in records}["c"] == "train"
    assert {r["cohort"] for r in records} == {"t"}


def test_table_names_the_first_missing_files(tmp_path: Path) -> None:
    """Five rows are listed, the rest counted; an empty path counts too."""
    touch(tmp_path, "a.nii")
    path = write(tmp_path / "t.csv", "image,x\na.nii,1\n,1\n" + "".join(f"gone{i}.nii,1\n" for i in range(7)))
    with pytest.raises(InputError, match=r"8 of 9 .*row 3: no file given; row 4: gone0\.nii; .*gone3\.nii; and 3 more"):
        read_cohort(str(path))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_text_that_is_not_utf8(tmp_path: Path, encoding: str) -> None:
    """Other encodings are refused with the remedy, in tables and datalists."""
    for name, text in (("t.csv", "image\nä.nii\n"), ("t.json", '["ä.nii"]')):
        with pytest.raises(InputError, match=f"{name} is not UTF-8 text; save it as UTF-8"):
            read_cohort(str(write(tmp_path / name, text, encoding)))


def test_datalist_keys_give_the_split(tmp_path: Path) -> None:
    """Sections become splits; numbers keep their text; null is empty; a plain path is an item; other keys are left."""
    touch(tmp_path, "a.nii", "b.nii", "c.nii", "d.nii")
    content = """{"modality": {"0": "T1"}, "numTraining": 2, "training": [
        {"image": "a.nii", "subject": 7, "age": 30.50}, {"image": "./b.nii", "subject": null}],
        "validation": [{"image": "c.nii"}], "testing": ["d.nii"]}"""
    records = read_cohort(str(write(tmp_path / "list.json", content)), label="age")
    assert [(r["subject"], r["split"], r["label"]) for r in records] == [
        ("7", "train", "30.50"),
        ("b", "train", ""),
        ("c", "val", ""),
        ("d", "test", ""),
    ]


def test_datalist_as_plain_list(tmp_path: Path) -> None:
    """A plain list is split by its items' key, else by hash."""
    touch(tmp_path, "a.nii", "b.nii")
    path = write(tmp_path / "list.json", json.dumps([{"image": "a.nii", "split": "valid"}, {"image": "b.nii"}]))
    assert [r["split"] for r in read_cohort(str(path), val_fraction=0, test_fraction=1)] == ["val", "test"]


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
    """All suffixes at any depth; no hidden files, no other files; a folder with links to itself ends."""
    touch(tmp_path, "a.nii", "x/b.nii.gz", "x/y/c.mgz", "d.NII", "notes.txt", "._a.nii", ".git/e.nii")
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    assert [r["name"] for r in read_cohort(str(tmp_path))] == ["a", "d", "b", "c"]


def test_freesurfer_subject_takes_the_t1_only(tmp_path: Path) -> None:
    """A FreeSurfer folder gives one scan a subject, with a name of its own."""
    for subject in ("bert", "ernie"):
        touch(tmp_path, *(f"{subject}/mri/{name}" for name in ("T1.mgz", "aseg.mgz", "brain.mgz", "orig/001.mgz")))
    found = [(r["name"], r["subject"]) for r in read_cohort(str(tmp_path))]
    assert found == [("bert_T1", "bert"), ("ernie_T1", "ernie")]


@pytest.mark.parametrize(("files", "says"), NO_SCANS)
def test_folder_without_scans(tmp_path: Path, files: list[str], says: str) -> None:
    """The error tells what the folder holds instead; a BIDS root of other contrasts is no plain folder."""
    with pytest.raises(InputError, match=says):
        read_cohort(str(touch(tmp_path, *files)))


def test_one_file(tmp_path: Path) -> None:
    """One scan is a cohort of one; another suffix is named, with what is supported."""
    touch(tmp_path, "sub-3_T1w.nii.gz", "c.dcm", "b.txt")
    records = read_cohort(str(tmp_path / "sub-3_T1w.nii.gz"))
    assert [(r["name"], r["subject"], r["cohort"]) for r in records] == [("sub-3_T1w", "sub-3", "sub-3_T1w")]
    for name, says in NO_SCAN.items():
        with pytest.raises(InputError, match=says):
            read_cohort(str(tmp_path / name))
