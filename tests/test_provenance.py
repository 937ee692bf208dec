"""`run.json` beside every output, and the law that it stands for: the same run gives the same bytes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import TINY_JOB, contents
from ignite.engine import Engine

from scripts.run import RunRecord, bundle_version, config_sha256, file_sha256

Run = Callable[..., subprocess.CompletedProcess[str]]
SEED = 7
MORE = {
    "train": ["--epochs", "2", "--seed", str(SEED)],
    "encode": [],
    "decode": [],
    "sample": ["--prior", "gaussian", "--n_samples", "2", "--seed", str(SEED)],
    "evaluate": ["--split", "all", "--baselines", "['patch_pca']"],
    "inference": ["--save_model_space", "True"],
}
LEFT = {
    "train": {"model.pt", "model_final.pt", "metrics.csv", "report.html", "checkpoints/epoch_0002.pt"},
    "encode": {"manifest.jsonl", "latent_stats.json"},
    "decode": {"report.html"},
    "sample": {"report.html", "samples.png"},
    "evaluate": {"metrics.csv", "summary.json", "table.txt", "report.html"},
    "inference": {"summary.csv", "report.html"},
}
SAME = ["--config_file", "configs/encode.json", "--output_dir", "out"]
OTHERS = {
    "a key": [*SAME, "--amp", "True"],
    "an overlay": ["--config_file", "['configs/encode.json','configs/native.json']", "--output_dir", "out"],
    "another config": ["--config_file", "configs/decode.json", "--output_dir", "out"],
}


def arguments(job: str, source: Path, output: Path, weights: Path) -> list[str]:
    """Of a run with the tiny network."""
    given = ["--config_file", f"configs/{job}.json", "--dataset_dir", str(source), "--output_dir", str(output)]
    return [*given, *([] if job == "train" else ["--weights", str(weights)]), *MORE[job], *TINY_JOB]


@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=pytest.mark.slow) if job in ("decode", "sample") else job for job in MORE]
)
def test_the_same_run_gives_the_same_bytes(
    job: str, bids: Path, encoded: Path, weights: Path, run_bundle: Run, tmp_path: Path
) -> None:
    """Twice in processes of their own: every file but those with times, and the record tells how."""
    source = encoded if job in ("decode", "sample") else bids
    folders = [tmp_path / name / "out" for name in "ab"]
    for folder in folders:
        run_bundle(*arguments(job, source, folder, weights))
    assert contents(folders[0]) == contents(folders[1])
    assert set(contents(folders[0])) >= LEFT[job]
    first, second = (json.loads((folder / "run.json").read_text()) for folder in folders)
    assert first["config_sha256"] == second["config_sha256"] != ""
    assert first["weights_sha256"] == ("" if job == "train" else file_sha256(weights))
    assert first["seed"] == (SEED if job in ("train", "sample") else None)
    assert first["command"].startswith("python -m monai.bundle run") and f"configs/{job}.json" in first["command"]
    assert first["packages"]["torch"] == metadata.version("torch") and first["bundle_version"] == bundle_version()
    assert first["device"].startswith("cpu, ") and first["threads"] == 1
    assert first["started"] <= first["finished"] <= second["started"]
    assert first["earlier"] == []


def record(folder: Path) -> dict[str, object]:
    """What stands in its run.json."""
    return json.loads((folder / "run.json").read_text())


def engine(fails: bool = False) -> Engine:
    """One that does nothing, or fails at it."""

    def step(engine: Engine, batch: int) -> None:
        assert not fails

    made = Engine(step)
    made.state.rank, made.state.device = 0, torch.device("cpu")
    return made


def test_a_run_that_fails_is_not_finished(tmp_path: Path) -> None:
    """Its outputs are those of a part."""
    broken = engine(fails=True)
    RunRecord(str(tmp_path)).attach(broken)
    with pytest.raises(AssertionError):
        broken.run([0])
    assert record(tmp_path)["finished"] is None


def test_a_run_that_goes_on_keeps_what_the_earlier_ones_said(tmp_path: Path) -> None:
    """The oldest first, flat."""
    for seed in (1, 2, 3):
        job = engine()
        RunRecord(str(tmp_path), seed=seed).attach(job)
        job.run([0])
    last = record(tmp_path)
    assert [run["seed"] for run in (*last["earlier"], last)] == [1, 2, 3]
    assert not any("earlier" in run for run in last["earlier"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"earlier": 3}', "[" * 100_000])
def test_a_damaged_record_is_replaced(text: str, tmp_path: Path) -> None:
    """No reason to stop a job."""
    (tmp_path / "run.json").write_text(text)
    job = engine()
    RunRecord(str(tmp_path)).attach(job)
    job.run([0])
    assert record(tmp_path)["earlier"] == []


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    """Of several that torchrun has started."""
    job = engine()
    job.state.rank = 1
    RunRecord(str(tmp_path)).attach(job)
    job.run([0])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("other", OTHERS)
def test_another_configuration_has_another_hash(other: str) -> None:
    """Whatever it is that differs."""
    assert config_sha256(["monai", "run", *SAME]) != config_sha256(["monai", "run", *OTHERS[other]])


def test_folders_do_not_change_the_hash(tmp_path: Path) -> None:
    """The same run on another machine."""
    weights = ["--weights", "model.pt"], ["--weights", str(tmp_path / "model.pt")]
    here, there = ["run", *SAME, *weights[0]], ["run", *SAME[:-1], str(tmp_path), *weights[1]]
    assert config_sha256(["monai", *here]) == config_sha256(["monai", *there])


def test_the_hash_needs_a_bundle_run() -> None:
    """Started from Python, nothing tells the configs."""
    assert config_sha256(["/usr/bin/pytest", "tests"]) == ""
