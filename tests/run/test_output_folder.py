"""One run in an output folder at a time, and no trace of the lock."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.run import InputError, claim_folder, share_folder

pytest.importorskip("fcntl")

Claim = Callable[[str], None]
Start = Callable[..., tuple[ForkProcess, str]]
REFUSED = "another run is writing to {}; wait until it has ended, or give another --output_dir."


def hold(claim: Claim, folder: Path, forks: bool, answer: Connection) -> None:
    """In a process of its own: take the folder, and stay."""
    try:
        claim(str(folder))
    except InputError as error:
        answer.send(str(error))
        return
    if forks and os.fork() == 0:
        time.sleep(6)
        os._exit(0)
    answer.send("holds")
    time.sleep(100)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that takes a folder; gives it and what it says."""
    started = []

    def run(claim: Claim, folder: Path, forks: bool = False) -> tuple[ForkProcess, str]:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=hold, args=(claim, folder, forks, theirs))
        process.start()
        started.append(process)
        assert ours.poll(60)
        return process, ours.recv()

    yield run
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("second", [claim_folder, share_folder])
@pytest.mark.parametrize("first", [claim_folder, share_folder])
def test_who_may_write_beside_whom(first: Claim, second: Claim, start: Start, tmp_path: Path) -> None:
    """A second run is refused, unless both are encodings; no file tells of it."""
    assert start(first, tmp_path)[1] == "holds"
    expected = "holds" if first is second is share_folder else REFUSED.format(tmp_path)
    assert start(second, tmp_path)[1] == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job", ["train", "evaluate", "inference", "encode", "decode", "sample"])
def test_a_job_takes_its_folder_first(job: str) -> None:
    """The first line of each config's `run`."""
    run = json.loads((ROOT / "configs" / f"{job}.json").read_text())["run"]
    assert run[0] == f"$scripts.run.{'share' if job == 'encode' else 'claim'}_folder(@output_dir)"


def test_a_killed_run_holds_nothing(start: Start, tmp_path: Path) -> None:
    """Also while a process lives that it has forked, as a data loader does."""
    process, _ = start(claim_folder, tmp_path, forks=True)
    process.kill()
    process.join()
    assert start(claim_folder, tmp_path)[1] == "holds"


def test_a_process_may_take_its_folder_again(tmp_path: Path) -> None:
    """A notebook that runs a job twice, the folder in another spelling."""
    claim_folder(str(tmp_path))
    claim_folder(f"{tmp_path}/../{tmp_path.name}")
