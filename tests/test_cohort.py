"""Every form of a cohort becomes the same kind of records, and every mistake one sentence."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.cohort import read_cohort, recognise, scan_stem, select, split_of
from scripts.run import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"
KEYS = ["image", "name", "subject", "session", "label", "split", "cohort"]

STEMS = [
    ("a/scan.nii", "scan"),
    ("scan.v1.2.nii.gz", "scan.v1.2"),
    ("T1.mgz", "T1"),
    ("T1.MGH", "T1"),
    ("SCAN.NII.GZ", "SCAN"),
    ("scan.nii.nii.gz", "scan.nii"),
    ("notes.txt", "notes.txt"),
]
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
# text of the table, what the error says
BAD_TABLES = [
    ("", "no column 'image' but nothing"),
    ("file,age\nx,3\n", "no column 'image' but file, age"),
    ("image\n", "lists no scan"),
    ("image,split\na.nii,fold1\n", "row 2: the split is 'fold1'"),
    ("image\na.nii\nb.txt\n", "row 3: b.txt has the suffix '.txt'"),
    ("image\na.nii\nc.dcm\n", "dcm2niix"),
    ("image\na.nii\na.nii\n", "listed twice"),
    ("image,subject\na.nii,../../etc\n", "row 2: the subject '../../etc' looks like a path"),
    ("image,session\na.nii,..\n", "row 2: the session '..' looks like a path"),
    ("image\na.nii,1,2\n", "row 2, has 3 fields for 1 columns"),
    ("image,subject,split\na.nii,s1,train\nb.nii,s1,val\n", "Subject s1 of table is in the splits train and val"),
]
BAD_DATALISTS = [
    ('{"training": [', "not valid JSON"),
    ('{"images": []}', "it has the keys images"),
    ("3", "should hold a list"),
    ("{}", "should hold a list"),
    ('{"training": [{"img": "a.nii"}]}', r"training\[0\]: an item is"),
    ('[{"image": ["a.nii", "b.nii"]}]', r"item\[0\]: an item is"),
    ('{"training": ["a.nii"], "validation": ["gone.nii"]}', r"1 of 2 scans .*validation\[0\]: gone.nii"),
    ('{"training": []}', "lists no scan"),
    ('{"training": [{"image": "a.nii", "subject": "s"}], "test": [{"image": "b.nii", "subject": "s"}]}', "Subject s "),
]
# arguments, what the error says
BAD_ARGUMENTS = [
    ({"form": "dicom"}, "form is 'dicom'"),
    ({"val_fraction": 1.1}, "val_fraction is 1.1"),
    ({"val_fraction": float("nan")}, "val_fraction is nan"),
    ({"val_fraction": "a"}, "val_fraction is 'a'"),
    ({"test_fraction": -0.1}, "test_fraction is -0.1"),
    ({"val_fraction": 0.6, "test_fraction": 0.6}, "more than 1"),
    ({"max_scans": -1}, "max_scans is -1"),
    ({"label": "age"}, "no 'age'"),
    ({"form": "csv"}, "needs a file"),
]


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


def bids(root: Path, *subjects: str) -> Path:
    """Make a BIDS root."""
    return touch(root, *(f"{s}/anat/{s}_T1w.nii.gz" for s in subjects))


@pytest.mark.parametrize(("path", "stem"), STEMS)
def test_stem_loses_only_image_suffixes(path, stem):
    """Dots inside a name stay."""
    assert scan_stem(path) == stem


def test_bids_takes_sessions_and_runs(tmp_path):
    """Sessions, runs and both suffixes are found, other contrasts and hidden files are not; all texts."""
    touch(tmp_path, "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii", "sub-02/ses-2/anat/sub-02_ses-2_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_run-2_T1w.nii.gz", "sub-01/anat/sub-01_run-1_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/anat/._sub-01_T1w.nii.gz", "sub-01/func/sub-01_T1w.nii.gz")
    write(tmp_path / "participants.tsv", "participant_id\tage\tgroup\nsub-01\t30.0\tcontrol\n02\tn/a\tpatient\n")
    records = read_cohort(str(tmp_path), label="group")
    assert [list(record) for record in records] == [KEYS] * 4
    assert all(isinstance(value, str) for record in records for value in record.values())
    assert [(r["name"], r["subject"], r["session"], r["label"]) for r in records] == [
        ("sub-01_run-1_T1w", "sub-01", "", "control"),
        ("sub-01_run-2_T1w", "sub-01", "", "control"),
        ("sub-02_ses-1_T1w", "sub-02", "ses-1", "patient"),
        ("sub-02_ses-2_T1w", "sub-02", "ses-2", "patient"),
    ]
    assert {r["cohort"] for r in records} == {tmp_path.name}
    assert all(Path(r["image"]).is_file() for r in records)
    assert [r["label"] for r in read_cohort(str(tmp_path), label="age")] == ["30.0", "30.0", "", ""]


def test_participants_with_byte_order_mark(tmp_path):
    """A table saved by Excel opens with a byte order mark."""
    bids(tmp_path, "sub-01")
    write(tmp_path / "participants.tsv", "participant_id\tgroup\nsub-01\tä\n", "utf-8-sig")
    assert read_cohort(str(tmp_path), label="group")[0]["label"] == "ä"


@pytest.mark.parametrize(
    ("table", "label", "says"),
    [
        ("participant_id\tage\nsub-01\t3\nsub-01\t4\n", "", "lists sub-01 twice"),
        ("participant_id\tage\nsub-01\t3\n", "group", "no column 'group' .* it has participant_id, age"),
        ("name\tage\nsub-01\t3\n", "", "no column 'participant_id' but name, age"),
        ("participant_id\tsplit\nsub-01\tlater\n", "", "row 2: the split is 'later'"),
        (None, "group", "has no participants.tsv"),
    ],
)
def test_bad_participants(tmp_path, table, label, says):
    """Errors of participants.tsv name it and what it holds."""
    bids(tmp_path, "sub-01")
    if table is not None:
        write(tmp_path / "participants.tsv", table)
    with pytest.raises(InputError, match=says):
        read_cohort(str(tmp_path), label=label)


def test_bids_without_t1w(tmp_path):
    """A BIDS root with other contrasts only is an error, not a plain folder."""
    touch(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz")
    with pytest.raises(InputError, match="holds no sub-"):
        read_cohort(str(tmp_path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_every_column(tmp_path, delimiter):
    """Paths resolve against the table; missing texts, n/a and empty lines are understood; numbers keep their text."""
    touch(tmp_path, "x/a.nii", "x/b.nii.gz", "c.mgz")
    rows = [
        "image,subject,session,split,dose",
        f"{tmp_path}/c.mgz,p1,v2,Training,1.50",
        "x/a.nii,p2,,,n/a",
        "",
        "x/b.nii.gz",
    ]
    path = write(
        tmp_path / ("t.tsv" if delimiter == "\t" else "t.csv"), "\r\n".join(rows).replace(",", delimiter) + "\r\n"
    )
    records = read_cohort(str(path), label="dose")
    found = {r["name"]: (r["subject"], r["session"], r["label"]) for r in records}
    assert found == {"c": ("p1", "v2", "1.50"), "a": ("p2", "", ""), "b": ("x_b", "", "")}
    assert {r["name"]: r["split"] for r in records}["c"] == "train"
    assert {r["cohort"] for r in records} == {"t"}


@pytest.mark.parametrize(("text", "says"), BAD_TABLES)
def test_bad_tables(tmp_path, text, says):
    """Errors of a table name the row and the file."""
    touch(tmp_path, "a.nii", "b.nii", "b.txt", "c.dcm")
    with pytest.raises(InputError, match=says):
        read_cohort(str(write(tmp_path / "table.csv", text)))


def test_csv_names_the_first_missing_files(tmp_path):
    """Five rows are listed, the rest counted; an empty path counts too."""
    touch(tmp_path, "a.nii")
    path = write(tmp_path / "t.csv", "image,x\na.nii,1\n,1\n" + "".join(f"gone{i}.nii,1\n" for i in range(7)))
    with pytest.raises(InputError, match=r"8 of 9 .*row 3: no file given; row 4: gone0\.nii; .*gone3\.nii; and 3 more"):
        read_cohort(str(path))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_text_that_is_not_utf8(tmp_path, encoding):
    """Other encodings are refused with the remedy, in tables and datalists."""
    for name, text in (("t.csv", "image\nä.nii\n"), ("t.json", '["ä.nii"]')):
        with pytest.raises(InputError, match="not UTF-8"):
            read_cohort(str(write(tmp_path / name, text, encoding)))


def test_datalist_keys_give_the_split(tmp_path):
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


def test_datalist_as_plain_list(tmp_path):
    """A plain list is split by its items' key, else by hash."""
    touch(tmp_path, "a.nii", "b.nii")
    path = write(tmp_path / "list.json", json.dumps([{"image": "a.nii", "split": "valid"}, {"image": "b.nii"}]))
    assert [r["split"] for r in read_cohort(str(path), val_fraction=0, test_fraction=1)] == ["val", "test"]


@pytest.mark.parametrize(("text", "says"), BAD_DATALISTS)
def test_bad_datalists(tmp_path, text, says):
    """Errors of a datalist name the section and number."""
    touch(tmp_path, "a.nii", "b.nii")
    with pytest.raises(InputError, match=says):
        read_cohort(str(write(tmp_path / "list.json", text)))


@pytest.mark.parametrize(("path", "subject", "session"), PERSONS)
def test_folder_reads_person_off_the_path(tmp_path, path, subject, session):
    """Subject and session come from BIDS-like parts, FreeSurfer's folder, else the path."""
    record = read_cohort(str(touch(tmp_path / "scans", path) / "."), form="folder")[0]
    assert (record["subject"], record["session"]) == (subject, session)


def test_folder_finds_all_images(tmp_path):
    """All suffixes at any depth; no hidden files, no other files; a folder with links to itself ends."""
    touch(tmp_path, "a.nii", "x/b.nii.gz", "x/y/c.mgz", "d.NII", "notes.txt", "._a.nii", ".git/e.nii")
    os.symlink(tmp_path, tmp_path / "x" / "loop")
    assert [r["name"] for r in read_cohort(str(tmp_path))] == ["a", "d", "b", "c"]


def test_freesurfer_subject_takes_the_t1_only(tmp_path):
    """A FreeSurfer folder gives one scan a subject, with a name of its own."""
    for subject in ("bert", "ernie"):
        touch(tmp_path, *(f"{subject}/mri/{name}" for name in ("T1.mgz", "aseg.mgz", "brain.mgz", "orig/001.mgz")))
    assert [(r["name"], r["subject"]) for r in read_cohort(str(tmp_path))] == [
        ("bert_T1", "bert"),
        ("ernie_T1", "ernie"),
    ]


@pytest.mark.parametrize(
    ("files", "says"), [([], "no files"), (["1.dcm", "2.dcm"], "2 x .dcm .*dcm2niix"), (["IM1"], "dcm2niix")]
)
def test_folder_without_scans(tmp_path, files, says):
    """The error tells what the folder holds instead."""
    with pytest.raises(InputError, match=says):
        read_cohort(str(touch(tmp_path, *files)))


def test_one_file(tmp_path):
    """One scan is a cohort of one."""
    touch(tmp_path, "sub-3_T1w.nii.gz")
    records = read_cohort(str(tmp_path / "sub-3_T1w.nii.gz"))
    assert [(r["name"], r["subject"], r["cohort"]) for r in records] == [("sub-3_T1w", "sub-3", "sub-3_T1w")]


@pytest.mark.parametrize(
    ("name", "says"), [("scan.dcm", "dcm2niix"), ("scan.png", r"'.png'.*\.nii\.gz"), ("gone.nii", "not exist")]
)
def test_file_that_is_no_scan(tmp_path, name, says):
    """An unsupported suffix is named, with what is supported."""
    touch(tmp_path, "scan.dcm", "scan.png")
    with pytest.raises(InputError, match=says):
        read_cohort(str(tmp_path / name))


def test_form_is_recognised(tmp_path):
    """The form follows from the suffix or from the folder's layout."""
    touch(tmp_path, "a.csv", "a.TSV", "a.json", "a.nii", "one/sub-1/anat/x", "two/sub-1/ses-1/anat/x", "three/sub-1/x")
    names = ["a.csv", "a.TSV", "a.json", "a.nii", "one", "two", "three"]
    assert [recognise(tmp_path / name) for name in names] == [
        "csv",
        "csv",
        "datalist",
        "file",
        "bids",
        "bids",
        "folder",
    ]


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS)
def test_bad_arguments(tmp_path, arguments, says):
    """Arguments are checked, with the value in the error."""
    with pytest.raises(InputError, match=says):
        read_cohort(str(touch(tmp_path, "a.nii")), **arguments)


@pytest.mark.parametrize("form", ["bids", "folder"])
def test_form_that_needs_a_folder(tmp_path, form):
    """A file cannot be read as a folder."""
    with pytest.raises(InputError, match="needs a folder"):
        read_cohort(str(touch(tmp_path, "a.nii") / "a.nii"), form=form)


@pytest.mark.parametrize("as_text", [False, True])
def test_several_cohorts(tmp_path, as_text):
    """A list, also as a command line's text, is put together; equal folder names and subjects stay apart."""
    folders = [str(bids(tmp_path / site / "data", "sub-01", "sub-02")) for site in "ab"]
    records = read_cohort(str(folders) if as_text else folders)
    assert [r["cohort"] for r in records] == ["data", "data", "data_2", "data_2"]
    assert [r["name"] for r in records] == [f"{c}_{s}_T1w" for c in ("data", "data_2") for s in ("sub-01", "sub-02")]


def test_same_subject_of_two_cohorts_may_have_two_splits(tmp_path):
    """Explicit splits bind a person, and persons of two cohorts differ."""
    for name, split in (("a", "train"), ("b", "test")):
        touch(tmp_path / name, "x.nii")
        write(tmp_path / name / f"{name}.csv", f"image,subject,split\nx.nii,s1,{split}\n")
    records = read_cohort([str(tmp_path / n / f"{n}.csv") for n in "ab"])
    assert [(r["name"], r["split"]) for r in records] == [("a_x", "train"), ("b_x", "test")]


@pytest.mark.parametrize("bad", ["['a", "[1, 2]", [""], 7, {"a": 1}])
def test_bad_lists_of_cohorts(bad):
    """What is no list of paths is refused with what was given."""
    with pytest.raises(InputError, match="dataset_dir is"):
        read_cohort(bad)


def test_same_file_in_two_cohorts(tmp_path):
    """A file counts once, however it is reached."""
    touch(tmp_path, "one/a.nii")
    os.symlink(tmp_path / "one", tmp_path / "two")
    with pytest.raises(InputError, match="listed twice"):
        read_cohort([str(tmp_path / "one"), str(tmp_path / "two")])


def test_names_tell_equal_stems_apart(tmp_path):
    """Sessions, folders, suffixes and case make different names; outputs on any disk stay apart."""
    touch(
        tmp_path, "sub-1/ses-1/T1.nii", "sub-1/ses-2/T1.nii", "p/x/T1.nii", "p/y/t1.nii", "s.nii", "s.nii.gz", "-o.nii"
    )
    names = [r["name"] for r in read_cohort(str(tmp_path), form="folder")]
    assert {"sub-1_ses-1_T1", "sub-1_ses-2_T1", "p_x_T1", "p_y_t1", "o"} < set(names)
    assert len({name.casefold() for name in names}) == 7


def test_names_hold_still(tmp_path):
    """A short run and a split give the names of the whole cohort."""
    touch(tmp_path, *(f"p{i}/T1.nii" for i in range(6)))
    names = [r["name"] for r in read_cohort(str(tmp_path))]
    assert names == [f"p{i}_T1" for i in range(6)]
    assert [r["name"] for r in read_cohort(str(tmp_path), max_scans=1, val_fraction=1)] == names[:1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "A", "b_a", "-a", "- a", "a.b", "x" * 120, "ü"]), min_size=1, max_size=5), st.data()
)
def test_names_are_safe_and_unique(tmp_path_factory, folders, data):
    """Whatever the paths, names are unique without case, keep to their folder and fit a file name."""
    parts = st.lists(st.sampled_from(folders), min_size=0, max_size=3)
    stems = data.draw(st.lists(st.tuples(parts, st.sampled_from(folders)), min_size=1, max_size=8))
    root = touch(tmp_path_factory.mktemp("n"), *("/".join([*where, f"{stem}.nii"]) for where, stem in stems))
    names = [r["name"] for r in read_cohort([str(root)], form="folder")]
    assert len({name.casefold() for name in names}) == len(names)
    assert all("/" not in n and n[0] not in ".-" and len(n.encode()) <= 200 for n in names)


def test_split_is_the_hash_of_the_subject():
    """The split of an id is fixed for ever."""
    # printf sub-01 | sha256sum, first 16 digits over 16^16: 0.25686; sub-02: 0.06165
    assert [split_of("sub-01", 0.256, 0.01), split_of("sub-01", 0.257), split_of("sub-02", 0.06)] == [
        "test",
        "val",
        "train",
    ]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.text("abc0123", min_size=1, max_size=4), min_size=2, max_size=12), st.floats(0, 1), st.data())
def test_new_subject_moves_nobody(tmp_path_factory, subjects, fraction, data):
    """Adding a subject leaves every other one's split as it was; sessions fall together."""
    root = tmp_path_factory.mktemp("s")
    rows = [f"{s}{i}.nii,{s}" for s in sorted(subjects) for i in (1, 2)]
    touch(root, *(row.split(",")[0] for row in rows))
    fewer = [row for row in rows if not row.endswith("," + data.draw(st.sampled_from(sorted(subjects)), label="new"))]
    splits = []
    for number, lines in enumerate((rows, fewer or rows)):
        table = write(root / f"{number}.csv", "image,subject\n" + "\n".join(lines))
        records = read_cohort(str(table), val_fraction=fraction, test_fraction=(1 - fraction) / 2)
        splits.append({(r["subject"], r["split"]) for r in records})
    assert splits[1] <= splits[0]
    assert len(splits[0]) == len(subjects)


def test_split_shares_are_near_the_fractions():
    """Over 2,000 ids the shares lie within four standard errors (0.04) of the fractions."""
    counts = Counter(split_of(f"sub-{i}", 0.2, 0.3) for i in range(2000))
    assert abs(counts["val"] / 2000 - 0.2) < 0.04
    assert abs(counts["test"] / 2000 - 0.3) < 0.04


def test_empty_split_follows_the_subject(tmp_path):
    """A row without a split goes where the subject's other rows go, else by hash."""
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    table = write(tmp_path / "t.csv", "image,subject,split\na.nii,s1,testing\nb.nii,s1,\nc.nii,s2,n/a\n")
    assert [r["split"] for r in read_cohort(str(table), val_fraction=1.0)] == ["test", "test", "val"]


def test_bids_split_column(tmp_path):
    """A column split in participants.tsv wins over the hash."""
    bids(tmp_path, "sub-01", "sub-02")
    write(tmp_path / "participants.tsv", "participant_id\tsplit\nsub-01\tvalidation\n")
    assert [r["split"] for r in read_cohort(str(tmp_path), val_fraction=0, test_fraction=1)] == ["val", "test"]


def test_select(tmp_path):
    """One split or all of them; what is empty or unknown is explained."""
    records = read_cohort(str(bids(tmp_path, "sub-01", "sub-02", "sub-03")), val_fraction=0.0)
    assert select(records, "all") == select(records, "train") == records
    with pytest.raises(
        InputError, match=r"3 subjects \(3 in train, 0 in val, 0 in test\).*val_fraction.*column 'split'"
    ):
        select(records, "val")
    with pytest.raises(InputError, match="split is 'dev'"):
        select(records, "dev")


def test_order_is_the_same_whatever_the_disk_says(tmp_path, monkeypatch):
    """Records are sorted, so that a run can be repeated elsewhere."""
    bids(tmp_path, *(f"sub-{i:02}" for i in (5, 1, 9, 3)))
    expected = read_cohort(str(tmp_path))
    listed = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(list(listed(self, pattern))[::-1]))
    assert read_cohort(str(tmp_path)) == expected == sorted(expected, key=lambda r: r["subject"])


def test_demo_cohort_where_nothing_is_given(monkeypatch, tmp_path):
    """An empty dataset_dir makes the demo cohort, of no more subjects than wanted."""
    demo = pytest.importorskip("scripts.cohort.demo")
    asked = []

    def made(n_subjects=24):
        asked.append(n_subjects)
        return bids(tmp_path / "demo", "sub-01", "sub-02", "sub-03")

    monkeypatch.setattr(demo, "demo_cohort", made)
    assert [len(read_cohort(nothing)) for nothing in ("", [], None)] == [3, 3, 3]
    assert [len(read_cohort("", max_scans=n)) for n in (2, 100)] == [2, 3]
    assert asked == [24, 24, 24, 2, 24]


@pytest.mark.parametrize("module", ["cohort", "preflight"])
def test_import_without_torch(module):
    """Listing and checking a cohort need neither torch nor MONAI nor pandas."""
    code = f"import sys, scripts.{module}; print([m for m in ('torch', 'monai', 'pandas') if m in sys.modules])"
    root = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(out) == []


@pytest.mark.skipif(not (SHARED / "ds002748").exists(), reason="shared data absent")
def test_shared_cohort():
    """58 scans of 58 subjects in two groups, split as the ids say."""
    records = read_cohort(str(SHARED / "ds002748"), label="group")
    assert len({r["subject"] for r in records}) == len(records) == 58
    assert {r["label"] for r in records} == {"depr", "control"}
    assert all(r["split"] == split_of(r["subject"]) for r in records)
    assert 0 < len(select(records, "val")) < len(select(records, "train"))
