"""A job that is killed, stopped or starved leaves whole files, says one sentence, and ends well when it is run again.

tests/fault_injection.py brings the faults about. Fast are a few moments of each job, slow the twenty of the docs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, interruptible
from fault_injection import (
    JOBS,
    N_INTERRUPTS,
    N_KILLS,
    N_SIZES,
    Bench,
    Fault,
    Outcome,
    at_a_moment,
    contents,
    may_mount,
    on_a_full_disk,
    on_a_read_only_disk,
    seeded_parts,
    two_at_once,
    with_a_dead_worker,
    with_a_scan_gone,
)
from monai.data import Dataset, ThreadDataLoader

from scripts.cohort import AheadLoader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at as Linux does")

FAST_KILLS = (6, 16)  # before a change of a file, and at a time
MOUNTS = pytest.mark.skipif(not may_mount(), reason="a small file system cannot be mounted by this user")


def numbers(n: int, *fast: int) -> list:
    """Numbers of moments, of which some are fast tests."""
    return [number if number in fast else pytest.param(number, marks=pytest.mark.slow) for number in range(n)]


FAST_JOBS = ["train", "encode", *(pytest.param(job, marks=pytest.mark.slow) for job in JOBS[2:])]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Cohort, weights, and a run of each job that nobody disturbs."""
    return Bench(tmp_path_factory.mktemp("faults"))


def assert_mended(outcome: Outcome) -> None:
    """Whole files or none under final names; the command given again leaves what an undisturbed run does."""
    assert not outcome.half
    assert outcome.again.code == 0, outcome.again.text
    assert not outcome.still_left
    assert not outcome.differing


def assert_told(outcome: Outcome, code: int, *words: str) -> None:
    """One sentence, no traceback, and the exit code."""
    assert outcome.ended.code == code, outcome.ended.text
    assert outcome.ended.told, outcome.ended.text
    assert all(word in outcome.ended.text for word in words), outcome.ended.text


@pytest.mark.parametrize("number", numbers(N_KILLS, *FAST_KILLS))
@pytest.mark.parametrize("job", JOBS)
def test_a_kill(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """SIGKILL before a change of a file, at times with half of it written, or at a time."""
    fault = bench.moments(job, signal.SIGKILL, N_KILLS, "SIGKILL")[number]
    outcome = at_a_moment(bench, job, fault, tmp_path / "out")
    if fault.change >= 0:
        assert outcome.ended.code == -signal.SIGKILL
    assert_mended(outcome)


def test_a_kill_between_the_last_checkpoint_and_the_final_model(bench: Bench, tmp_path: Path) -> None:
    """Nothing is left to train, but a file to write."""
    changes = [path for _, path, _ in bench.whole("train").changes]
    first = next(number for number, path in enumerate(changes) if "model_final" in path)
    outcome = at_a_moment(bench, "train", Fault("signal", signal.SIGKILL, first), tmp_path / "out")
    assert (tmp_path / "out" / "model_final.pt").exists()
    assert_mended(outcome)


@pytest.mark.parametrize("number", numbers(N_INTERRUPTS, 1))
@pytest.mark.parametrize(("name", "signal_number"), [("Ctrl-C", signal.SIGINT), ("SIGTERM", signal.SIGTERM)])
@pytest.mark.parametrize("job", ["train", *(pytest.param(job, marks=pytest.mark.slow) for job in JOBS[1:])])
def test_an_interruption(job: str, name: str, signal_number: int, number: int, bench: Bench, tmp_path: Path) -> None:
    """Exit codes as shells give them; a training says how to go on."""
    fault = bench.moments(job, signal_number, N_INTERRUPTS, name)[number]
    outcome = at_a_moment(bench, job, fault, tmp_path / "out")
    assert_mended(outcome)
    if outcome.ended.code not in (0, -signal.SIGTERM, -signal.SIGINT, 1):  # over already, or before the job's own code
        assert_told(outcome, 128 + signal_number, "interrupted: ")
    if fault.change >= 0:
        assert outcome.ended.code == 128 + signal_number


def test_an_interrupted_training_says_how_to_go_on(bench: Bench, tmp_path: Path) -> None:
    """The last whole epoch, and the key."""
    changes = [path for _, path, _ in bench.whole("train").changes]
    second = next(number for number, path in enumerate(changes) if path.endswith("epoch_0001.pt")) + 5
    outcome = at_a_moment(bench, "train", Fault("signal", signal.SIGINT, second), tmp_path / "out")
    assert_told(outcome, 130, "interrupted: add --resume True to the same command to go on after epoch 1.")
    assert_mended(outcome)


@MOUNTS
@pytest.mark.parametrize("number", numbers(N_SIZES, 1))
@pytest.mark.parametrize("job", FAST_JOBS)
def test_a_full_disk(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """A part of what the job writes fits; what was written stays, and with more space the job goes on."""
    outcome = on_a_full_disk(bench, job, seeded_parts(job, N_SIZES)[number], tmp_path / "out")
    assert_told(outcome, 2, "no space is left", "free some, then run again")
    assert_mended(outcome)


@MOUNTS
@pytest.mark.parametrize("job", FAST_JOBS)
def test_a_read_only_folder(job: str, bench: Bench, tmp_path: Path) -> None:
    """Before any scan is looked at."""
    outcome = on_a_read_only_disk(bench, job, tmp_path / "out")
    assert_told(outcome, 2, f"{tmp_path / 'out'} cannot be written to (Read-only file system); choose another folder.")
    assert "pre-flight check" not in outcome.ended.text
    assert_mended(outcome)


@pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("job", FAST_JOBS)
def test_a_scan_that_goes_after_the_check(job: str, n_workers: int, bench: Bench, tmp_path: Path) -> None:
    """No result without it: an error with its name, also from a worker process; what is written stays."""
    outcome = with_a_scan_gone(bench, job, n_workers, tmp_path / "out")
    assert_told(outcome, 2, "sub-04_T1w.nii.gz can no longer be read; put it back as it was, then run again.")
    assert_mended(outcome)


@pytest.mark.parametrize("job", FAST_JOBS)
def test_a_worker_process_that_is_killed(job: str, bench: Bench, tmp_path: Path) -> None:
    """As the system does when memory is short: an error, and no wait without end."""
    outcome = with_a_dead_worker(bench, job, tmp_path / "out")
    assert_told(outcome, 2, "a process that loads scans has ended", "lower num_workers")
    assert_mended(outcome)


@pytest.mark.parametrize("job", FAST_JOBS)
def test_a_second_run_into_the_folder(job: str, bench: Bench, tmp_path: Path) -> None:
    """Refused, but for encoding, where both write the same; the first's death frees the folder."""
    outcome = two_at_once(bench, job, tmp_path / "out")
    if job == "encode":
        assert outcome.ended.code == 0, outcome.ended.text
    else:
        assert_told(outcome, 2, f"another run is writing to {tmp_path / 'out'}; wait")
    assert_mended(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_command_itself(job: str, bench: Bench, tmp_path: Path) -> None:
    """As a user types it, without the harness: killed once the check has passed, then Ctrl-C, then left alone."""
    output = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", *bench.arguments(job, output)]
    for number in (signal.SIGKILL, signal.SIGINT):
        (output / "preflight.json").unlink(missing_ok=True)
        more = ["--resume", "True"] if job == "train" and number == signal.SIGINT else []
        process = subprocess.Popen(
            [*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
        )
        while not (output / "preflight.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else -number), errors
        assert "Traceback" not in errors
        assert not bench.half_written(job, output)
    again = ["--resume", "True"] if job == "train" else []
    done = subprocess.run([*command, *again], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not bench.differing(job, output)


class Failing:
    """A transform that fails at one item."""

    def __call__(self, item: int) -> int:
        """The item."""
        if item == 2:
            raise RuntimeError("the third")
        return item


def test_a_loader_that_loads_ahead_passes_errors_on() -> None:
    """MONAI's own ends as if there were no more, which would leave a folder of latents short of scans."""
    data = Dataset([0, 1, 2, 3], Failing())
    found = []
    with pytest.raises(RuntimeError, match="applying transform"):
        for batch in AheadLoader(data, batch_size=1, buffer_size=2):
            found += batch.tolist()
    assert found == [0, 1]
    assert torch.cat(list(AheadLoader(Dataset([0, 1, 3], Failing()), batch_size=1, buffer_size=2))).tolist() == [
        0,
        1,
        3,
    ]
    assert issubclass(AheadLoader, ThreadDataLoader)


def test_the_harness_finds_half_a_file(bench: Bench, tmp_path: Path) -> None:
    """And a missing one, and one too many."""
    output = tmp_path / "out"
    assert bench.run("encode", output).code == 0
    assert not bench.half_written("encode", output) and not bench.differing("encode", output)
    manifest = output / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    (output / "report.html").unlink()
    (output / "new.txt").touch()
    assert bench.half_written("encode", output) == ["manifest.jsonl", "new.txt"]
    assert bench.differing("encode", output) == ["manifest.jsonl", "new.txt", "report.html"]
    assert "report.html" not in contents(output)
