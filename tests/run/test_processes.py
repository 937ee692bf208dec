"""Training and evaluation in two processes on the CPU (gloo), against one.

Started by torchrun, this file is what each of two processes checks about gradients and collected figures.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from time import sleep

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_JOB, contents, write_scan
from ignite import distributed as idist
from monai.bundle import ConfigParser
from torch.nn.parallel import DistributedDataParallel

from scripts.run import (
    InputError,
    data_parallel,
    gathered,
    joined_shares,
    mean_over_ranks,
    share_for_each,
    share_of_rank,
    stop_processes,
)
from scripts.training import MuonAdamW

Run = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
TWO = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
BUNDLE = ["-m", "monai.bundle", "run", "--config_file"]
TRAIN = "['configs/train.json','configs/multi_gpu_train.json']"
EVALUATE = "['configs/evaluate.json','configs/multi_gpu_evaluate.json']"
EPOCHS = 3


def by_two(*words: str) -> str:
    """Run a Python command in two processes, in the bundle's folder, which must end well; what it prints."""
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([*TWO, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def cohort(bids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training scans, two controls and four patients, and three to validate: no even share for two processes."""
    folder = tmp_path_factory.mktemp("uneven")
    scans = [*sorted(bids.glob("sub-*/anat/*.nii.gz")), write_scan(folder / "sub-09_T1w.nii.gz", 8)]
    rows = [
        {"image": str(scan), "subject": f"sub-{index + 1:02d}", "group": "patient" if index % 3 else "control",
         "split": "val" if index > 5 else "train"}
        for index, scan in enumerate(scans)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


def training(cohort: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a training in several processes, behind those of its configs."""
    return [
        "--dataset_dir", str(cohort), "--output_dir", str(output), "--epochs", str(EPOCHS), "--label", "group",
        "--balanced", "True", "--batch_size", "2", "--val_interval", "1", "--perceptual_weight", "0", *TINY_JOB, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained_by_two(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Three epochs in two processes, with augmentation and balanced batches; the folder, and what was printed."""
    output = tmp_path_factory.mktemp("two") / "train"
    return output, by_two(*BUNDLE, TRAIN, *training(cohort, output))


def test_gradients_and_figures(cohort: Path, tmp_path: Path) -> None:
    """`check_in_each_process`, below, in two of them."""
    by_two(str(Path(__file__)), str(cohort), str(tmp_path))


def test_training_leaves_one_set_of_files(trained_by_two: tuple[Path, str]) -> None:
    """One table, one event file, one line an epoch; state dicts without a prefix."""
    output, printed = trained_by_two
    table = pd.read_csv(output / "metrics.csv")
    assert table["epoch"].tolist() == [0, 1, 2, 3] and table[1:].notna().all().all()
    assert printed.count("epoch 1  ") == len(list((output / "tensorboard").iterdir())) == 1
    content = torch.load(output / "checkpoints" / f"epoch_{EPOCHS:04d}.pt", weights_only=True)
    assert (content["processes"], content["epoch_length"]) == (2, 2)
    assert not any(name.startswith("module.") for name in content["objects"]["network"])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    trained_by_two: tuple[Path, str], cohort: Path, tmp_path: Path
) -> None:
    """Two processes that were killed in the third epoch, to the byte: checkpoints, weights and table."""
    whole, output = trained_by_two[0], tmp_path / "train"
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns(f"epoch_{EPOCHS:04d}.pt", "*.html", "model_final.pt"))
    printed = by_two(*BUNDLE, TRAIN, *training(cohort, output, "--resume", "True"))
    assert printed.count("going on after epoch 2") == 1
    ours, theirs = contents(output), contents(whole)
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} <= {"report.html"}  # has the command


def test_two_processes_evaluate_as_one(cohort: Path, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Six scans: the same tables, byte by byte, and the same figures."""
    common = ["--weights", str(weights), "--split", "train", "--baselines", "[]", "--label", "group", *TINY_JOB]
    common = ["--dataset_dir", str(cohort), *common]
    one, two = tmp_path / "one", tmp_path / "two"
    run_bundle("--config_file", "configs/evaluate.json", "--output_dir", str(one), *common)
    assert by_two(*BUNDLE, EVALUATE, "--output_dir", str(two), *common).count("written to") == 1
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("metrics.csv", "paired.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["systems"] == summaries[1]["systems"]


def check_in_each_process(cohort: str, output: str) -> None:
    """Objects of the overlaid train.json, as this process of two has them."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")])
    settings = {
        "dataset_dir": cohort, "output_dir": output, "device": "cpu", "spatial_size": [32, 36, 32], "spacing": 4.0,
        "network_def#channels": [4, 8], "perceptual_weight": 0, "augment": False,
        "label": "group", "balanced": True, "batch_size": 2, "amp": False,
        "recon_weight": 0, "mse_weight": 1, "equivariance_weight": 0,
    }  # fmt: skip
    for key, value in settings.items():
        parser[key] = value
    parser.get_parsed_content("initialize")
    assert idist.get_world_size() == 2
    _check_gradients(parser)
    assert (parser.get_parsed_content("writer") is None) == (idist.get_rank() == 1)
    for n in (2, 5, 6):
        assert joined_shares(share_of_rank(range(n))) == list(range(n))
    assert mean_over_ranks({"a": float(idist.get_rank()), "b": 3.0}) == {"a": 0.5, "b": 3.0}
    with pytest.raises(InputError, match="2 processes cannot share 1 scans"):
        share_for_each([0])
    network = data_parallel(torch.nn.Linear(1, 1), "cpu")
    network(torch.ones(1, 1)).backward()
    if idist.get_rank() > 0:
        sleep(1)
    torch.distributed.all_reduce(torch.ones(1), async_op=True)  # still under way, which does not keep a process
    stop_processes()


def _check_gradients(parser: ConfigParser) -> None:
    """One scan in each process is a batch of two in one; optimizers then go on alike in both."""
    plain, loss = parser.get_parsed_content("network_def"), parser.get_parsed_content("loss")
    plain.sampling = lambda mu, sigma: mu + 0.3 * sigma  # in place of a drawn number
    together = deepcopy(plain)
    network = parser.get_parsed_content("network")
    assert isinstance(network, DistributedDataParallel) and not network.find_unused_parameters
    images = torch.rand(2, 1, 32, 36, 32, generator=torch.Generator().manual_seed(0))
    own = images[idist.get_rank()][None]
    loss(network(own), own).backward()
    loss(together.to(memory_format=torch.channels_last_3d)(images), images).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in together.parameters())
    for (name, ours), theirs in zip(plain.named_parameters(), together.parameters(), strict=True):
        # Sums of fp32 in another order; a bias before a norm of one channel a group has a gradient of rounding alone.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * largest, msg=name)
    optimizer = MuonAdamW(network)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        loss(network(own), own).backward()
    first, second = gathered([parameter.detach() for parameter in plain.parameters()])
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, [parameter.detach() for parameter in together.parameters()]))


if __name__ == "__main__":
    check_in_each_process(*sys.argv[1:])
