"""A job that is killed, stopped or starved leaves whole files, says one sentence, and ends well when it is run again.

A job runs in a process that is forked from a server which has the libraries loaded, through `python -m monai.bundle`'s
own code. The one idea: an audit hook sees every change of a file in the output folder. In a run that nobody disturbs it
notes the content that each file gets under its final name, so that anything else there is half a file; in others it
breaks the job before the n-th change.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY_JOB, contents, make_weights, write_scan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at as Linux does")

LONGEST = 300.0  # seconds; a job takes a few, on a busy machine more
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
JOBS = {
    "train": ["--epochs", "3", "--perceptual_weight", "0", "--batch_size", "1", "--label", "group"],
    "encode": ["--label", "group"],
    # without LPIPS, which keeps nothing between volumes and takes most of the time
    "evaluate": ["--perceptual", "{'_target_': 'torch.nn.MSELoss'}"],
    "inference": [],
}
MODULES = [path for path in ROOT.glob("scripts/*/*.py") if path.stem != "__init__"]
PRELOADED = [
    "test_faults", *(f"scripts.{path.parent.name}.{path.stem}" for path in MODULES),
    "monai.bundle.scripts", "fire", "torch.utils.tensorboard", "monai.engines", "monai.handlers",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a job, once: a signal before a change, a scan that goes after the check, or a worker's death."""

    number: int = 0  # of the signal; 0 for none
    change: int = -1  # the signal comes before the n-th change of a file in the output folder
    share: float = 1.0  # how much of a file that is about to get its final name is left by a SIGKILL
    scan: str = ""  # the file that is removed as soon as the pre-flight check is done
    worker: bool = False  # whether the first process that the job starts is killed


class Bench:
    """In a folder: a cohort, weights, and each job's run that nobody disturbs, its folder and the changes it made."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cohort = folder, folder / "cohort"
        self.wholes: dict[str, tuple[Path, list[list[str]]]] = {}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.weights = make_weights(folder / "model.pt", 0)
        lines = ["participant_id\tgroup\tsplit"]
        for number in range(4):
            subject = f"sub-{number + 1:02d}"
            write_scan(self.cohort / subject / "anat" / f"{subject}_T1w.nii.gz", number)
            lines.append(f"{subject}\t{'ab'[number % 2]}\t{'val' if number > 1 else 'train'}")
        (self.cohort / "participants.tsv").write_text("\n".join(lines) + "\n")

    def run(self, job: str, output: Path, fault: Fault | None = None, *more: str) -> tuple[int, str, list[list[str]]]:
        """Run a job to its end, which the fault may bring; exit code, what it printed, and the changes it made."""
        log = self.folder / f"log_{len(list(self.folder.glob('log_*.txt')))}.txt"
        weights = [] if job == "train" else ["--weights", str(self.weights)]
        arguments = ["--dataset_dir", str(self.cohort), "--output_dir", str(output), *weights, *JOBS[job], *TINY_JOB]
        arguments = ["run", "--config_file", f"configs/{job}.json", *arguments, *more]
        process = self.context.Process(target=run_here, args=(arguments, str(output), str(log), fault or Fault()))
        process.start()
        process.join(LONGEST)
        text = log.read_text(errors="replace")
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{job} hangs after {fault}:\n{text}")
        noted = log.with_suffix(".json")
        return process.exitcode, text, json.loads(noted.read_text()) if noted.exists() else []

    def whole(self, job: str) -> tuple[Path, list[list[str]]]:
        """Folder and changes of the undisturbed run, which is made once."""
        if job not in self.wholes:
            code, text, changes = self.run(job, self.folder / job)
            assert code == 0, text
            self.wholes[job] = self.folder / job, changes
        return self.wholes[job]

    def half_written(self, job: str, output: Path) -> list[str]:
        """Files under final names with a content that the undisturbed run never gave them by a rename."""
        legal = {(path, sha256) for event, path, sha256 in self.whole(job)[1] if event == "os.rename"}
        found = contents(output).items()
        return [path for path, sha256 in found if (path, sha256) not in legal and Path(path).name[0] != "."]

    def differing(self, job: str, output: Path) -> list[str]:
        """Files that are not those of the undisturbed run; the report of a training shows the command."""
        ours, whole = contents(output), contents(self.whole(job)[0])
        names = {path for path in ours.keys() | whole.keys() if ours.get(path) != whole.get(path)}
        return sorted(names - ({"report.html"} if job == "train" and "report.html" in ours else set()))

    def assert_mended(self, job: str, output: Path) -> None:
        """No half a file; the same command, which goes on with a training, leaves what an undisturbed run does."""
        assert not self.half_written(job, output)
        code, text, _ = self.run(job, output, None, *(["--resume", "True"] if job == "train" else []))
        assert code == 0, text
        assert not self.differing(job, output)


def run_here(arguments: list[str], output: str, log: str, fault: Fault) -> None:
    """In the forked process: the job as `python -m monai.bundle` runs it, with its fault."""
    with open(log, "wb") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of the data loader, as in a process of its own
    os.chdir(ROOT)
    sys.argv = ["monai.bundle", *arguments]
    changes: list[list[str]] = []
    process = os.getpid()
    if fault.worker:
        threading.Thread(target=kill_worker, daemon=True).start()

    def watch(event: str, values: tuple[Any, ...]) -> None:
        path = str(values[1] if event == "os.rename" else values[0]) if event in CHANGES else ""
        is_reading = event == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not path.startswith(output) or is_reading or os.getpid() != process:
            return
        if fault.scan and path.endswith("preflight.json") and event == "os.rename":
            Path(fault.scan).unlink()
        if fault.number and len(changes) == fault.change:
            if event == "os.rename" and fault.number == signal.SIGKILL:
                os.truncate(values[0], int(fault.share * os.path.getsize(values[0])))
            os.kill(process, fault.number)
        content = hashlib.sha256(Path(values[0]).read_bytes()).hexdigest() if event == "os.rename" else ""
        changes.append([event, os.path.relpath(path, output), content])

    sys.addaudithook(watch)
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the job is over; what is left is the harness's own
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        Path(log).with_suffix(".json").write_text(json.dumps(changes))


def kill_worker() -> None:
    """Kill the first process that this one starts."""
    while True:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                    return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Cohort, weights, and a run of each job that nobody disturbs."""
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with pytest.MonkeyPatch.context() as patch:  # for the server, which takes them over when it starts
        for key, value in {**settings, "PYTHONWARNINGS": "ignore"}.items():
            patch.setenv(key, value)
        made = Bench(tmp_path_factory.mktemp("faults"))
        made.whole("encode")
    return made


def assert_told(ended: tuple[int, str, list[list[str]]], expected: int, *words: str) -> None:
    """One sentence, no traceback, and the exit code."""
    code, text, _ = ended
    lines = re.findall(r"^(?:error|interrupted): .+$", text.replace("\r", "\n"), re.MULTILINE)
    assert code == expected and len(lines) == 1 and "Traceback" not in text, text
    assert all(word in text for word in words), text


SLOW = pytest.mark.slow
ALL = pytest.mark.parametrize("job", ["train", "encode", *(pytest.param(job, marks=SLOW) for job in list(JOBS)[2:])])
KILLS = [(job, number) for job in JOBS for number in range(20)]
FAST_KILLS = [("train", 8), ("encode", 5)]


@pytest.mark.parametrize(
    ("job", "number"), [kill if kill in FAST_KILLS else pytest.param(*kill, marks=SLOW) for kill in KILLS]
)
def test_a_kill(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """SIGKILL before one of twenty changes of a file, at times with half of it written."""
    n_changes = len(bench.whole(job)[1])
    change = sorted(random.Random(job).sample(range(n_changes), min(20, n_changes)))[number % n_changes]
    code, _, _ = bench.run(job, tmp_path / "out", Fault(signal.SIGKILL, change, number % 3 / 2))
    assert code == -signal.SIGKILL
    bench.assert_mended(job, tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("job", ["train", *(pytest.param(job, marks=SLOW) for job in list(JOBS)[1:])])
def test_an_interruption(job: str, number: int, bench: Bench, tmp_path: Path) -> None:
    """Exit codes as shells give them; a training says how to go on: the last whole epoch, and the key."""
    changes = [path for _, path, _ in bench.whole(job)[1]]
    after = next((n + 5 for n, path in enumerate(changes) if path.endswith("epoch_0001.pt")), len(changes) // 2)
    remedy = "add --resume True to the same command to go on after epoch 1." if job == "train" else ""
    ended = bench.run(job, tmp_path / "out", Fault(number, after))
    assert_told(ended, 128 + number, f"interrupted: {remedy}")
    bench.assert_mended(job, tmp_path / "out")


@pytest.mark.parametrize("n_workers", [0, pytest.param(1, marks=SLOW)])
@ALL
def test_a_scan_that_goes_after_the_check(job: str, n_workers: int, bench: Bench, tmp_path: Path) -> None:
    """No result without it: an error with its name, also from a worker process; what is written stays."""
    scan = sorted(bench.cohort.rglob("*.nii.gz"))[-1]
    content, status = scan.read_bytes(), scan.stat()
    try:
        ended = bench.run(job, tmp_path / "out", Fault(scan=str(scan)), "--num_workers", str(n_workers))
    finally:
        scan.write_bytes(content)
        os.utime(scan, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_told(ended, 2, "sub-04_T1w.nii.gz can no longer be read; put it back as it was, then run again.")
    bench.assert_mended(job, tmp_path / "out")


@ALL
def test_a_worker_process_that_is_killed(job: str, bench: Bench, tmp_path: Path) -> None:
    """As the system does when memory is short: an error, and no wait without end."""
    ended = bench.run(job, tmp_path / "out", Fault(worker=True), "--num_workers", "1")
    assert_told(ended, 2, "a process that loads scans has ended", "lower num_workers")
    bench.assert_mended(job, tmp_path / "out")
