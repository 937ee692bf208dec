"""Altered copies of a cohort: each alteration by what it does to a volume, and the copy as a cohort."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_scan
from nibabel.affines import apply_affine
from scipy.ndimage import center_of_mass

from scripts.alter_cohort import alterations, copy_cohort
from scripts.cohort import read_cohort
from scripts.run import InputError

NOTHING = {"tilt_degrees": 0.0, "spacing": 4.0, "bias": 0.0, "gamma": 1.0}
BAD = [("spacing", 0.0), ("gamma", float("nan")), ("tilt_degrees", 120.0), ("bias", 3.0)]


def altered(path: Path, **changes: float) -> tuple[np.ndarray, np.ndarray]:
    """Volume and affine."""
    volume = alterations(**{**NOTHING, **changes})(path)
    return volume[0].numpy(), np.asarray(volume.affine)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny head."""
    return write_scan(tmp_path_factory.mktemp("scan") / "a.nii.gz")


def test_a_tilted_head_lies_where_it_lay(scan: Path) -> None:
    """Turned in its grid, and its centre at the same place in the world."""
    (plain, plain_affine), (tilted, affine) = altered(scan), altered(scan, tilt_degrees=20.0)
    assert tilted.shape[1] > plain.shape[1] and tilted.shape[2] > plain.shape[2]
    centres = apply_affine(plain_affine, center_of_mass(plain)), apply_affine(affine, center_of_mass(tilted))
    assert np.allclose(*centres, atol=0.5)
    axis = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    assert np.degrees(np.arccos(axis[1])) == pytest.approx(20)


def test_a_bias_field_multiplies(scan: Path) -> None:
    """By exp(b (1 + x + y + z)): e^4b in one corner and e^-2b in the other."""
    plain, biased = altered(scan)[0], altered(scan, bias=0.2)[0]
    inside = plain > 100
    log_ratio = np.log(biased[inside] / plain[inside])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in plain.shape], indexing="ij"))
    assert np.allclose(log_ratio, (0.2 * (1 + grid.sum(0)))[inside], atol=1e-3)


def test_gamma_bends_intensities_and_keeps_the_range(scan: Path) -> None:
    """v -> v^gamma between the least and the largest; atol: float32 of 1000."""
    plain, flat = altered(scan)[0], altered(scan, gamma=0.6)[0]
    low, width = plain.min(), np.ptp(plain)
    assert np.allclose(flat, ((plain - low) / width) ** 0.6 * width + low, atol=0.05)


def test_a_copy_is_a_cohort_and_goes_on(bids: Path, tmp_path: Path) -> None:
    """Subjects keep their splits; a second run makes what is missing, the same bytes."""
    copy_cohort(str(bids), str(tmp_path), spacing=4.0)
    copied, original = read_cohort(str(tmp_path / "cohort.csv")), read_cohort(str(bids))
    assert [(scan["subject"], scan["split"]) for scan in copied] == [(s["subject"], s["split"]) for s in original]
    assert {Path(scan["image"]).parent for scan in copied} == {tmp_path}
    before = {path: path.read_bytes() for path in sorted(tmp_path.glob("*.nii.gz"))}
    next(iter(before)).unlink()
    copy_cohort(str(bids), str(tmp_path), spacing=4.0)
    assert {path: path.read_bytes() for path in sorted(tmp_path.glob("*.nii.gz"))} == before


@pytest.mark.parametrize(("name", "value"), BAD)
def test_numbers_that_are_no_alteration_are_refused(name: str, value: float, bids: Path, tmp_path: Path) -> None:
    """By name, before anything is written."""
    with pytest.raises(InputError, match=name):
        copy_cohort(str(bids), str(tmp_path / "out"), **{name: value})
    assert not (tmp_path / "out").exists()
