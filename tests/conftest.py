"""What several test files need: paths, small synthetic heads, and configs started the way a user starts them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.networks import BrainVAE

ROOT = Path(__file__).resolve().parents[1]
TINY_NETWORK = [
    "--network_def#channels", "[4, 8]",
    "--spatial_size", "[32, 36, 32]",
    "--spacing", "4.0",
]  # fmt: skip

TINY_JOB = [*TINY_NETWORK, "--device", "cpu"]
TINY_VAE = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "channels": [4, 8],
    "num_res_blocks": [1, 1], "attention_levels": [False] * 2, "wavelet": True, "norm": "position",
    "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
}  # fmt: skip


def head(seed: int, shape: tuple[int, int, int] = (36, 44, 36)) -> np.ndarray:
    """A lopsided smooth blob with texture, int16 in scanner-like units, zero outside."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in shape], indexing="ij"))
    shift = rng.uniform(-0.1, 0.1, 3)[:, None, None, None]
    radius = np.sqrt((((grid - shift) / np.array([0.75, 0.9, 0.8])[:, None, None, None]) ** 2).sum(0))
    tissue = 700 + 250 * np.sin(6 * grid[0] + seed) * np.cos(5 * grid[1]) + 100 * grid[0] + rng.normal(0, 15, shape)
    return np.where(radius < 1, tissue, 0).astype(np.int16)


def write_scan(path: Path, seed: int = 0, spacing: float = 4.0) -> Path:
    """Write `head(seed)` as NIfTI with LAS axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [90, -110, -90]
    image = nib.Nifti1Image(head(seed), affine)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BIDS cohort of eight tiny heads in two groups, with a split column: six train, two val."""
    root = tmp_path_factory.mktemp("cohort") / "bids"
    lines = ["participant_id\tgroup\tsplit"]
    for index in range(8):
        subject = f"sub-{index + 1:02d}"
        write_scan(root / subject / "anat" / f"{subject}_T1w.nii.gz", index)
        lines.append(f"{subject}\t{'patient' if index % 3 else 'control'}\t{'val' if index > 5 else 'train'}")
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def run_bundle() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Start a config as a user does; returns the finished process."""

    def run(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


def make_weights(path: Path, seed: int) -> Path:
    """Random weights of the tiny network."""
    torch.manual_seed(seed)
    torch.save(BrainVAE(**TINY_VAE).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for every test."""
    return make_weights(tmp_path_factory.mktemp("weights") / "model.pt", 0)


def encoding(cohort: Path, output: Path, weights: Path, *more: str) -> list[str]:
    """Arguments of an encoding run."""
    return [
        "--config_file", "configs/encode.json", "--dataset_dir", str(cohort), "--output_dir", str(output),
        "--weights", str(weights), *TINY_JOB, *more,
    ]  # fmt: skip


def interruptible() -> None:
    """For `preexec_fn`: as a shell starts what runs in the foreground; what it starts with & never hears Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a job's folder with its sha256, but those that hold times: run.json, TensorBoard's, the check's."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in found.items()
        if name not in ("preflight.json", "run.json") and not name.startswith("tensorboard/")
    }


@dataclass(frozen=True)
class Job:
    """One run of a job that many tests look at: its folder, and what it printed."""

    folder: Path
    console: str


RunBundle = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def start_job(run_bundle: RunBundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Start a job on the tiny network, in a folder of its own."""

    def start(name: str, *arguments: str) -> Job:
        folder = tmp_path_factory.mktemp(name) / "output"
        done = run_bundle(
            "--config_file", f"configs/{name}.json", "--output_dir", str(folder), *TINY_JOB, *arguments
        )  # fmt: skip
        return Job(folder, done.stdout + done.stderr)

    return start


@pytest.fixture(scope="session")
def trained(start_job: Callable[..., Job], bids: Path) -> Job:
    """Four epochs of training, with LPIPS in the last two."""
    return start_job(
        "train", "--dataset_dir", str(bids), "--epochs", "4", "--batch_size", "2", "--val_interval", "1"
    )  # fmt: skip


@pytest.fixture(scope="session")
def evaluated(start_job: Callable[..., Job], bids: Path, weights: Path) -> Job:
    """An evaluation of the cohort's two validation scans."""
    return start_job("evaluate", "--dataset_dir", str(bids), "--weights", str(weights), "--label", "group")


@pytest.fixture(scope="session")
def reconstructed(start_job: Callable[..., Job], bids: Path, weights: Path) -> Job:
    """Reconstructions of the cohort's two validation scans, in model space too."""
    return start_job(
        "inference", "--dataset_dir", str(bids), "--weights", str(weights), "--split", "val",
        "--save_model_space", "True",
    )  # fmt: skip


@pytest.fixture(scope="session")
def encoded(run_bundle: RunBundle, bids: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the whole cohort, by one run that nobody interrupted."""
    output = tmp_path_factory.mktemp("encoded") / "latents"
    run_bundle(*encoding(bids, output, weights, "--label", "group"))
    return output


@pytest.fixture(scope="session")
def decoded(start_job: Callable[..., Job], encoded: Path, weights: Path) -> Job:
    """The cohort's latents, decoded."""
    return start_job("decode", "--dataset_dir", str(encoded), "--weights", str(weights))


@pytest.fixture(scope="session")
def sampled(start_job: Callable[..., Job], bids: Path, encoded: Path, weights: Path) -> Job:
    """Three samples of a low-rank prior, compared with the cohort."""
    return start_job(
        "sample", "--dataset_dir", str(encoded), "--weights", str(weights), "--prior", "lowrank",
        "--n_components", "3", "--n_samples", "3", "--compare_with", str(bids),
    )  # fmt: skip
