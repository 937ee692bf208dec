"""Cohorts of thousands: memory that does not grow with them, time that grows in proportion, listings in seconds.

Processor seconds are compared, not those of the clock: other work on the machine does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY_JOB, head

from scripts.cohort import read_cohort
from scripts.latents import list_latents

pytestmark = pytest.mark.slow

N_FEW, N_EVALUATED, N_SCANS = 1000, 5000, 10_000  # evaluating takes three times as long as encoding
N_FILES = 50_000
MOST_TIME = 1.1  # in proportion to the scans; the start, which both pay, makes it less; quadratic would be 5 or 10
MOST_MEMORY = 1.15  # records and rows of 10,000 scans are some twenty MB beside half a GB of libraries
MOST_SECONDS = 20.0  # to list a folder, with room for slow disks

# Beside LPIPS, which keeps nothing between volumes, everything else of a tiny evaluation is a trifle of its time.
WITHOUT_LPIPS = {"perceptual": "$torch.nn.MSELoss()"}
CHECK = (
    "import sys; from scripts.cohort import read_cohort; from scripts.cohort.preflight import check_cohort; "
    "check_cohort(read_cohort(sys.argv[1]), report_dir=sys.argv[2])"
)


def write_cohort(folder: Path, n_scans: int) -> Path:
    """Scans of 22 x 24 x 22 voxels, 12 KB each, no two neighbours alike."""
    folder.mkdir()
    volume = (head(0, (22, 24, 22)) / 8).astype(np.uint8)
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])
    for number in range(n_scans):
        nib.save(nib.Nifti1Image(np.roll(volume, number % 7, axis=0), affine), folder / f"scan_{number:04d}.nii")
    return folder


def cost(*command: str) -> tuple[float, float]:
    """Processor seconds and peak resident memory in GB of a Python command, which has to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB on Linux
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


def job(config_file: str, cohort: Path, weights: Path, output: Path, *more: str) -> tuple[float, float]:
    """Cost of a job with the tiny network."""
    return cost(
        "-m", "monai.bundle", "run", "--config_file", config_file, "--dataset_dir", str(cohort), "--output_dir",
        str(output), "--weights", str(weights), *TINY_JOB, "--spatial_size", "[32, 32, 32]", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A cohort of so many scans."""
    folder = tmp_path_factory.mktemp("load")
    return cache(lambda n_scans: write_cohort(folder / str(n_scans), n_scans))


def assert_scales(name: str, n_scans: int, cost_of: Callable[[int], tuple[float, float]]) -> None:
    """Time in proportion, memory the same; prints the figures of docs/robustness.md."""
    (few_seconds, few_memory), (seconds, memory) = cost_of(N_FEW), cost_of(n_scans)
    print(f"\n{name}, {n_scans}: time x {seconds / few_seconds:.2f}, memory x {memory / few_memory:.2f} "
          f"({memory:.2f} GB), {1000 * (seconds - few_seconds) / (n_scans - N_FEW):.1f} ms a scan")  # fmt: skip
    assert seconds < MOST_TIME * n_scans / N_FEW * few_seconds
    assert memory < MOST_MEMORY * few_memory


def test_the_check_of_10000_scans(cohort: Callable[[int], Path], tmp_path: Path) -> None:
    """The pre-flight check alone; a second run knows all of them."""
    assert_scales("pre-flight", N_SCANS, lambda n: cost("-c", CHECK, str(cohort(n)), str(tmp_path / str(n))))
    passed = json.loads((tmp_path / str(N_SCANS) / "preflight.json").read_text())["passed"]
    assert len(passed) == N_SCANS


def test_encoding_10000_scans(cohort: Callable[[int], Path], weights: Path, tmp_path: Path) -> None:
    """Check, encoding, manifest, statistics and report; a latent for each."""
    assert_scales("encode", N_SCANS, lambda n: job("configs/encode.json", cohort(n), weights, tmp_path / str(n)))
    manifest = (tmp_path / str(N_SCANS) / "manifest.jsonl").read_text().splitlines()
    assert len({json.loads(line)["name"] for line in manifest}) == N_SCANS


def test_evaluating_5000_scans(cohort: Callable[[int], Path], weights: Path, tmp_path: Path) -> None:
    """Every figure but LPIPS, summary, tests and report; two lines of the table for each: model and identity."""
    overlay = tmp_path / "without_lpips.json"
    overlay.write_text(json.dumps(WITHOUT_LPIPS))
    files = f"['configs/evaluate.json', '{overlay}']"
    arguments = ["--split", "all", "--baselines", "[]"]
    assert_scales("evaluate", N_EVALUATED, lambda n: job(files, cohort(n), weights, tmp_path / str(n), *arguments))
    assert len((tmp_path / str(N_EVALUATED) / "metrics.csv").read_text().splitlines()) == 1 + 2 * N_EVALUATED


LISTINGS: dict[str, tuple[Callable[[int], str], Callable[[str], list[Any]]]] = {
    "one folder of scans": (lambda n: f"scan_{n:05d}.nii", read_cohort),
    "a thousand folders of scans": (lambda n: f"{n // 50:04d}/scan_{n:05d}.nii", read_cohort),
    "scans of one name": (lambda n: f"{n // 50:04d}/{n % 50:02d}/T1.nii", read_cohort),
    "a BIDS tree": (lambda n: f"sub-{n:05d}/anat/sub-{n:05d}_T1w.nii", read_cohort),
    "latents": (lambda n: f"{n // 50:04d}/scan_{n:05d}_latent.safetensors", list_latents),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_listing_50000_files_takes_seconds(kind: str, tmp_path: Path) -> None:
    """Each with a name of its own."""
    name, read = LISTINGS[kind]
    for number in range(N_FILES):
        path = tmp_path / name(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    start = time.process_time()
    records = read(str(tmp_path))
    seconds = time.process_time() - start
    print(f"\n{kind}: {seconds:.1f} s")
    assert len({record["name"] for record in records}) == N_FILES
    assert seconds < MOST_SECONDS
