"""MONAI Label serves the bundle: what its contract asks of the files, and a server that reconstructs and trains.

The slow tests need the environment that `docs/monai_label/setup.sh` makes; its folder goes into MONAI_LABEL_ENV.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
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
# Options of Label's own: its "" runs every block, and its loader moves what multi_gpu_train.json changes by position.
LABEL_OPTIONS = {"run_id": "run", "multi_gpu": False}
ENVIRONMENT = os.environ.get("MONAI_LABEL_ENV", "")
SCANS = ["sub-01_T1w", "sub-02_T1w"]


def config(job: str) -> dict[str, Any]:
    """A config as it stands in the file."""
    return json.loads((ROOT / "configs" / f"{job}.json").read_text())


@pytest.mark.parametrize("job", JOBS)
def test_what_label_shows_are_keys_of_the_config(job: str) -> None:
    """Each entry takes its default from the key of that name, so that the command line still decides. Label replaces
    the block `displayable_configs` alone: who reads the key itself would not see the change. It sends plain values."""
    content = config(job)
    shown = {key: value for key, value in content.pop("displayable_configs").items() if key not in LABEL_OPTIONS}
    assert shown == {key: f"@{key}" for key in shown} and shown.keys() <= content.keys()
    text = json.dumps(content)
    for key in shown:
        assert re.search(rf"@displayable_configs#{key}\b", text) and not re.search(rf"@{key}\b", text)
    values = ConfigParser(config(job)).get_parsed_content("displayable_configs").values()
    assert all(isinstance(value, (bool, int, float, str)) for value in values)


def test_the_configs_have_what_label_reads_and_overrides() -> None:
    """Keys of inference, `image` as the first input and `pred` as the first output; keys of training, of which each
    exists already, because an override of a key that nothing reads would be lost. Label's own default for the run, "",
    would run `training` after `run`. It puts its loader before the handlers: they are a list of mappings, and no
    reference counts on their positions."""
    assert config("inference").keys() >= INFERENCE_KEYS
    data_format = config("metadata")["network_data_format"]
    assert next(iter(data_format["inputs"])) == "image" and next(iter(data_format["outputs"])) == "pred"
    content = config("train")
    assert [key for key in TRAINING_KEYS if key not in ConfigParser(config("train"))] == []
    assert {key: content["displayable_configs"][key] for key in LABEL_OPTIONS} == LABEL_OPTIONS
    handlers = content["train"]["handlers"]
    assert isinstance(handlers, list) and all(isinstance(handler, dict) for handler in handlers)
    assert "@train#handlers#" not in json.dumps(content)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle with a tiny network, so that a scan takes seconds."""
    folder = tmp_path_factory.mktemp("bundle") / "brain_t1_vae"
    for name in ("configs", "scripts", "docs/monai_label"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "models").mkdir()
    for name in ("requirements.txt", "models/lpips_alex.safetensors"):
        shutil.copy(ROOT / name, folder / name)
    make_weights(folder / "models" / "model.pt", 0)
    for job in JOBS:
        content = config(job) | {"spatial_size": [32, 36, 32], "spacing": 4.0}
        content["network_def"] |= {"channels": [4, 8]}
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
    if not (Path(ENVIRONMENT) / "bin" / "monailabel").is_file():
        pytest.skip("MONAI_LABEL_ENV names no environment with MONAI Label; make one with docs/monai_label/setup.sh")
    folder = tmp_path_factory.mktemp("label")
    setup = ["bash", str(bundle / "docs" / "monai_label" / "setup.sh"), ENVIRONMENT, str(folder / "apps")]
    done = subprocess.run(setup, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = done.stdout.splitlines()[-1].replace("STUDIES", str(studies)).split()
    words[words.index("--port") + 1], address = str(port), f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(words, env=environment(), cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: requests.get(f"{address}/info/", timeout=30).ok, 180, folder / "server.log")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def wait_for(ready: Callable[[], bool], seconds: float, log: Path | None = None) -> None:
    """Ask again until it is ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(requests.ConnectionError):
            if ready():
                return
        time.sleep(1)
    raise AssertionError(log.read_text() if log else "took too long")


def reconstruct(address: str, path: Path, query: str = "", **more: Any) -> nib.Nifti1Image:
    """Ask for a reconstruction and keep it."""
    data = {"params": json.dumps({"device": "cpu", **more.pop("params", {})})}
    answer = requests.post(f"{address}/infer/brain_t1_vae?output=image{query}", data=data, timeout=300, **more)
    assert answer.ok, answer.text
    path.write_bytes(answer.content)
    return nib.load(path)


@pytest.mark.slow
def test_a_reconstruction_is_that_of_bundle_run(server: str, bundle: Path, studies: Path, tmp_path: Path) -> None:
    """A scan of the datastore and the same one sent along, bit for bit; a user's amp reaches the inferer."""
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
    amp = reconstruct(server, tmp_path / "amp.nii.gz", f"&image={SCANS[0]}", params={"amp": True}).get_fdata()
    assert np.isfinite(amp).all() and not np.array_equal(amp, expected.get_fdata())


@pytest.mark.slow
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
    assert pd.read_csv(output / "metrics.csv")["learning_rate"].dropna().tolist() == [0.0]
    before, after = (torch.load(path, weights_only=True) for path in (bundle / "models/model.pt", output / "model.pt"))
    # The EMA adds a weight to itself in two parts: equal to a rounding of fp32.
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)
