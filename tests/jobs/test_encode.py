"""Encoding and decoding from their configs: interrupted, in two processes, there and back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_JOB, contents, encoding, make_weights, write_scan

from scripts.convert_latents import import_folder, write_original
from scripts.latents import ENDING, read_latent, read_statistics

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_encoding_leaves_a_finished_folder(encoded: Path) -> None:
    """A latent a volume, a manifest line each, statistics; the header knows the record and no folder of the source."""
    manifest = [json.loads(line) for line in (encoded / "manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == len(list(encoded.glob(f"*{ENDING}"))) == 8
    assert {entry["split"] for entry in manifest} == {"train", "val"}
    assert read_statistics(encoded)["n"] == 8
    latent = read_latent(encoded / manifest[0]["file"])
    assert latent.mu.shape == (4, 8, 9, 8) and latent.mu.dtype == torch.float32
    assert latent.header["source_file"] == "sub-01_T1w.nii.gz"
    assert latent.header["label"] in ("patient", "control")
    assert str(encoded.parent.parent) not in json.dumps(latent.header)


def test_a_killed_encoding_ends_as_if_it_had_not_been(
    encoded: Path, bids: Path, weights: Path, run_bundle: Run, tmp_path: Path
) -> None:
    """SIGKILL after the second latent, then the same command: the same files, byte by byte, and no other."""
    output = tmp_path / "latents"
    arguments = encoding(bids, output, weights, "--label", "group")
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(output.glob(f"*{ENDING}"))) < 2:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "manifest.jsonl").exists()
    run_bundle(*arguments)
    assert contents(output) == contents(encoded)


def test_two_runs_into_one_folder_do_not_meet(encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """Started at once, without torchrun: both end well, and the folder is that of one run."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run"]
    command += encoding(bids, tmp_path / "latents", weights, "--label", "group")
    runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert contents(tmp_path / "latents") == contents(encoded)


def test_two_processes_give_what_one_does(encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """torchrun with two ranks, on a folder that a dead rank has left with three volumes missing."""
    output = tmp_path / "latents"
    output.mkdir()
    for name in sorted(path.name for path in encoded.glob(f"*{ENDING}"))[3:]:
        (output / name).write_bytes((encoded / name).read_bytes())
    arguments = encoding(bids, output, weights, "--label", "group")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "-m", "monai.bundle", "run", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(output) == contents(encoded)


def test_other_weights_are_refused_and_overwrite_when_told(
    encoded: Path, bids: Path, run_bundle: Run, tmp_path: Path
) -> None:
    """One sentence, exit code 2, nothing touched; with --overwrite every latent is made anew."""
    output = tmp_path / "latents"
    output.mkdir()
    for path in encoded.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    before = contents(output)
    arguments = encoding(bids, output, make_weights(tmp_path / "other.pt", 1), "--label", "group")
    done = run_bundle(*arguments, check=False)
    assert done.returncode == 2 and "another weights; add --overwrite True" in done.stderr
    assert contents(output) == before
    run_bundle(*arguments, "--overwrite", "True")
    after = contents(output)
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_other_preprocessing_is_refused(encoded: Path, bids: Path, weights: Path, run_bundle: Run) -> None:
    """Another spacing."""
    done = run_bundle(*encoding(bids, encoded, weights, "--label", "group"), "--spacing", "3.5", check=False)
    assert done.returncode == 2 and "another preprocessing" in done.stderr


def test_shards_and_float16(bids: Path, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Subfolders by the name's hash, half the bytes, and all of it in the manifest."""
    output = tmp_path / "latents"
    run_bundle(*encoding(bids, output, weights, "--shards", "3", "--dtype", "float16"))
    manifest = [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == 8
    assert {Path(entry["file"]).parent.name for entry in manifest} <= {"0000", "0001", "0002"}
    assert read_latent(output / manifest[0]["file"]).mu.dtype == torch.float16


@pytest.mark.parametrize("space", ["source", "model"])
def test_encode_then_decode_is_inference(space: str, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """The reconstruction of inference to 1e-4 of the scan's percentile, on the same grid with the same header."""
    scan = write_scan(tmp_path / "scan.nii.gz", seed=3, spacing=3.0)
    common = ["--weights", str(weights), *TINY_JOB]
    folders = {job: tmp_path / job for job in ("inference", "encode", "decode")}
    inputs = {"inference": scan, "encode": scan, "decode": folders["encode"]}
    more = {"inference": ["--save_model_space", "True"], "encode": [], "decode": ["--space", space]}
    for job, folder in folders.items():
        run_bundle(
            "--config_file", f"configs/{job}.json", "--dataset_dir", str(inputs[job]), "--output_dir", str(folder),
            *common, *more[job],
        )  # fmt: skip
    ending = {"source": "recon", "model": "model_space_recon"}[space]
    expected = nib.load(folders["inference"] / f"scan_{ending}.nii.gz")
    found = nib.load(folders["decode"] / "scan_decoded.nii.gz")
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found.affine, expected.affine)
    for key in ("sform_code", "qform_code", "xyzt_units"):
        assert found.header[key] == expected.header[key]
    factor = read_latent(folders["encode"] / f"scan{ENDING}").header["intensity_factor"] if space == "source" else 1
    assert np.abs(found.get_fdata() - expected.get_fdata()).max() < 1e-4 * factor
    assert (folders["decode"] / "scan_decoded.png").is_file() and (folders["decode"] / "decoded.png").is_file()


def test_latents_of_other_weights_are_not_decoded(encoded: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Refused before the first one, with the remedy."""
    done = run_bundle(
        "--config_file", "configs/decode.json", "--dataset_dir", str(encoded), "--output_dir", str(tmp_path / "out"),
        "--weights", str(make_weights(tmp_path / "other.pt", 1)), *TINY_JOB, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "encoded with other weights" in done.stderr
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_latents_from_elsewhere_are_decoded_to_model_space(weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """The original system's pickles, imported: they know neither weights nor scan."""
    write_original(tmp_path / "pickles" / "x.pkl", torch.zeros(4, 8, 9, 8), torch.zeros(4, 8, 9, 8), 1)
    import_folder(str(tmp_path / "pickles"), str(tmp_path / "latents"))
    run_bundle(
        "--config_file", "configs/decode.json", "--dataset_dir", str(tmp_path / "latents"),
        "--output_dir", str(tmp_path / "out"), "--weights", str(weights), *TINY_JOB,
    )  # fmt: skip
    assert nib.load(tmp_path / "out" / "x_decoded.nii.gz").shape == (32, 36, 32)
