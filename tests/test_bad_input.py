"""A user's mistake, made the way a user makes it: one line that names the file, exit code 2, nothing written."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, head, write_scan

Run = Callable[..., subprocess.CompletedProcess[str]]

AFFINE = np.diag([4.0, 4.0, 4.0, 1.0])


def save(volume: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    """A NIfTI of any content."""
    nib.save(nib.Nifti1Image(volume, affine), path)
    return path


def many_bad_scans(folder: Path) -> Path:
    """One folder with every kind of broken scan that can stand in a folder."""
    folder.mkdir()
    good = write_scan(folder / "good.nii.gz").read_bytes()
    (folder / "empty_file.nii.gz").touch()
    (folder / "truncated.nii.gz").write_bytes(good[: len(good) // 2])
    (folder / "text.nii.gz").write_text("this is not an image")
    save(np.ones((30, 30, 30, 5), np.int16), folder / "functional.nii.gz")
    save(np.zeros((36, 44, 36), np.int16), folder / "zeros.nii.gz")
    save(np.full((36, 44, 36), 7, np.int16), folder / "constant.nii.gz")
    with_nan = head(1).astype(np.float32)
    with_nan[9, 9, 9] = np.nan
    save(with_nan, folder / "nan.nii.gz")
    with_inf = head(1).astype(np.float32)
    with_inf[9, 9, 9] = np.inf
    save(with_inf, folder / "inf.nii.gz")
    save(head(1)[:5, :5, :5], folder / "tiny.nii.gz")
    save(head(1), folder / "absurd_spacing.nii.gz", np.diag([400.0, 400.0, 400.0, 1.0]))
    singular = nib.Nifti1Image(head(1), AFFINE)
    singular.header["srow_x"] = 0
    singular.header["sform_code"] = 1
    raw = bytearray(singular.to_bytes())
    raw[280:296] = bytes(16)  # srow_x
    (folder / "singular_affine.nii").write_bytes(raw)
    return folder


def html_weights(path: Path) -> Path:
    """A web page saved under a weights file's name."""
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    return path


def other_weights(path: Path) -> Path:
    """A state dict of another network."""
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    return path


def csv(path: Path, text: str) -> Path:
    """A CSV file."""
    path.write_text(text)
    return path


# what the user types, and what the one line must say
CASES: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "missing file": (lambda t: ["--dataset_dir", str(t / "no.nii.gz")], ["no.nii.gz"]),
    "csv without the column": (
        lambda t: ["--dataset_dir", str(csv(t / "c.csv", "file,age\na.nii.gz,3\n"))],
        ["c.csv", "image", "file, age"],
    ),
    "csv with a missing file": (
        lambda t: ["--dataset_dir", str(csv(t / "c.csv", "image\nmissing.nii.gz\n"))],
        ["c.csv", "missing.nii.gz"],
    ),
    "html as weights": (
        lambda t: ["--dataset_dir", str(write_scan(t / "s.nii.gz")), "--weights", str(html_weights(t / "w.pt"))],
        ["w.pt", "no weights file"],
    ),
    "weights of another network": (
        lambda t: ["--dataset_dir", str(write_scan(t / "s.nii.gz")), "--weights", str(other_weights(t / "w.pt"))],
        ["w.pt", "another architecture"],
    ),
    "every kind of broken scan": (
        lambda t: ["--dataset_dir", str(many_bad_scans(t / "bad"))],
        ["empty_file", "truncated", "text", "functional", "zeros", "constant", "nan", "inf", "tiny", "absurd_spacing",
         "singular_affine", "11 of 12"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_ends_in_one_clear_error(case: str, run_bundle: Run, tmp_path: Path) -> None:
    """Exit code 2, the file's name, no traceback, no output."""
    make, expected = CASES[case]
    done = run_bundle(
        "--config_file", "configs/inference.json", "--output_dir", str(tmp_path / "out"), *TINY_NETWORK,
        *make(tmp_path), check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    for words in expected:
        assert words in done.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name != "preflight.json"]


def test_training_wants_the_labels_that_it_balances(run_bundle: Run, bids: Path, tmp_path: Path) -> None:
    """A label column that does not exist is named before any training, with the columns that do."""
    done = run_bundle(
        "--config_file", "configs/train.json", "--dataset_dir", str(bids), "--label", "diagnosis",
        "--output_dir", str(tmp_path), *TINY_NETWORK, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "diagnosis" in done.stderr and "group" in done.stderr
    assert "Traceback" not in done.stderr


def test_shipped_weights_fit_the_shipped_network() -> None:
    """models/model.pt loads into the network of the configs, and is under the zoo's 25 MB."""
    import json

    from scripts.networks import BrainVAE, load_weights

    definition = json.loads((ROOT / "configs" / "inference.json").read_text())["network_def"]
    load_weights(BrainVAE(**{k: v for k, v in definition.items() if k != "_target_"}), ROOT / "models" / "model.pt")
    assert (ROOT / "models" / "model.pt").stat().st_size < 25e6
