"""Breaks jobs from outside, and looks at what is left: for tests/test_faults.py.

A job runs in a process that is forked from a server which has the libraries loaded, through `python -m monai.bundle`'s
own code. The one idea: an audit hook sees every change of a file in the output folder. In a run that nobody disturbs it
notes the content that each file gets under its final name, so that anything else there is half a file; in others it
breaks the job at the n-th change.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conftest import ROOT, TINY_JOB, contents, make_weights, write_scan

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
    "fault_injection", *(f"scripts.{path.parent.name}.{path.stem}" for path in MODULES),
    "monai.bundle.scripts", "fire", "torch.utils.tensorboard", "monai.engines", "monai.handlers",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a job, once.

    Attributes:
        kind: `signal`, `remove`, `kill worker` or "" for nothing.
        number: of the signal.
        change: the signal comes before the n-th change of a file in the output folder.
        share: how much of a file that is about to get its final name is left by a SIGKILL.
        path: the file that is removed as soon as the pre-flight check is done.
    """

    kind: str = ""
    number: int = 0
    change: int = -1
    share: float = 1.0
    path: str = ""


@dataclass
class Ended:
    """A job's end: exit code (negative: by a signal), what it printed, and the changes that it made."""

    code: int
    text: str
    changes: list[list[str]]

    @property
    def told(self) -> bool:
        """Whether the user reads one sentence and no traceback."""
        lines = re.findall(r"^(?:error|interrupted): .+$", self.text.replace("\r", "\n"), re.MULTILINE)
        return len(lines) == 1 and "Traceback" not in self.text


@dataclass
class Bench:
    """A small cohort, weights, and the run of each job that nobody disturbs: its folder, and the changes that it made.

    Args:
        folder: where all of it lies.
    """

    folder: Path
    wholes: dict[str, tuple[Path, list[list[str]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        os.environ |= {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # of the server, which starts now
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.weights = make_weights(self.folder / "model.pt", 0)
        self.cohort = self.folder / "cohort"
        lines = ["participant_id\tgroup\tsplit"]
        for number in range(4):
            subject = f"sub-{number + 1:02d}"
            write_scan(self.cohort / subject / "anat" / f"{subject}_T1w.nii.gz", number)
            lines.append(f"{subject}\t{'ab'[number % 2]}\t{'val' if number > 1 else 'train'}")
        (self.cohort / "participants.tsv").write_text("\n".join(lines) + "\n")

    def run(self, job: str, output: Path, fault: Fault | None = None, *more: str) -> Ended:
        """Run a job to its end, which the fault may bring."""
        log = self.folder / f"log_{len(list(self.folder.glob('log_*.txt')))}.txt"
        weights = [] if job == "train" else ["--weights", str(self.weights)]
        arguments = ["--dataset_dir", str(self.cohort), "--output_dir", str(output), *weights, *JOBS[job], *TINY_JOB]
        arguments = ["run", "--config_file", f"configs/{job}.json", *arguments, *more]
        process = self.context.Process(target=run_here, args=(arguments, str(output), str(log), fault or Fault()))
        process.start()
        log.touch()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{job} hangs after {fault}:\n{log.read_text(errors='replace')}")
        noted = log.with_suffix(".json")
        changes = json.loads(noted.read_text()) if noted.exists() else []
        return Ended(process.exitcode, log.read_text(errors="replace"), changes)

    def whole(self, job: str) -> tuple[Path, list[list[str]]]:
        """Folder and changes of the undisturbed run, which is made once."""
        if job not in self.wholes:
            output = self.folder / f"whole_{job}"
            ended = self.run(job, output)
            assert ended.code == 0, ended.text
            self.wholes[job] = output, ended.changes
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
        again = self.run(job, output, None, *(["--resume", "True"] if job == "train" else []))
        assert again.code == 0, again.text
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
    if fault.kind == "kill worker":
        threading.Thread(target=_kill_worker, daemon=True).start()

    def watch(event: str, values: tuple[Any, ...]) -> None:
        path = str(values[1] if event == "os.rename" else values[0]) if event in CHANGES else ""
        if not path.startswith(output) or event == "open" and not _is_for_writing(values) or os.getpid() != process:
            return
        if fault.kind == "remove" and path.endswith("preflight.json") and event == "os.rename":
            Path(fault.path).unlink()
        if fault.kind == "signal" and len(changes) == fault.change:
            if event == "os.rename" and fault.number == signal.SIGKILL:
                os.truncate(values[0], int(fault.share * os.path.getsize(values[0])))
            os.kill(process, fault.number)
        content = hashlib.sha256(Path(values[0]).read_bytes()).hexdigest() if event == "os.rename" else ""
        changes.append([event, os.path.relpath(path, output), content])

    sys.addaudithook(watch)
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # the job is over; what is left is the harness's own
            signal.signal(number, signal.SIG_IGN)
        sys.stdout.flush()
        Path(log).with_suffix(".json").write_text(json.dumps(changes))


def _is_for_writing(values: tuple[Any, ...]) -> bool:
    return bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _kill_worker() -> None:
    """Kill the first process that this one starts."""
    while True:
        for task in Path("/proc/self/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    os.kill(int(child), signal.SIGKILL)
                    return
        time.sleep(0.005)


def may_mount() -> bool:
    """Whether this user may mount a file system."""
    with TemporaryDirectory() as folder:
        command = f"mount -t tmpfs tmpfs {folder} && umount {folder}"
        return sys.platform == "linux" and subprocess.run(command, shell=True, capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A file system of some bytes at a folder; gives a function that mounts it anew with other options."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
