"""A job that is killed, stopped or starved leaves whole files, says one sentence, and ends well when it is run again.

tests/fault_injection.py brings the faults about. Fast are a few of each kind, slow more moments and the other jobs.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from fault_injection import JOBS, Bench, Ended, Fault, may_mount, small_disk
from monai.data import Dataset

from scripts.cohort import AheadLoader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at as Linux does")

MOUNTS = pytest.mark.skipif(not may_mount(), reason="a small file system cannot be mounted by this user")
SLOW = pytest.mark.slow
ALL = pytest.mark.parametrize("job", ["train", "encode", *(pytest.param(job, marks=SLOW) for job in list(JOBS)[2:])])
KILLS = [(job, number) for job in JOBS for number in range(20)]
FAST_KILLS = [("train", 1), ("train", 8), ("encode", 5), ("evaluate", 9), ("inference", 7)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Cohort, weights, and a run of each job that nobody disturbs."""
    return Bench(tmp_path_factory.mktemp("faults"))


def assert_told(ended: Ended, code: int, *words: str) -> None:
    """One sentence, no traceback, and the exit code."""
    assert ended.code == code and ended.told and all(word in ended.text for word in words), ended.text


@pytest.mark.parametrize(
    ("job", "number"), [kill if kill in FAST_KILLS else pytest.param(*kill, marks=SLOW) for kill in KILLS]
)
def test_a_kill(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """SIGKILL before one of twenty changes of a file, at times with half of it written."""
    rng, n_changes = random.Random(job), len(bench.whole(job)[1])
    change = sorted(rng.sample(range(n_changes), min(20, n_changes)))[number % n_changes]
    ended = bench.run(job, tmp_path / "out", Fault("signal", signal.SIGKILL, change, number % 3 / 2))
    assert ended.code == -signal.SIGKILL
    bench.assert_mended(job, tmp_path / "out")


def test_a_kill_between_the_last_checkpoint_and_the_final_model(bench: Bench, tmp_path: Path) -> None:
    """Nothing is left to train, but a file to write."""
    first = next(number for number, (_, path, _) in enumerate(bench.whole("train")[1]) if "model_final" in path)
    bench.run("train", tmp_path / "out", Fault("signal", signal.SIGKILL, first))
    bench.assert_mended("train", tmp_path / "out")
    assert (tmp_path / "out" / "model_final.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("job", ["train", *(pytest.param(job, marks=SLOW) for job in list(JOBS)[1:])])
def test_an_interruption(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """Exit codes as shells give them; a training says how to go on: the last whole epoch, and the key."""
    changes = [path for _, path, _ in bench.whole(job)[1]]
    after = next((n for n, path in enumerate(changes) if path.endswith("epoch_0001.pt")), len(changes) // 2)
    ended = bench.run(job, tmp_path / "out", Fault("signal", number, after + 5 if job == "train" else after))
    remedy = "add --resume True to the same command to go on after epoch 1." if job == "train" else ""
    assert_told(ended, 128 + number, f"interrupted: {remedy}")
    bench.assert_mended(job, tmp_path / "out")


@MOUNTS
@ALL
def test_a_full_disk(job: str, bench: Bench, tmp_path: Path) -> None:
    """Half of what the job writes fits; what was written stays, and with more space the job goes on."""
    output = tmp_path / "out"
    total = sum(path.stat().st_size for path in bench.whole(job)[0].rglob("*") if path.is_file())
    with small_disk(output, total // 2) as remount:
        assert_told(bench.run(job, output), 2, "no space is left", "free some, then run again")
        remount("size=256m")
        bench.assert_mended(job, output)


@pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=SLOW)])
@ALL
def test_a_scan_that_goes_after_the_check(job: str, n_workers: int, bench: Bench, tmp_path: Path) -> None:
    """No result without it: an error with its name, also from a worker process; what is written stays."""
    scan = sorted(bench.cohort.rglob("*.nii.gz"))[-1]
    content, status = scan.read_bytes(), scan.stat()
    try:
        ended = bench.run(job, tmp_path / "out", Fault("remove", path=str(scan)), "--num_workers", str(n_workers))
    finally:
        scan.write_bytes(content)
        os.utime(scan, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_told(ended, 2, "sub-04_T1w.nii.gz can no longer be read; put it back as it was, then run again.")
    bench.assert_mended(job, tmp_path / "out")


@ALL
def test_a_worker_process_that_is_killed(job: str, bench: Bench, tmp_path: Path) -> None:
    """As the system does when memory is short: an error, and no wait without end."""
    ended = bench.run(job, tmp_path / "out", Fault("kill worker"), "--num_workers", "1")
    assert_told(ended, 2, "a process that loads scans has ended", "lower num_workers")
    bench.assert_mended(job, tmp_path / "out")


def test_the_harness_finds_half_a_file(bench: Bench, tmp_path: Path) -> None:
    """And a missing one, and one too many."""
    output = tmp_path / "out"
    assert bench.run("encode", output).code == 0
    assert not bench.half_written("encode", output) and not bench.differing("encode", output)
    manifest = output / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-5])
    (output / "report.html").unlink()
    (output / "new.txt").touch()
    assert sorted(bench.half_written("encode", output)) == ["manifest.jsonl", "new.txt"]
    assert bench.differing("encode", output) == ["manifest.jsonl", "new.txt", "report.html"]


def fail_at_two(item: int) -> int:
    """A transform that fails at one item."""
    if item == 2:
        raise RuntimeError("the third")
    return item


def test_a_loader_that_loads_ahead_passes_errors_on() -> None:
    """MONAI's own ends as if there were no more, which would leave a folder of latents short of scans."""
    found = []
    with pytest.raises(RuntimeError, match="applying transform"):
        for batch in AheadLoader(Dataset([0, 1, 2, 3], fail_at_two), batch_size=1, buffer_size=2):
            found += batch.tolist()
    assert found == [0, 1]
    assert torch.cat(list(AheadLoader(Dataset([0, 1, 3], fail_at_two), batch_size=1))).tolist() == [0, 1, 3]
