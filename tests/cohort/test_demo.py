"""The demo cohort: the same bytes everywhere, made once, and scans that look like scans."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from scripts.cohort import demo
from scripts.cohort.demo import demo_cohort, demo_scan, participants
from scripts.cohort.demo_anatomy import Templates, load_templates
from scripts.run import InputError


@pytest.fixture(scope="module")
def templates() -> Templates:
    """nilearn's tissue maps, loaded once."""
    return load_templates()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four subjects."""
    return demo_cohort(4, tmp_path_factory.mktemp("demo"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scans of one voxel, made at once; the list says which were made."""
    made: list[int] = []

    def tiny_scan(number: int, templates: object) -> nib.Nifti1Image:
        made.append(number)
        return nib.Nifti1Image(np.full((1, 1, 1), number, np.int16), np.eye(4))

    monkeypatch.setattr(demo, "load_templates", lambda: None)
    monkeypatch.setattr(demo, "demo_scan", tiny_scan)
    return made


def scan_path(root: Path, number: int) -> Path:
    """Where a subject's scan is."""
    return root / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_T1w.nii.gz"


def test_a_subject_is_the_same_bytes_in_any_cohort(root: Path, templates: Templates) -> None:
    """Made in order or alone, a subject has the same voxels and header; the file holds no date."""
    stored = scan_path(root, 2).read_bytes()
    assert gzip.decompress(stored) == demo_scan(2, templates).to_bytes()
    assert stored[4:8] == b"\0\0\0\0"  # gzip's modification time


def test_second_call_touches_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without missing scans no template is loaded and no file is written; fewer scans are no reason either."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(demo, "load_templates", lambda: pytest.fail("the templates were loaded"))
    assert demo_cohort(4, root) == demo_cohort(1, str(root)) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_what_is_missing_is_made(tmp_path: Path, quick: list[int]) -> None:
    """What was made stays, as after an interruption."""
    demo_cohort(4, tmp_path)
    scan_path(tmp_path, 3).unlink()
    demo_cohort(5, tmp_path)
    assert quick == [1, 2, 3, 4, 3, 5]


def test_groups_are_balanced_and_described(root: Path) -> None:
    """Group, kind of scan and sex are crossed, and the tables are BIDS'."""
    rows = participants()
    crossed = Counter((row["group"], row["sex"], number // 2 % 2) for number, row in enumerate(rows))
    assert set(crossed.values()) == {3}
    table = pd.read_csv(root / "participants.tsv", sep="\t", dtype=str)
    assert table.to_dict("records") == rows
    assert "McConnell" in json.loads((root / "dataset_description.json").read_text())["License"]


@pytest.mark.parametrize(("number", "whole_head"), [(1, False), (2, False), (3, True), (4, True)])
def test_scans_look_like_scans(root: Path, templates: Templates, number: int, whole_head: bool) -> None:
    """int16, about 1.5 mm, RAS or LAS, both forms equal, and the brain where the template's is."""
    image = nib.load(scan_path(root, number))
    assert image.get_data_dtype() == np.int16 and image.header.get_xyzt_units()[0] == "mm"
    assert all(1.35 < size < 1.65 for size in image.header.get_zooms())
    assert "".join(nib.aff2axcodes(image.affine)) == ("LAS" if number % 3 == 0 else "RAS")
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)  # mm; float32 quaternions

    image = nib.as_closest_canonical(image)
    scan = np.asarray(image.dataobj)
    index = np.stack(np.meshgrid(*[np.arange(size) for size in scan.shape], indexing="ij"))
    points = index * np.diag(image.affine)[:3, None, None, None] + image.affine[:3, 3][:, None, None, None]
    inside = templates.mask.sample(points.astype(np.float32)) > 0.5
    bright = scan > 0.3 * np.percentile(scan[inside], 98)
    # A smaller brain in its place fills most of the template's; ventricles and sulci are dark.
    assert 0.55 < bright[inside].mean() < 0.98
    if whole_head:
        # The air before the forehead is dark, the neck below is not: the head stands upright and looks forward.
        assert bright[(points[1] > 88) & (points[2] > 10)].mean() < 0.02
        assert bright[(points[2] < -90) & (np.hypot(points[0], points[1] + 30) < 40)].mean() > 0.4
    else:
        assert bright[~inside].mean() < 0.02 and 0.5 < (scan == 0).mean() < 0.8


def test_patients_have_larger_ventricles(root: Path) -> None:
    """The dark volume deep in the brain is at least half as large again."""
    volumes = []
    for number in (1, 2, 3, 4):
        image = nib.as_closest_canonical(nib.load(scan_path(root, number)))
        box = nib.affines.apply_affine(np.linalg.inv(image.affine), [(-30, -55, -5), (30, 35, 32)]).round().astype(int)
        deep = np.asarray(image.dataobj)[tuple(slice(*ends) for ends in box.T)]
        volumes.append((deep < 0.35 * np.percentile(deep, 90)).mean())
    assert volumes[1] > 1.5 * volumes[0] and volumes[3] > 1.5 * volumes[2]


def test_default_folder_is_the_users_cache(tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME, or the temporary folder where that cannot be written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo_cohort(1) == tmp_path / "cache" / "brain_t1_vae" / demo.VERSION
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = demo_cohort(1)
    assert made.parent.parent == tmp_path and scan_path(made, 1).is_file()


def test_what_cannot_be_made_is_refused(tmp_path: Path, quick: list[int]) -> None:
    """More than 24 subjects, and a folder that is a file or holds somebody's data; nothing is written into it."""
    study, file = tmp_path / "study", tmp_path / "file"
    file.write_text("")
    study.mkdir()
    (study / "dataset_description.json").write_text('{"Name": "mine"}')
    for number, folder, says in ((25, tmp_path / "new", "1 to 24"), (1, file, "give it another folder"),
                                 (1, study, "another data set")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            demo_cohort(number, folder)
    assert len(list(study.iterdir())) == 1 and not quick and not (tmp_path / "new").exists()
