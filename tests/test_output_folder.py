"""One run in an output folder at a time, and no trace of the lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, interruptible

from scripts.run import InputError, claim_folder, share_folder

pytest.importorskip("fcntl")

Start = Callable[..., "subprocess.Popen[str]"]

HOLDS = (
    "import os, sys, time\nfrom scripts.run.output_folder import claim_folder, share_folder\n"
    "from scripts.run.errors import report_input_errors\nreport_input_errors()\n{body}(sys.argv[1])\n"
    "print('holds', flush=True)\ntime.sleep(100)\n"
)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python that takes the folder and waits."""
    started = []

    def run(folder: Path, body: str = "claim_folder", **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS.format(body=body), str(folder)], cwd=ROOT, text=True,
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=interruptible,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def holds(process: subprocess.Popen[str]) -> bool:
    """Whether it has got the folder; waits for the answer."""
    assert process.stdout is not None
    return process.stdout.readline() == "holds\n"


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("claim_folder", "claim_folder", False),
        ("claim_folder", "share_folder", False),
        ("share_folder", "claim_folder", False),
        ("share_folder", "share_folder", True),
    ],
)
def test_who_may_write_beside_whom(first: str, second: str, together: bool, start: Start, tmp_path: Path) -> None:
    """A second run is refused in one line, unless both are encodings."""
    assert holds(start(tmp_path, first))
    other = start(tmp_path, second)
    assert holds(other) == together
    if not together:
        _, errors = other.communicate()
        assert other.returncode == 2
        assert (
            errors
            == f"error: another run is writing to {tmp_path}; wait until it has ended, or give another --output_dir.\n"
        )
    assert not list(tmp_path.iterdir())


def test_a_killed_run_holds_nothing(start: Start, tmp_path: Path) -> None:
    """Also while a process lives that it has forked, as a data loader does."""
    forks = "(lambda folder: claim_folder(folder) or os.fork() or (time.sleep(6), os._exit(0)))"
    first = start(tmp_path, forks)
    assert holds(first)
    first.kill()
    first.wait()
    assert holds(start(tmp_path))


def test_the_other_processes_of_a_torchrun_take_no_lock(start: Start, tmp_path: Path) -> None:
    """They are the same run as the first."""
    assert holds(start(tmp_path, RANK="0"))
    assert holds(start(tmp_path, RANK="1"))


def test_a_process_may_take_its_folder_again(tmp_path: Path) -> None:
    """A notebook that runs a job twice; the folder may have another spelling."""
    claim_folder(str(tmp_path))
    claim_folder(f"{tmp_path}/../{tmp_path.name}")
    share_folder(str(tmp_path))


def test_a_file_system_without_locks_is_used_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network drives are."""

    def refuse(file: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    claim_folder(str(tmp_path))


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """A file stands there."""
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="out cannot be written to .*; choose another folder"):
        claim_folder(str(tmp_path / "out"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_in_one_line_and_leaves_no_empty_folder(
    number: int, code: int, start: Start, tmp_path: Path
) -> None:
    """A folder that was made and not used goes; one that was there stays."""
    for folder, stays in ((tmp_path / "new", False), (tmp_path, True)):
        process = start(folder)
        assert holds(process) and folder.is_dir()
        process.send_signal(number)
        _, errors = process.communicate()
        assert (process.returncode, errors) == (code, "interrupted: run the same command again.\n")
        assert folder.exists() == stays
