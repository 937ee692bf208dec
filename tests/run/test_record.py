"""`run.json` beside every output, the command it shows, and its law: the same run gives the same bytes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import Job, contents
from ignite.engine import Engine

from scripts.run import RunRecord, bundle_version, command_line, config_sha256, file_sha256

SAME = ["--config_file", "configs/encode.json", "--output_dir", "out"]
OTHERS = [
    [*SAME, "--amp", "True"],
    ["--config_file", "['configs/encode.json','configs/native.json']", "--output_dir", "out"],
    ["--config_file", "configs/decode.json", "--output_dir", "out"],
]
NAME = "Krautwurst"
COMMANDS = {
    "file": (["--dataset_dir", "{}/scan.nii.gz"], "--dataset_dir scan.nii.gz"),
    "folder": (["--dataset_dir", "{}"], '--dataset_dir "<folder>"'),
    "folder without a slash": (["--dataset_dir", NAME], '--dataset_dir "<folder>"'),
    "folder with =": (["--dataset_dir={}"], '"--dataset_dir=<folder>"'),
    "list": (["--dataset_dir", "['{}','{}/a.csv']"], "--dataset_dir \"['<folder>', 'a.csv']\""),
    "dict": (["--peers", "{'first':'{}/model.pt'}"], "--peers \"{'first': 'model.pt'}\""),
    "expression": (["--output_dir", "$'{}' + '/out'"], "--output_dir $..."),
    "the bundle's own": (["--weights", "models/model.pt"], "--weights models/model.pt"),
}


def test_the_same_run_gives_the_same_bytes(
    encoded: Path, start_job: Callable[..., Job], bids: Path, weights: Path
) -> None:
    """Twice in processes of their own: every file but those with times. (Other jobs: tests/test_faults.py.)"""
    again = start_job("encode", "--dataset_dir", str(bids), "--weights", str(weights), "--label", "group")
    assert contents(again.folder) == contents(encoded) and "report.html" in contents(encoded)


def record(folder: Path) -> dict[str, object]:
    """What stands in its run.json."""
    return json.loads((folder / "run.json").read_text())


def test_a_record_tells_how_its_outputs_were_made(encoded: Path, weights: Path) -> None:
    """Command, configuration, weights, versions, machine and times of an encoding."""
    found = record(encoded)
    assert str(found["command"]).startswith("python -m monai.bundle run --config_file configs/encode.json")
    assert len(str(found["config_sha256"])) == 64 and found["weights_sha256"] == file_sha256(weights)
    assert found["bundle_version"] == bundle_version() and found["packages"]["torch"] == metadata.version("torch")
    assert str(found["device"]).startswith("cpu, ") and found["threads"] == 1
    assert str(found["started"]) <= str(found["finished"])


def run_engine(record: RunRecord, fails: bool = False) -> None:
    """Run an engine that does nothing, or fails at it."""

    def step(engine: Engine, batch: int) -> None:
        assert not fails

    engine = Engine(step)
    engine.state.rank, engine.state.device = 0, torch.device("cpu")
    record.attach(engine)
    engine.run([0])


def test_a_run_that_goes_on_keeps_what_the_earlier_ones_said(tmp_path: Path) -> None:
    """The oldest first, flat; one that failed is not finished."""
    (tmp_path / "run.json").write_text('{"earlier": 3}')  # damage is no reason to stop a job
    with pytest.raises(AssertionError):
        run_engine(RunRecord(str(tmp_path), seed=1), fails=True)
    assert record(tmp_path)["finished"] is None
    for seed in (2, 3):
        run_engine(RunRecord(str(tmp_path), seed=seed))
    last = record(tmp_path)
    assert [run["seed"] for run in (*last["earlier"], last)] == [1, 2, 3]
    assert not any("earlier" in run for run in last["earlier"])


def test_a_configuration_has_its_hash(tmp_path: Path) -> None:
    """Of keys, configs, and the content of the user's own file, whatever its name; not of folders."""

    def own(name: str, epochs: int) -> list[str]:
        (tmp_path / name).write_text(json.dumps({"epochs": epochs}))
        return ["--config_file", str(["configs/train.json", str(tmp_path / name)])]

    def hashes(*runs: list[str]) -> set[str]:
        return {config_sha256(["monai", "run", *run]) for run in runs}

    assert len(hashes(SAME, *OTHERS, own("a.json", 1), own("b.json", 2)) | {""}) == len(OTHERS) + 4
    assert len(hashes(own("a.json", 1), own("c.json", 1))) == 1
    there = [*SAME[:-1], str(tmp_path), "--weights", str(tmp_path / "model.pt")]
    assert len(hashes([*SAME, "--weights", "model.pt"], there)) == 1


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_shows_no_folder(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and tables show the command; folders are named after people, with a comma at times."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / f"{NAME},Otto"
    folder.mkdir()
    (tmp_path / NAME).mkdir()
    given, expected = COMMANDS[case]
    monkeypatch.setattr(sys, "argv", ["python", "run", *(word.replace("{}", str(folder)) for word in given)])
    assert command_line() == f"python -m monai.bundle run {expected}"
