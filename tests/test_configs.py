"""Every config, run as a subprocess the way a user starts it, on a tiny network and tiny heads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, write_scan
from monai.bundle import ConfigParser, ConfigWorkflow

Run = Callable[..., subprocess.CompletedProcess[str]]

JOBS = ["train", "evaluate", "inference", "encode", "decode", "sample"]
FIRST_KEYS = ["bundle_root", "dataset_dir", "output_dir", "device"]
ORDER = ["bundle_root", "network_def", "network", "preprocessing", "inferer", "initialize", "run", "imports"]
SAME_BLOCKS = ["network_def", "preprocessing", "device", "spacing", "spatial_size", "channels_last"]
SAME_IN_EVALUATION = ["cohort", "scans", "val_fraction", "test_fraction", "label", "checks"]
RESUMED_FILES = ["model.pt", "model_final.pt"]
TINY_TRAINING = [*TINY_NETWORK, "--batch_size", "2", "--val_interval", "1", "--device", "cpu"]
TERMS = ["l1", "mse", "kl", "equivariance"]
THREE_LEVELS = ["--network_def#channels", "[8, 8, 16]", "--network_def#norm_num_groups", "8"]


def config(name: str) -> dict:
    """A config as it stands in the file."""
    return json.loads((ROOT / "configs" / f"{name}.json").read_text())


def train(run_bundle: Run, cohort: Path, output: Path, epochs: int, *more: str, overlays: tuple[str, ...] = ()):
    """Run training for some epochs."""
    files = [f"configs/{name}.json" for name in ("train", *overlays)]
    return run_bundle(
        "--config_file", str(files), "--dataset_dir", str(cohort), "--output_dir", str(output),
        "--epochs", str(epochs), *TINY_TRAINING, *more,  # of a key that is given twice the last counts
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(run_bundle: Run, bids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of four epochs of training."""
    output = tmp_path_factory.mktemp("trained")
    train(run_bundle, bids, output, 4)
    return output


@pytest.mark.parametrize("job", JOBS)
def test_a_job_begins_with_the_same_four_keys(job: str) -> None:
    """First stand bundle_root, dataset_dir, output_dir and device."""
    assert list(config(job))[:4] == FIRST_KEYS


@pytest.mark.parametrize("job", JOBS)
def test_blocks_stand_in_one_order(job: str) -> None:
    """The reader finds every block where the other configs have it."""
    keys = list(config(job))
    positions = [keys.index(key) for key in ORDER]
    assert positions == sorted(positions)


@pytest.mark.parametrize("key", SAME_BLOCKS)
def test_a_block_is_the_same_in_every_config(key: str) -> None:
    """Written out in each config (macros across files break MONAI's tools), and equal."""
    assert all(config(job)[key] == config("train")[key] for job in JOBS)


@pytest.mark.parametrize("key", SAME_IN_EVALUATION)
def test_training_evaluation_and_encoding_read_the_same_cohort(key: str) -> None:
    """What decides about the split is the same in all."""
    assert config("train")[key] == config("evaluate")[key] == config("encode")[key]


@pytest.mark.parametrize(("job", "kind"), [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_monai_finds_the_properties_of_a_workflow(
    job: str, kind: str, bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    """`check_properties` misses nothing."""
    monkeypatch.chdir(ROOT)
    workflow = ConfigWorkflow(
        config_file=f"configs/{job}.json",
        meta_file="configs/metadata.json",
        logging_file="configs/logging.conf",
        workflow_type=kind,
        dataset_dir=str(bids),
        output_dir=str(tmp_path),
        device="cpu",
        weights=str(trained / "model.pt"),
        spatial_size=[32, 36, 32],
        spacing=4.0,
        **{"network_def#channels": [4, 8]},
    )
    workflow.initialize()
    assert workflow.check_properties() in (None, [])


def test_training_writes_its_curve_and_weights(trained: Path) -> None:
    """metrics.csv has a line an epoch with every part, after that of the start; model.pt is a bare state dict; two
    checkpoints are kept."""
    curve = pd.read_csv(trained / "metrics.csv", index_col="epoch")
    assert curve.index.tolist() == [0, 1, 2, 3, 4]
    validation = ["val_psnr_brain", "val_psnr", "val_l1"]
    assert np.isfinite(curve[validation].to_numpy()).all()
    assert np.isfinite(curve.loc[1:, ["learning_rate", "loss", *TERMS, "gradient_norm"]].to_numpy()).all()
    assert curve["lpips"].notna().tolist() == [False, False, False, True, True]  # perceptual_start is 0.5
    assert all(torch.is_tensor(v) for v in torch.load(trained / "model.pt", weights_only=True).values())
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["epoch_0003.pt", "epoch_0004.pt"]
    assert list((trained / "tensorboard").glob("events*"))


def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(
    run_bundle: Run, bids: Path, trained: Path, tmp_path: Path
) -> None:
    """Two epochs, then the other two by --resume True, with augmentation and a cache on disk."""
    cache = ["--cache_dir", str(tmp_path / "cache")]
    train(run_bundle, bids, tmp_path / "run", 4, *cache, "--train#trainer#max_epochs", "2")
    train(run_bundle, bids, tmp_path / "run", 4, *cache, "--resume", "true")
    for name in RESUMED_FILES:
        whole, resumed = (torch.load(folder / name, weights_only=True) for folder in (trained, tmp_path / "run"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    whole, resumed = (pd.read_csv(folder / "metrics.csv") for folder in (trained, tmp_path / "run"))
    pd.testing.assert_frame_equal(whole, resumed)


def test_a_used_folder_is_not_overwritten(run_bundle: Run, bids: Path, trained: Path) -> None:
    """Without --resume, a folder that holds a run is refused with exit code 2 and one line."""
    done = run_bundle(
        "--config_file", "configs/train.json", "--dataset_dir", str(bids), "--output_dir", str(trained),
        *TINY_TRAINING, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--resume True" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overlays", "more"),
    [
        (("lite",), THREE_LEVELS),
        (("maisi",), [*THREE_LEVELS, "--attention_levels", "[False, False, True]", "--nonlocal_attention", "True"]),
        (("finetune",), ["--balanced", "True", "--label", "group"]),
        ((), ["--amp", "True", "--clip_norm", "1", "--num_workers", "2", "--perceptual_weight", "0.1"]),
        ((), ["--crop_size", "0", "--channels_last", "False", "--augment", "False"]),
        ((), ["--crop_size", "16", "--crops_per_scan", "2", "--perceptual_weight", "0"]),
    ],
    ids=["lite", "maisi", "finetune-balanced", "bf16", "whole", "crops"],
)
def test_overlays_and_switches_train(
    overlays: tuple[str, ...], more: list[str], run_bundle: Run, bids: Path, trained: Path, tmp_path: Path
) -> None:
    """One epoch with each overlay and switch ends with finite losses and a model."""
    if overlays == ("finetune",):
        more = [*more, "--weights", str(trained / "model.pt")]
    train(run_bundle, bids, tmp_path, 1, *more, overlays=overlays)
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


def test_the_older_way_to_start_works(run_bundle: Run, bids: Path, tmp_path: Path) -> None:
    """`run training` is `run`."""
    run_bundle(
        "training", "--config_file", "configs/train.json", "--dataset_dir", str(bids), "--output_dir", str(tmp_path),
        "--epochs", "1", *TINY_TRAINING,
    )  # fmt: skip
    assert (tmp_path / "model_final.pt").is_file()


def test_evaluation_gives_every_figure(run_bundle: Run, bids: Path, trained: Path, tmp_path: Path) -> None:
    """Two validation scans, five systems, every column of the protocol, and a table that says what it is."""
    done = run_bundle(
        "--config_file", "configs/evaluate.json", "--dataset_dir", str(bids), "--output_dir", str(tmp_path),
        "--weights", str(trained / "model.pt"), "--device", "cpu", *TINY_NETWORK,
    )  # fmt: skip
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert set(table["system"]) == {"model", "identity", "trilinear", "dct", "patch_pca"}
    assert len(table) == 10
    columns = ["l1", "psnr", "psnr_brain", "ssim", "lpips", "kl"]
    assert np.isfinite(table.loc[table["system"] == "model", columns].to_numpy()).all()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["n"] == 2 and summary["split"] == "val"
    assert "active_units" in summary["systems"]["model"]
    assert summary["weights_sha256"] in done.stdout
    assert "worst volume" in done.stdout


def test_inference_gives_the_scan_back_in_its_own_grid(run_bundle: Run, trained: Path, tmp_path: Path) -> None:
    """Same shape, affine and units, float32, intensities of the scan's order; a picture; model space by choice."""
    scan = write_scan(tmp_path / "in" / "a scan.v1.2.nii.gz", seed=3)
    run_bundle(
        "--config_file", "configs/inference.json", "--dataset_dir", str(scan), "--output_dir", str(tmp_path / "out"),
        "--weights", str(trained / "model.pt"), "--save_model_space", "True", "--device", "cpu", *TINY_NETWORK,
    )  # fmt: skip
    (recon_path,) = (tmp_path / "out").glob("*_recon.nii.gz".replace("*", "*v1.2"))
    source, recon = nib.load(scan), nib.load(recon_path)
    assert recon.shape == source.shape
    np.testing.assert_allclose(recon.affine, source.affine, atol=1e-6)
    assert recon.get_data_dtype() == np.float32
    assert recon.header.get_xyzt_units() == source.header.get_xyzt_units()
    assert int(recon.header["sform_code"]) == int(recon.header["qform_code"]) == 1
    assert recon.get_fdata().max() > 100
    names = {path.name.split("v1.2")[1] for path in (tmp_path / "out").glob("*v1.2*")}
    assert names == {"_recon.nii.gz", "_recon.png", "_model_space.nii.gz", "_model_space_recon.nii.gz"}


@pytest.mark.parametrize("job", JOBS)
def test_a_config_parses_with_json_alone(job: str) -> None:
    """No YAML, no comments, no key twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        keys = [key for key, _ in pairs]
        assert len(keys) == len(set(keys)), keys
        return dict(pairs)

    json.loads((ROOT / "configs" / f"{job}.json").read_text(), object_pairs_hook=unique)


def test_metadata_versions_are_the_pins() -> None:
    """metadata.json and requirements.txt say the same versions."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    metadata = ConfigParser.load_config_file(ROOT / "configs" / "metadata.json")
    versions = {
        "torch": metadata["pytorch_version"],
        "monai": metadata["monai_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    assert versions == pins
    assert metadata["version"] in metadata["changelog"]


def test_a_single_scan_can_be_evaluated(run_bundle: Run, trained: Path, tmp_path: Path) -> None:
    """`--dataset_dir scan.nii.gz --output_dir out` is enough; what has to be fitted is fitted on it or left out."""
    scan = write_scan(tmp_path / "scan.nii.gz", seed=5)
    run_bundle(
        "--config_file", "configs/evaluate.json", "--dataset_dir", str(scan), "--output_dir", str(tmp_path / "out"),
        "--weights", str(trained / "model.pt"), "--device", "cpu", *TINY_NETWORK,
    )  # fmt: skip
    assert {"model", "identity", "trilinear", "dct"} <= set(pd.read_csv(tmp_path / "out" / "metrics.csv")["system"])


def test_files_are_small_enough_for_the_zoo() -> None:
    """25 MB a file, of those that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert files and all(file.stat().st_size <= 25e6 for file in files if file.is_file())
