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

N_FEW, N_FILES = 1000, 50_000
N_SCANS = {"check": 10_000, "encode": 10_000, "evaluate": 5000}  # evaluating takes three times as long as encoding
MOST_TIME = 1.1  # in proportion to the scans; the start, which both pay, makes it less; quadratic would be 5 or 10
MOST_MEMORY = 1.15  # records and rows of 10,000 scans are some twenty MB beside half a GB of libraries
CHECK = (
    "import sys; from scripts.cohort import read_cohort; from scripts.cohort.preflight import check_cohort; "
    "check_cohort(read_cohort(sys.argv[1]), report_dir=sys.argv[2])"
)


def cost(*command: str) -> tuple[float, float]:
    """Processor seconds and peak resident memory in GB of a Python command, which has to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-W", "ignore", *command]
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB on Linux
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """A cohort of so many scans of 22 x 24 x 22 voxels, 12 KB each, no two neighbours alike."""

    @cache
    def write(n_scans: int) -> str:
        folder = tmp_path_factory.mktemp("load")
        volume = (head(0, (22, 24, 22)) / 8).astype(np.uint8)
        affine = np.diag([-4.0, 4.0, 4.0, 1.0])
        for number in range(n_scans):
            nib.save(nib.Nifti1Image(np.roll(volume, number % 7, axis=0), affine), folder / f"scan_{number:04d}.nii")
        return str(folder)

    return write


@pytest.mark.parametrize(("job", "n_scans"), N_SCANS.items())
def test_time_grows_in_proportion_and_memory_not_at_all(
    job: str, n_scans: int, cohort: Callable[[int], str], weights: Path, tmp_path: Path
) -> None:
    """Of the pre-flight check alone, of encoding with all that belongs to it, and of an evaluation without LPIPS and
    baselines; a result for each scan. Prints the figures of docs/robustness.md."""
    # Beside LPIPS, which keeps nothing between volumes, everything else of a tiny evaluation is a trifle of its time.
    (tmp_path / "without_lpips.json").write_text('{"perceptual": "$torch.nn.MSELoss()"}')
    files = {"encode": ["configs/encode.json"], "evaluate": ["configs/evaluate.json", f"{tmp_path}/without_lpips.json"]}
    more = ["--split", "all", "--baselines", "[]"] if job == "evaluate" else []

    def cost_of(n: int) -> tuple[float, float]:
        output = str(tmp_path / str(n))
        if job == "check":
            return cost("-c", CHECK, cohort(n), output)
        return cost(
            "-m", "monai.bundle", "run", "--config_file", str(files[job]), "--dataset_dir", cohort(n), "--output_dir",
            output, "--weights", str(weights), *TINY_JOB, "--spatial_size", "[32, 32, 32]", *more,
        )  # fmt: skip

    (few_seconds, few_memory), (seconds, memory) = cost_of(N_FEW), cost_of(n_scans)
    print(f"\n{job}, {n_scans}: time x {seconds / few_seconds:.2f}, memory x {memory / few_memory:.2f} "
          f"({memory:.2f} GB), {1000 * (seconds - few_seconds) / (n_scans - N_FEW):.1f} ms a scan")  # fmt: skip
    assert seconds < MOST_TIME * n_scans / N_FEW * few_seconds
    assert memory < MOST_MEMORY * few_memory
    name, count = {
        "check": ("preflight.json", lambda text: len(json.loads(text)["passed"])),
        "encode": ("manifest.jsonl", lambda text: len(text.splitlines())),
        "evaluate": ("metrics.csv", lambda text: (len(text.splitlines()) - 1) / 2),  # model and identity
    }[job]
    assert count((tmp_path / str(n_scans) / name).read_text()) == n_scans


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
    start, records = time.process_time(), read(str(tmp_path))
    seconds = time.process_time() - start
    print(f"\n{kind}: {seconds:.1f} s")
    assert len({record["name"] for record in records}) == N_FILES
    assert seconds < 20  # with room for slow disks
