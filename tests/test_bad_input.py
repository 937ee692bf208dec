"""A user's mistake, made the way a user makes it: one line that names the file, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from conftest import TINY_NETWORK, write_scan


def test_a_mistake_ends_in_one_clear_error(
    run_bundle: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Of a good scan, half of one, and a functional run: exit code 2, both names, no traceback, no output."""
    folder = tmp_path / "scans"
    good = write_scan(folder / "good.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    nib.save(nib.Nifti1Image(np.ones((30, 30, 30, 5), np.int16), np.diag([4.0, 4, 4, 1])), folder / "functional.nii.gz")
    given = ["--dataset_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    done = run_bundle("--config_file", "configs/inference.json", *given, *TINY_NETWORK, check=False)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("truncated", "functional", "2 of 3")), done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "preflight.json"]
