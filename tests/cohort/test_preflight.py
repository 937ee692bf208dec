"""Each way in which a scan can be unfit meets its criterion; good files pass, and only once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.cohort import check_cohort, check_scan, preflight, read_cohort
from scripts.run import InputError

SIDE = 32  # voxels of 2.5 mm: 80 mm, the least that passes
ABSURD = [3, 30000, 30000, 30000, 1, 1, 1, 1]


def volume(shape: tuple[int, ...] = (SIDE,) * 3, dtype: Any = np.int16) -> np.ndarray:
    """Positive voxels of many values."""
    return np.random.default_rng(0).integers(1, 1000, shape).astype(dtype)


def save(path: Path, data: np.ndarray | None = None, spacing: Any = 2.5, kind: type = nib.Nifti1Image) -> Path:
    """A scan whose axes have the given spacing."""
    matrix = np.diag([*np.broadcast_to(spacing, 3), 1.0])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(kind(volume() if data is None else data, matrix), path)
    return path


def sparse(n_voxels: int, value: float = 9) -> np.ndarray:
    """A volume with so many voxels of a value, the others zero."""
    data = np.zeros((SIDE,) * 3, np.float32 if n_voxels == 1 else np.int16)
    data.flat[:n_voxels] = value
    return data


def with_header(path: Path, **fields: Any) -> None:
    """An uncompressed scan with fields of its header changed in place."""
    header = nib.load(save(path)).header.copy()
    header["vox_offset"] = 352
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])


RGB = np.zeros((SIDE,) * 3, [("R", "u1"), ("G", "u1"), ("B", "u1")])
SHEARED = [1, np.hypot(2.5, 1.0), 2.5, 2.5, 1, 1, 1, 1]
FLAT = {"sform_code": 1, "srow_x": [2.5, 0, 2.5, 0], "srow_y": [0, 2.5, 0, 0], "srow_z": [0, 0, 0, 0]}
Make = Callable[[Path], Any]

# file name, how it is made, criterion, what the reason says
BAD: list[tuple[str, Make, str, str]] = [
    ("a.nii.gz", lambda p: None, "exists", "does not exist"),
    ("a.nii.gz", lambda p: p.symlink_to("gone"), "exists", "a link to a file that is not here"),
    ("a.nii.gz", lambda p: os.mkfifo(p), "exists", "is a pipe"),
    ("a.nii", lambda p: p.write_bytes(b""), "opens", "is empty"),
    ("a.nii.gz", lambda p: p.write_bytes(save(p.with_name("b.nii")).read_bytes()), "opens", "is not compressed"),
    ("a.nii.gz", lambda p: p.write_text("<!DOCTYPE html><html></html>"), "opens", "web page"),
    ("a.nii.gz", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "opens", "git-lfs"),
    ("a.nii.gz", lambda p: p.write_bytes(save(p).read_bytes()[:-4]), "opens", "cannot be read to its end"),
    ("a.nii", lambda p: with_header(p, dim=ABSURD), "size", "30000 x 30000 x 30000 voxels"),
    ("a.nii", lambda p: with_header(p, dim=[3, 240, 240, 240, 1, 1, 1, 1]), "opens", "declares 27648000 bytes"),
    ("a.nii", lambda p: save(p, volume((8, 8, 8, 5))), "one volume", r"4 dimensions \(8 x 8 x 8 x 5\).*functional run"),
    ("a.nii", lambda p: save(p, volume((64, 64, 1))), "one volume", "single slice"),
    ("a.nii", lambda p: save(p, RGB), "real numbers", "RGB"),
    ("a.nii", lambda p: with_header(p, **FLAT), "affine", "cannot be inverted"),
    ("a.nii", lambda p: with_header(p, sform_code=1, srow_y=[1.0, 2.5, 0, -50]), "one place", "and a qform, 50 mm off"),
    ("a.nii", lambda p: save(p, spacing=(2.5, 2.5, 6)), "spacing", "2.5 x 2.5 x 6 mm; 0.3 to 4 mm"),
    ("a.nii", lambda p: save(p, spacing=0.29), "spacing", "header is in mm"),
    ("a.nii", lambda p: save(p, volume((SIDE, SIDE, 31))), "field of view", "80 x 80 x 78 mm; .* 80 mm on each axis"),
    ("a.nii", lambda p: save(p, volume((SIDE, SIDE, 241))), "field of view", "80 x 80 x 602 mm; .* into 600 mm"),
    ("a.nii", lambda p: save(p, sparse(1, np.nan)), "finite", "has 1 voxels"),
    ("a.nii", lambda p: save(p, volume(dtype=np.float64) * 1e300), "finite", "in float32"),
    ("a.nii", lambda p: save(p, sparse(0)), "not empty", "no voxel other than zero"),
    ("a.nii", lambda p: save(p, sparse(SIDE**3)), "not constant", "value 9 in every voxel"),
    ("a.nii", lambda p: save(p, sparse(SIDE**3 // 250)), "bright", "percentile of 0"),
]
# file name, how it is made: at the edge of the criteria, and still good
GOOD: list[tuple[str, Make]] = [
    ("a.nii.gz", lambda p: save(p, kind=nib.Nifti2Image)),
    ("a.nii", lambda p: save(p, volume((20, 20, 20)), spacing=4.0)),
    ("a.nii", lambda p: save(p, volume((SIDE, SIDE, 267)), spacing=(2.5, 2.5, 0.3))),
    ("a.nii", lambda p: save(p, sparse(SIDE**3 // 100))),
    ("a.nii", lambda p: with_header(p, sform_code=1, srow_y=[1.0, 2.5, 0.0, -50.0], pixdim=SHEARED)),
]
# same subject, session and file name is one scan
TWICE = [
    (["sub-1/T1.nii", "sub-1/T1.nii.gz"], 1),
    (["sub-1/ses-1/T1.nii", "sub-1/ses-2/T1.nii"], 2),
    (["sub-1/T1.nii", "sub-2/T1.nii"], 2),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache out of the tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def cohort(root: Path, n_good: int = 2, bad: tuple[str, ...] = ()) -> list[dict[str, str]]:
    """Make a folder of good scans and of empty files, and list it."""
    for number in range(n_good):
        save(root / f"good{number}.nii")
    for name in bad:
        (root / name).write_bytes(b"")
    return read_cohort(str(root))


@pytest.mark.parametrize(("name", "make", "criterion", "says"), BAD)
def test_bad_file_meets_its_criterion(tmp_path: Path, name: str, make: Make, criterion: str, says: str) -> None:
    """Each fault is found by the criterion meant for it."""
    make(tmp_path / name)
    problem = check_scan(tmp_path / name)
    assert problem and problem[0] == criterion and re.search(says, problem[1]), problem


@pytest.mark.parametrize(("name", "make"), GOOD)
def test_good_file_passes(tmp_path: Path, name: str, make: Make) -> None:
    """Formats, types and sizes up to the limits are good."""
    make(tmp_path / name)
    assert check_scan(tmp_path / name) is None


def test_stop_gathers_all_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], own_cache: Path) -> None:
    """One error holds all bad files in one table, each in a line, in the second run too; good ones are remembered."""
    records = cohort(tmp_path, bad=("bad1.nii", "bad2.nii.gz"))
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            check_cohort(records, checks="stop")
        first, _header, *rows = str(caught.value).splitlines()
        assert first.startswith("2 of 4 scans fail")
        expected = [[str(tmp_path / name), "opens", "is"] for name in ("bad1.nii", "bad2.nii.gz")]
        assert [row.split()[:3] for row in rows] == expected
    assert capsys.readouterr() == ("", "")
    assert len(json.loads((own_cache / "brain_t1_vae" / "preflight.json").read_text())["passed"]) == 2


def test_skip_goes_on_with_the_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed once and the good scans come back in their order; none left is an error."""
    records = cohort(tmp_path, bad=("bad.nii",))
    assert [r["name"] for r in check_cohort(records, checks="skip")] == ["good0", "good1"]
    out = capsys.readouterr().out
    assert "3 scans, 2 good" in out and out.count("bad.nii") == 1
    with pytest.raises(InputError, match="1 of 1 scans fail"):
        check_cohort(records[:1], checks="skip")
    with pytest.raises(InputError, match="'stop' or 'skip'"):
        check_cohort(records, checks="Stop")
    with pytest.raises(InputError, match="no scan to check"):
        check_cohort([])


def test_label_is_required_where_asked(tmp_path: Path) -> None:
    """A record without a label is bad only for jobs that need one, even if its file is known to be good."""
    records = cohort(tmp_path)
    records[0]["label"] = "control"
    assert check_cohort(records) == records
    assert check_cohort(records, checks="skip", label_required=True) == records[:1]


@pytest.mark.parametrize(("paths", "n_good"), TWICE)
def test_scan_listed_twice(tmp_path: Path, paths: list[str], n_good: int) -> None:
    """Same subject, session and file name is one scan; the first stays, known from an earlier run or not."""
    for path in paths:
        save(tmp_path / path)
    records = read_cohort(str(tmp_path), form="folder")
    for _ in range(2):
        assert check_cohort(records, checks="skip") == records[:n_good]


@pytest.mark.parametrize("in_report_dir", [False, True])
def test_second_run_opens_no_file(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, in_report_dir: bool
) -> None:
    """Unchanged files are known, wherever that is remembered, until the criteria change; the cache tells no path."""
    records = cohort(tmp_path / "scans")
    report_dir = tmp_path / "report" if in_report_dir else ""
    assert check_cohort(records, report_dir=report_dir) == records
    monkeypatch.setattr(preflight, "check_scan", lambda path: ("opens", "was opened."))
    assert check_cohort(records, report_dir=report_dir) == records
    folder = report_dir or own_cache / "brain_t1_vae"
    assert os.listdir(folder) == ["preflight.json"]
    text = Path(folder, "preflight.json").read_text()
    assert "good0" not in text and str(tmp_path) not in text
    monkeypatch.setattr(preflight, "CRITERIA_VERSION", preflight.CRITERIA_VERSION + 1)
    with pytest.raises(InputError, match="was opened"):
        check_cohort(records, report_dir=report_dir)


@pytest.mark.parametrize("change", ["size", "time"])
def test_changed_file_is_checked_again(tmp_path: Path, change: str) -> None:
    """A file with another size or time is not the one that passed."""
    records = cohort(tmp_path)
    path = Path(records[0]["image"])
    check_cohort(records)
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] if change == "size" else save(path, sparse(0)).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    assert check_cohort(records, checks="skip") == records[1:]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2, "passed": [3]}', "\udcff"])
def test_damaged_cache_is_ignored(tmp_path: Path, text: str) -> None:
    """Nonsense in the cache costs a new check and is then overwritten; one that cannot be made is no error."""
    records = cohort(tmp_path / "scans", 1)
    file = tmp_path / "preflight.json"
    file.write_text(text, errors="surrogateescape")
    assert check_cohort(records, report_dir=tmp_path) == records
    assert len(json.loads(file.read_text())["passed"]) == 1
    assert check_cohort(records, report_dir=file) == records
