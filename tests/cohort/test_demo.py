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
from scipy import ndimage

from scripts.cohort import demo
from scripts.cohort.demo import N_SUBJECTS, demo_cohort, demo_scan, participants
from scripts.cohort.demo_anatomy import Templates, load_templates
from scripts.run import InputError

# Number, group and whether the scan is a whole head: all four kinds are among the first four subjects.
KINDS = [(1, "control", False), (2, "patient", False), (3, "control", True), (4, "patient", True)]


@pytest.fixture(scope="module")
def templates() -> Templates:
    """nilearn's tissue maps, loaded once."""
    return load_templates()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, templates: Templates) -> Path:
    """The first four subjects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_templates", lambda: templates)
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


def load_ras(root: Path, number: int) -> nib.Nifti1Image:
    """A subject's scan with axes to the right, front and top."""
    return nib.as_closest_canonical(nib.load(scan_path(root, number)))


def files_of(root: Path) -> dict[str, int]:
    """Every file with its time of change."""
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_subject_is_the_same_bytes_in_any_cohort(root: Path, templates: Templates) -> None:
    """Made in order or alone, a subject has the same voxels and header; the file holds no date."""
    stored = scan_path(root, 2).read_bytes()
    assert gzip.decompress(stored) == demo_scan(2, templates).to_bytes()
    assert stored[4:8] == b"\0\0\0\0"  # gzip's modification time


def test_number_of_subjects_changes_no_file(tmp_path: Path, quick: list[int]) -> None:
    """A smaller cohort is part of a larger one."""
    small, large = demo_cohort(2, tmp_path / "small"), demo_cohort(5, tmp_path / "large")
    names = list(files_of(small))
    assert len(names) == 5 and len(files_of(large)) == 8
    assert all((small / name).read_bytes() == (large / name).read_bytes() for name in names)


def test_second_call_touches_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without missing scans no template is loaded and no file is written; fewer scans are no reason either."""
    before = files_of(root)
    monkeypatch.setattr(demo, "load_templates", lambda: pytest.fail("the templates were loaded"))
    assert demo_cohort(4, root) == demo_cohort(1, str(root)) == root
    assert files_of(root) == before


def test_an_interrupted_run_is_finished(tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made stays, what is missing is made, and no temporary file remains."""
    tiny_scan = demo.demo_scan

    def interrupted(number: int, templates: Templates) -> nib.Nifti1Image:
        if number == 3:
            raise KeyboardInterrupt
        return tiny_scan(number, templates)

    monkeypatch.setattr(demo, "demo_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_cohort(4, tmp_path)
    monkeypatch.setattr(demo, "demo_scan", tiny_scan)
    demo_cohort(4, tmp_path)
    assert quick == [1, 2, 3, 4]
    assert len(files_of(tmp_path)) == 3 + 4


def test_groups_are_balanced() -> None:
    """Group, kind of scan and sex are crossed, and age does not give the group away."""
    rows = participants()
    assert [row["participant_id"] for row in rows] == [f"sub-{number:02d}" for number in range(1, N_SUBJECTS + 1)]
    crossed = Counter((row["group"], row["sex"], number // 2 % 2) for number, row in enumerate(rows))
    assert set(crossed.values()) == {3}
    ages = pd.DataFrame(rows).astype({"age": int}).groupby("group")["age"].mean()
    assert abs(ages["control"] - ages["patient"]) < 8  # years; the range is 22 to 78
    assert [row["group"] for row in rows[:4]] == [group for _, group, _ in KINDS]


def test_tables_are_bids(root: Path) -> None:
    """participants.tsv describes all 24 subjects, made or not; the description names source and licence."""
    table = pd.read_csv(root / "participants.tsv", sep="\t", dtype=str)
    assert table.to_dict("records") == participants()
    about = json.loads((root / "dataset_description.json").read_text())
    assert about["DatasetType"] == "derivative" and about["GeneratedBy"] and about["BIDSVersion"]
    assert "nilearn's MNI152 template" in about["License"] and "McConnell" in about["License"]
    assert set(json.loads((root / "participants.json").read_text())) == set(table.columns[1:])


@pytest.mark.parametrize("number, group, whole_head", KINDS)
def test_scans_look_like_scans(root: Path, templates: Templates, number: int, group: str, whole_head: bool) -> None:
    """int16, about 1.5 mm, RAS or LAS, both forms equal, and the brain where the template's is."""
    image = nib.load(scan_path(root, number))
    assert image.get_data_dtype() == np.int16 and image.header.get_xyzt_units()[0] == "mm"
    assert all(1.35 < size < 1.65 for size in image.header.get_zooms())
    assert "".join(nib.aff2axcodes(image.affine)) == ("LAS" if number % 3 == 0 else "RAS")
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)  # mm; float32 quaternions
    assert 0.3e6 < scan_path(root, number).stat().st_size < 3.5e6

    image = load_ras(root, number)
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
        assert bright[~inside].mean() < 0.02


@pytest.mark.parametrize("number", [1, 2])
def test_extracted_scans_have_a_background_of_zero(root: Path, number: int) -> None:
    """Outside of one connected brain every voxel is exactly zero, inside hardly any is."""
    scan = np.asarray(load_ras(root, number).dataobj)
    assert ndimage.label(scan > 0, structure=np.ones((3, 3, 3)))[1] == 1
    filled = ndimage.binary_fill_holes(scan > 0)
    assert (scan[~filled] == 0).all() and 0.5 < (scan == 0).mean() < 0.8
    assert (scan[filled] == 0).mean() < 0.001
    assert 900 < filled.sum() * np.prod(load_ras(root, number).header.get_zooms()) / 1000 < 1900  # ml; template: 1,880


@pytest.mark.parametrize("number", [3, 4])
def test_air_around_whole_heads_is_rician(root: Path, number: int) -> None:
    """Air is dark noise, not zero: the mean of a Rayleigh distribution is 1.91 times its deviation."""
    corner = np.asarray(load_ras(root, number).dataobj)[:20, -20:, -20:].astype(float)
    assert corner.mean() > 0.5
    # Whole numbers of one to three units: rounding widens the deviation by up to a tenth.
    assert corner.mean() / corner.std() == pytest.approx(1.91, rel=0.15)


@pytest.mark.parametrize("control, patient", [(1, 2), (3, 4)])
def test_patients_have_larger_ventricles(root: Path, control: int, patient: int) -> None:
    """The dark volume deep in the brain is at least half as large again."""
    volumes = []
    for number in (control, patient):
        image = load_ras(root, number)
        box = nib.affines.apply_affine(np.linalg.inv(image.affine), [(-30, -55, -5), (30, 35, 32)]).round().astype(int)
        deep = np.asarray(image.dataobj)[tuple(slice(*ends) for ends in box.T)]
        volumes.append((deep < 0.35 * np.percentile(deep, 90)).mean())
    assert volumes[1] > 1.5 * volumes[0]


def test_default_folder_is_the_users_cache(tmp_path: Path, quick: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME first, else ~/.cache (a relative XDG_CACHE_HOME does not count), else the temporary folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo_cohort(1) == tmp_path / "cache" / "brain_t1_vae" / demo.VERSION
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert demo_cohort(1) == tmp_path / "home" / ".cache" / "brain_t1_vae" / demo.VERSION
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = demo_cohort(1)
    assert made.parent.parent == tmp_path and scan_path(made, 1).is_file()


@pytest.mark.parametrize("n_subjects", [0, 25])
def test_impossible_numbers_are_refused(tmp_path: Path, n_subjects: int) -> None:
    """There are 24 subjects."""
    with pytest.raises(InputError, match=f"n_subjects is {n_subjects}.* 1 to 24"):
        demo_cohort(n_subjects, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_given_folder_is_not_replaced(tmp_path: Path, quick: list[int]) -> None:
    """A folder that is a file, or that holds somebody's data, is the user's mistake; nothing is written into it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give it another folder"):
        demo_cohort(1, tmp_path / "file")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "dataset_description.json").write_text('{"Name": "mine"}')
    with pytest.raises(InputError, match="another data set"):
        demo_cohort(1, tmp_path / "study")
    assert list(files_of(tmp_path / "study")) == ["dataset_description.json"] and not quick
