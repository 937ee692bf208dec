"""Every config: its form, its properties, and that it runs as a user starts it, on a tiny network and tiny heads."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_JOB, Job, RunBundle
from monai.bundle import ConfigParser, ConfigWorkflow

JOBS = ["train", "evaluate", "inference", "encode", "decode", "sample"]
SAME_BLOCKS = ["network_def", "preprocessing", "device", "spacing", "spatial_size", "channels_last"]
SAME_IN_EVALUATION = ["cohort", "scans", "val_fraction", "test_fraction", "label", "checks"]
TERMS = ["l1", "mse", "kl", "equivariance"]
THREE_LEVELS = ["--network_def#channels", "[8, 8, 16]", "--network_def#norm_num_groups", "8"]
ATTENTION = ["--attention_levels", "[False, False, True]", "--nonlocal_attention", "True"]
CROPS = ["--crop_size", "16", "--crops_per_scan", "2", "--perceptual_weight", "0"]
# overlay and switches of a training
TRAININGS: dict[str, tuple[list[str], list[str]]] = {
    "lite": (["lite"], [*THREE_LEVELS, "--augment", "False"]),
    "maisi": (["maisi"], [*THREE_LEVELS, *ATTENTION]),
    "finetune-balanced": (["finetune"], ["--balanced", "True", "--label", "group"]),
    "switches": ([], [*CROPS, "--amp", "True", "--num_workers", "2", "--channels_last", "False"]),
}


def config(name: str) -> dict[str, Any]:
    """A config as JSON alone reads it."""
    return json.loads((ROOT / "configs" / f"{name}.json").read_text())


def train(run_bundle: RunBundle, cohort: Path, output: Path, *more: str, overlays: list[str] | None = None) -> None:
    """Run training as the fixture `trained` does, with other keys."""
    files = [f"configs/{name}.json" for name in ("train", *(overlays or []))]
    run_bundle(
        "training", "--config_file", str(files), "--dataset_dir", str(cohort), "--output_dir", str(output),
        "--batch_size", "2", "--val_interval", "1", *TINY_JOB, *more,
    )  # fmt: skip


def test_a_block_is_the_same_in_every_config() -> None:
    """Written out in each config, for macros across files break MONAI's tools; the split's where scans are split."""
    for key in SAME_BLOCKS:
        assert all(config(job)[key] == config("train")[key] for job in JOBS), key
    for key in SAME_IN_EVALUATION:
        assert config("train")[key] == config("evaluate")[key] == config("encode")[key], key


@pytest.mark.parametrize("job", ["train", "evaluate", "inference"])
def test_monai_finds_the_properties_of_a_workflow(
    job: str, bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    """`check_properties` misses nothing."""
    monkeypatch.chdir(ROOT)
    keys = {"dataset_dir": str(bids), "output_dir": str(tmp_path), "weights": str(weights), "device": "cpu"}
    workflow = ConfigWorkflow(
        config_file=f"configs/{job}.json", meta_file="configs/metadata.json", logging_file="configs/logging.conf",
        workflow_type="train" if job == "train" else "infer", spatial_size=[32, 36, 32], spacing=4.0,
        **keys, **{"network_def#channels": [4, 8]},
    )  # fmt: skip
    workflow.initialize()
    assert workflow.check_properties() in (None, [])


def test_training_writes_its_curve_and_weights(trained: Job) -> None:
    """metrics.csv has a line an epoch with every part, after that of the start; model.pt is a bare state dict."""
    curve = pd.read_csv(trained.folder / "metrics.csv", index_col="epoch")
    assert curve.index.tolist() == [0, 1, 2, 3, 4]
    assert np.isfinite(curve[["val_psnr_brain", "val_psnr", "val_l1"]].to_numpy()).all()
    assert np.isfinite(curve.loc[1:, ["learning_rate", "loss", *TERMS, "gradient_norm"]].to_numpy()).all()
    assert curve["lpips"].notna().tolist() == [False, False, False, True, True]  # perceptual_start is 0.5
    assert all(torch.is_tensor(v) for v in torch.load(trained.folder / "model.pt", weights_only=True).values())


def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(
    run_bundle: RunBundle, bids: Path, trained: Job, tmp_path: Path
) -> None:
    """Two epochs, then the other two by --resume True, with augmentation and a cache on disk."""
    cache = ["--epochs", "4", "--cache_dir", str(tmp_path / "cache")]
    train(run_bundle, bids, tmp_path / "run", *cache, "--train#trainer#max_epochs", "2")
    train(run_bundle, bids, tmp_path / "run", *cache, "--resume", "true")
    for name in ("model.pt", "model_final.pt", "metrics.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (trained.folder / name).read_bytes(), name


@pytest.mark.parametrize("name", TRAININGS)
def test_overlays_and_switches_train(
    name: str, run_bundle: RunBundle, bids: Path, weights: Path, tmp_path: Path
) -> None:
    """One epoch with each overlay and switch, by MONAI's older `run training`, ends with finite losses and a model."""
    overlays, more = TRAININGS[name]
    start = ["--weights", str(weights)] if overlays == ["finetune"] else []
    train(run_bundle, bids, tmp_path, "--epochs", "1", *more, *start, overlays=overlays)
    last = pd.read_csv(tmp_path / "metrics.csv").iloc[-1]
    assert last["epoch"] == 1 and np.isfinite(last.dropna()).all() and last["loss"] > 0
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize("job", ["inference", "evaluate", "encode", "decode", "sample"])
def test_lite_brings_the_weights_of_its_network(job: str) -> None:
    """Over every job that runs a trained network."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in (job, "lite")])
    parser["bundle_root"], parser["device"] = str(ROOT), "cpu"
    network = parser.get_parsed_content("network")
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_929_057
    assert parser.get_parsed_content("weights").endswith("models/lite.safetensors")


def test_evaluation_gives_every_figure(evaluated: Job) -> None:
    """Two validation scans, five systems, every column of the protocol."""
    table = pd.read_csv(evaluated.folder / "metrics.csv")
    assert set(table["system"]) == {"model", "identity", "trilinear", "dct", "patch_pca"} and len(table) == 10
    columns = ["l1", "psnr", "psnr_brain", "ssim", "lpips", "kl"]
    assert np.isfinite(table.loc[table["system"] == "model", columns].to_numpy()).all()


def test_inference_gives_the_scan_back_in_its_own_grid(reconstructed: Job, bids: Path) -> None:
    """Same shape, affine and units, float32, intensities of the scan's order; a picture; model space by choice."""
    source = nib.load(bids / "sub-07" / "anat" / "sub-07_T1w.nii.gz")
    (path,) = reconstructed.folder.rglob("sub-07_T1w_recon.nii.gz")
    recon = nib.load(path)
    assert recon.shape == source.shape and recon.get_data_dtype() == np.float32
    np.testing.assert_allclose(recon.affine, source.affine, atol=1e-6)
    assert recon.header.get_xyzt_units() == source.header.get_xyzt_units()
    assert int(recon.header["sform_code"]) == int(recon.header["qform_code"]) == 1
    assert recon.get_fdata().max() > 100
    names = {file.name.split("T1w")[1] for file in path.parent.glob("sub-07*")}
    assert names == {"_recon.nii.gz", "_recon.png", "_model_space.nii.gz", "_model_space_recon.nii.gz"}


def test_metadata_versions_are_the_pins() -> None:
    """metadata.json and requirements.txt say the same versions."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    metadata = config("metadata")
    versions = {"torch": metadata["pytorch_version"], **{k: metadata[f"{k}_version"] for k in ("monai", "numpy")}}
    assert {**versions, **metadata["required_packages_version"]} == pins
    assert metadata["version"] in metadata["changelog"]


def test_files_are_small_enough_for_the_zoo() -> None:
    """25 MB a file, of those that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files and all(file.stat().st_size <= 25e6 for file in files if file.is_file())
