"""MONAI Label serves the bundle: what its contract asks of the files, and a server that reconstructs and trains.

The slow tests need the environment that `docs/monai_label/setup.sh` makes; its folder goes into MONAI_LABEL_ENV.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import requests
import torch
from conftest import ROOT, make_weights, write_scan
from monai.bundle import ConfigParser

JOBS = ["inference", "train"]
INFERENCE_KEYS = {"bundle_root", "device", "network_def", "preprocessing", "inferer", "postprocessing"}
# Label finds these by name and gives them its own values.
TRAINING_KEYS = [
    "bundle_root", "device", "network", "train#trainer#max_epochs", "train#dataset#data", "validate#dataset#data",
]  # fmt: skip
# Options of Label's own, with another default: its "" runs every block, and its loader moves what multi_gpu_train.json
# changes by position.
LABEL_OPTIONS = {"run_id": "run", "multi_gpu": False}
TINY = {"spatial_size": [32, 36, 32], "spacing": 4.0}
TINY_NETWORK = {"channels": [4, 8]}
ENVIRONMENT = os.environ.get("MONAI_LABEL_ENV", "")
SCANS = ["sub-01_T1w", "sub-02_T1w"]
slow = pytest.mark.slow
needs_label = pytest.mark.skipif(
    not (Path(ENVIRONMENT) / "bin" / "monailabel").is_file(),
    reason="MONAI_LABEL_ENV names no environment with MONAI Label; make one with docs/monai_label/setup.sh",
)


def config(job: str) -> dict[str, Any]:
    """A config as it stands in the file."""
    return json.loads((ROOT / "configs" / f"{job}.json").read_text())


def shown_keys(job: str) -> dict[str, Any]:
    """What Label shows of the config, less its own options."""
    return {key: value for key, value in config(job)["displayable_configs"].items() if key not in LABEL_OPTIONS}


@pytest.mark.parametrize("job", JOBS)
def test_what_label_shows_are_keys_of_the_config(job: str) -> None:
    """Each entry takes its default from the key of that name, so that the command line still decides."""
    shown = shown_keys(job)
    assert shown == {key: f"@{key}" for key in shown}
    assert shown.keys() <= config(job).keys()


@pytest.mark.parametrize("job", JOBS)
def test_what_label_shows_has_an_effect(job: str) -> None:
    """Label replaces the block `displayable_configs` alone: who reads the key itself would not see the change."""
    content = config(job)
    del content["displayable_configs"]
    text = json.dumps(content)
    for key in shown_keys(job):
        assert re.search(rf"@displayable_configs#{key}\b", text)
        assert not re.search(rf"@{key}\b", text)


@pytest.mark.parametrize("job", JOBS)
def test_what_label_shows_resolves_to_plain_values(job: str) -> None:
    """Label sends them as JSON, and its panel makes a field of each."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{job}.json")])
    shown = parser.get_parsed_content("displayable_configs")
    assert all(isinstance(value, (bool, int, float, str)) for value in shown.values())


def test_training_from_label_runs_once() -> None:
    """Label's own default for the run, "", would run every block, and `training` after `run`."""
    shown = config("train")["displayable_configs"]
    assert {key: shown[key] for key in LABEL_OPTIONS} == LABEL_OPTIONS


def test_inference_has_the_names_that_label_reads() -> None:
    """Its keys, and in metadata.json `image` as the first input and `pred` as the first output."""
    assert config("inference").keys() >= INFERENCE_KEYS
    data_format = config("metadata")["network_data_format"]
    assert next(iter(data_format["inputs"])) == "image"
    assert next(iter(data_format["outputs"])) == "pred"


def test_training_has_the_names_that_label_overrides() -> None:
    """Each exists already: an override of a key that nothing reads would be lost."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / "train.json")])
    assert [key for key in TRAINING_KEYS if key not in parser] == []


def test_label_can_put_its_loader_before_the_training_handlers() -> None:
    """They stand in the config as a list of mappings, and no reference counts on their positions."""
    content = config("train")
    handlers = content["train"]["handlers"]
    assert isinstance(handlers, list) and all(isinstance(handler, dict) for handler in handlers)
    assert "@train#handlers#" not in json.dumps(content)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with a tiny network, so that a scan takes seconds."""
    folder = tmp_path_factory.mktemp("bundle") / "brain_t1_vae"
    for name in ("configs", "scripts", "docs/monai_label"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "requirements.txt", folder)
    (folder / "models").mkdir()
    shutil.copy(ROOT / "models" / "lpips_alex.safetensors", folder / "models")
    make_weights(folder / "models" / "model.pt", 0)
    for job in JOBS:
        content = config(job) | TINY
        content["network_def"] |= TINY_NETWORK
        (folder / "configs" / f"{job}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of two tiny heads."""
    folder = tmp_path_factory.mktemp("studies")
    for seed, name in enumerate(SCANS):
        write_scan(folder / f"{name}.nii.gz", seed)
    return folder


def environment() -> dict[str, str]:
    """No path of the project's own environment, no thread more than needed."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(bundle: Path, studies: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server on loopback, with the app folder that setup.sh makes."""
    folder = tmp_path_factory.mktemp("label")
    setup = ["bash", str(bundle / "docs" / "monai_label" / "setup.sh"), ENVIRONMENT, str(folder / "apps")]
    done = subprocess.run(setup, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = done.stdout.splitlines()[-1].replace("STUDIES", str(studies)).split()
    words[words.index("--port") + 1] = str(port)
    address = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(words, env=environment(), cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: answers(address), 180, folder / "server.log")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_for(ready: Any, seconds: float, log: Path | None = None) -> None:
    """Ask again until it is ready."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, log.read_text() if log else "took too long"
        time.sleep(1)


def answers(address: str) -> bool:
    """Whether a server is there."""
    try:
        return requests.get(f"{address}/info/", timeout=30).ok
    except requests.ConnectionError:
        return False


def reconstruct(address: str, path: Path, query: str = "", **more: Any) -> nib.Nifti1Image:
    """Ask for a reconstruction and keep it."""
    params = json.dumps({"device": "cpu", **more.pop("params", {})})
    answer = requests.post(
        f"{address}/infer/brain_t1_vae?output=image{query}", data={"params": params}, timeout=300, **more
    )
    assert answer.ok, answer.text
    path.write_bytes(answer.content)
    return nib.load(path)


@slow
@needs_label
def test_a_reconstruction_is_that_of_bundle_run(server: str, bundle: Path, studies: Path, tmp_path: Path) -> None:
    """A scan of the datastore and the same one sent along, bit for bit."""
    scan = studies / f"{SCANS[0]}.nii.gz"
    command = [
        f"{ENVIRONMENT}/bin/python", "-W", "ignore", "-m", "monai.bundle", "run", "--config_file",
        "configs/inference.json", "--dataset_dir", str(scan), "--output_dir", str(tmp_path / "run"), "--device", "cpu",
        "--channels_last", "False",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=bundle, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = nib.load(tmp_path / "run" / f"{SCANS[0]}_recon.nii.gz")
    stored = reconstruct(server, tmp_path / "stored.nii.gz", f"&image={SCANS[0]}")
    with scan.open("rb") as file:
        sent = reconstruct(server, tmp_path / "sent.nii.gz", files={"file": (scan.name, file)})
    assert (expected.get_fdata() != 0).mean() > 0.5
    for recon in (stored, sent):
        assert recon.get_data_dtype() == np.float32
        np.testing.assert_array_equal(recon.affine, expected.affine)
        np.testing.assert_array_equal(recon.get_fdata(), expected.get_fdata())


@slow
@needs_label
def test_amp_changes_the_reconstruction(server: str, tmp_path: Path) -> None:
    """The value that a user gives reaches the inferer."""
    plain, amp = (
        reconstruct(server, tmp_path / f"{amp}.nii.gz", f"&image={SCANS[0]}", params={"amp": amp}).get_fdata()
        for amp in (False, True)
    )
    assert np.isfinite(amp).all() and not np.array_equal(plain, amp)


@slow
@needs_label
def test_training_goes_on_from_the_weights_of_models(server: str, bundle: Path, studies: Path) -> None:
    """One epoch on two scans with a learning rate of zero ends where it began: at models/model.pt."""
    for name in SCANS:
        with (studies / f"{name}.nii.gz").open("rb") as file:
            url = f"{server}/datastore/label?image={name}&tag=final"
            assert requests.put(url, files={"label": (f"{name}.nii.gz", file)}, timeout=60).ok
    shown = requests.get(f"{server}/info/", timeout=30).json()["trainers"]["brain_t1_vae"]["config"]
    assert shown.keys() >= config("train")["displayable_configs"].keys()
    params = {key: value[0] if isinstance(value, list) else value for key, value in shown.items()}
    params |= {"max_epochs": 1, "val_split": 0.5, "batch_size": 1, "learning_rate": 0.0, "device": "cpu"}
    assert requests.post(f"{server}/train/brain_t1_vae", json=params, timeout=60).ok
    wait_for(lambda: requests.get(f"{server}/train/", timeout=30).json()["status"] in ("DONE", "ERROR"), 300)
    state = requests.get(f"{server}/train/", timeout=30).json()
    assert state["status"] == "DONE", "\n".join(state["details"])
    output = bundle / "output" / "train"
    curve = pd.read_csv(output / "metrics.csv")
    assert len(curve) == 1 and curve["learning_rate"].tolist() == [0.0]
    before, after = (torch.load(path, weights_only=True) for path in (bundle / "models/model.pt", output / "model.pt"))
    # The EMA adds a weight to itself in two parts: equal to a rounding of fp32.
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
