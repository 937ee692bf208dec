"""A user's mistake, made the way a user makes it: one line that names the file, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY_NETWORK, write_scan


def bad_scans(folder: Path) -> Path:
    """A folder with a good scan, half of one, and a functional run."""
    good = write_scan(folder / "good.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    nib.save(nib.Nifti1Image(np.ones((30, 30, 30, 5), np.int16), np.diag([4.0, 4, 4, 1])), folder / "functional.nii.gz")
    return folder


def other_weights(path: Path) -> Path:
    """A state dict of another network."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    return path


# The job, what the user types, and what the one line must say.
CASES: dict[str, tuple[str, Callable[[Path], list[str]], list[str]]] = {
    "weights of another network": (
        "inference",
        lambda t: ["--dataset_dir", str(write_scan(t / "s.nii.gz")), "--weights", str(other_weights(t / "w.pt"))],
        ["w.pt", "another architecture"],
    ),
    "bad scans": (
        "inference",
        lambda t: ["--dataset_dir", str(bad_scans(t / "scans"))],
        ["truncated", "functional", "2 of 3"],
    ),
    "a label that the cohort has not": (
        "train",
        lambda t: ["--dataset_dir", "{bids}", "--label", "diagnosis"],
        ["diagnosis", "group"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_clear_error(
    case: str, run_bundle: Callable[..., subprocess.CompletedProcess[str]], bids: Path, tmp_path: Path
) -> None:
    """Exit code 2, the file's name, no traceback, no output."""
    job, make, expected = CASES[case]
    words = [word.replace("{bids}", str(bids)) for word in make(tmp_path)]
    output = ["--config_file", f"configs/{job}.json", "--output_dir", str(tmp_path / "out")]
    done = run_bundle(*output, *TINY_NETWORK, *words, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in expected), done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "preflight.json"]
