"""Encoding from its config: interrupted, in two processes, into a folder that holds something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, contents, encoding, make_weights
from in_process import input_error, parsed

from scripts.latents import ENDING, read_latent, read_statistics
from scripts.run import InputError, file_sha256

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
# What is changed after the cohort was encoded: the error, which names the remedy.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "spacing": ({"spacing": 3.5}, "another preprocessing"),
    "weights and scan": (
        {"weights": "other.pt", "dataset_dir": "changed"},
        "another weights and another scan; add --overwrite True",
    ),
    "shards": ({"shards": 2, "overwrite": True}, "another 'shards'"),
    "cohort": ({"weights": "other.pt", "dataset_dir": "part", "overwrite": "yes"}, "not of this cohort: give another"),
    "no dtype": ({"dtype": "float64"}, "'dtype' is 'float64'"),
}


def test_encoding_leaves_a_finished_folder(encoded: Path, bids: Path, weights: Path) -> None:
    """A latent a volume, a manifest line each, statistics; the header knows the record and no folder of the source."""
    manifest = [json.loads(line) for line in (encoded / "manifest.jsonl").read_text().splitlines()]
    assert len(manifest) == len(list(encoded.glob(f"*{ENDING}"))) == 8
    assert [entry["split"] for entry in manifest] == ["train"] * 6 + ["val"] * 2
    assert all(entry["sha256"] == file_sha256(encoded / entry["file"]) for entry in manifest)
    latents = [read_latent(encoded / entry["file"]) for entry in manifest]
    statistics = read_statistics(encoded)
    assert statistics["n"] == 8 and statistics["weights_sha256"] == file_sha256(weights)
    means = torch.stack([latent.mu for latent in latents]).double().mean((0, 2, 3, 4))
    np.testing.assert_allclose(statistics["mu"]["mean"], means, rtol=1e-9)
    header = latents[0].header
    assert (header["subject"], header["label"], header["source_file"]) == ("sub-01", "control", "sub-01_T1w.nii.gz")
    assert header["source_sha256"] == file_sha256(bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    assert str(encoded.parent.parent) not in json.dumps(header) and str(bids) not in json.dumps(header)


def test_a_latent_is_the_networks_posterior(encoded: Path, bids: Path, weights: Path) -> None:
    """mu and 2 ln sigma of the preprocessed scan, to float32's rounding on other kernels."""
    parser = parsed("encode", dataset_dir=bids, weights=weights)
    image = parser.get_parsed_content("preprocessing")({"image": str(bids / "sub-02" / "anat" / "sub-02_T1w.nii.gz")})
    network = parser.get_parsed_content("network")
    with torch.no_grad():
        mu, sigma = network.encode(image["image"].as_tensor()[None])
    latent = read_latent(encoded / f"sub-02_T1w{ENDING}")
    torch.testing.assert_close(latent.mu, mu[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent.logvar, 2 * sigma[0].log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]])
def test_several_give_what_one_does(ranks: list[str], encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """The same command twice at once, or torchrun's two ranks, on a folder that a dead run has left with five latents:
    the folder is that of one run, by byte."""
    output = tmp_path / "latents"
    output.mkdir()
    for path in sorted(encoded.glob(f"*{ENDING}"))[3:]:
        shutil.copy(path, output)
    command = [sys.executable, "-W", "ignore", *ranks, "-m", "monai.bundle", "run"]
    command += encoding(bids, output, weights, "--label", "group")
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    for run in [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **options) for _ in range(1 if ranks else 2)]:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert contents(output) == contents(encoded)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_mix_is_refused(case: str, encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """One sentence before the first scan is read, and nothing is touched."""
    output = shutil.copytree(encoded, tmp_path / "latents")
    changes, message = REFUSED[case]
    changes = {key: tmp_path / value if key in ("weights", "dataset_dir") else value for key, value in changes.items()}
    make_weights(tmp_path / "other.pt", 1)
    shutil.copytree(bids, tmp_path / "changed")
    shutil.copytree(bids / "sub-01", tmp_path / "part" / "sub-01")
    scan = tmp_path / "changed" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine, image.header), scan)
    with pytest.raises((RuntimeError, InputError)) as raised:
        keys = {"dataset_dir": bids, "output_dir": output, "weights": weights, **changes}
        parsed("encode", **keys).get_parsed_content("remaining")
    assert message in input_error(raised.value)
    assert contents(output) == contents(encoded)


def test_overwrite_makes_every_latent_anew(encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """Without a change nothing is left to do; with other weights all of it, and what speaks of old files is gone."""
    output = shutil.copytree(encoded, tmp_path / "latents")
    keys = {"dataset_dir": bids, "output_dir": output, "overwrite": "true"}
    assert parsed("encode", **keys, weights=weights).get_parsed_content("remaining") == []
    assert contents(output) == contents(encoded)
    other = make_weights(tmp_path / "other.pt", 1)
    assert len(parsed("encode", **keys, weights=other).get_parsed_content("remaining")) == 8
    assert not (output / "manifest.jsonl").exists() and not (output / "latent_stats.json").exists()


def test_shards_and_float16(encoded: Path, bids: Path, weights: Path, tmp_path: Path) -> None:
    """Subfolders by the name's hash, all of them in the manifest, half the digits."""
    keys = {"dataset_dir": bids, "output_dir": tmp_path, "weights": weights, "shards": 3, "dtype": "float16"}
    job = parsed("encode", **keys, split="val")
    job.get_parsed_content("evaluator").run()
    job.get_parsed_content("latent_writer").finish()
    files = [json.loads(line)["file"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(files) == 2 and {Path(file).parent.name for file in files} <= {"0000", "0001", "0002"}
    for file in files:  # 11 bits of values up to about 5
        found, exact = read_latent(tmp_path / file).mu, read_latent(encoded / Path(file).name).mu
        torch.testing.assert_close(found, exact.half(), rtol=2e-3, atol=1e-3)
