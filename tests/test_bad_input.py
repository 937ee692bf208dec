"""A user's mistake, made the way a user makes it: one line that names the file, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY_NETWORK, write_scan


@pytest.fixture
def bad_scans(tmp_path: Path) -> Path:
    """A folder with a good scan, half of one, and a functional run."""
    folder = tmp_path / "scans"
    good = write_scan(folder / "good.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    nib.save(nib.Nifti1Image(np.ones((30, 30, 30, 5), np.int16), np.diag([4.0, 4, 4, 1])), folder / "functional.nii.gz")
    return folder


# The job, the fixture of its cohort, more arguments, and what the one error must say.
CASES = {
    "bad scans": ("inference", "bad_scans", [], ["truncated", "functional", "2 of 3"]),
    "a label that the cohort has not": ("train", "bids", ["--label", "diagnosis"], ["diagnosis", "group"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_clear_error(
    case: str,
    request: pytest.FixtureRequest,
    run_bundle: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Exit code 2, the file's name, no traceback, no output."""
    job, cohort, more, expected = CASES[case]
    given = ["--dataset_dir", str(request.getfixturevalue(cohort)), "--output_dir", str(tmp_path / "out"), *more]
    done = run_bundle("--config_file", f"configs/{job}.json", *given, *TINY_NETWORK, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in expected), done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "preflight.json"]
