"""Breaks jobs from outside at seeded moments, and looks at what is left: for tests/test_faults.py and the docs' table.

    PYTHONPATH=. python tests/fault_injection.py measure outcomes.jsonl
    PYTHONPATH=. python tests/fault_injection.py write outcomes.jsonl

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
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conftest import ROOT, TINY_JOB, make_weights, write_scan

N_KILLS, N_INTERRUPTS, N_SIZES = 20, 2, 2  # of each job
N_SCANS = 4
LONGEST = 300.0  # seconds; a job takes a few, on a busy machine more
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
OF_ONE_RUN = ("command", "config_sha256", "started", "finished", "earlier")  # in run.json
WITHOUT_LPIPS = {"perceptual": "$torch.nn.MSELoss()"}  # which keeps nothing between volumes and takes most of the time
MORE = {
    "train": ["--epochs", "3", "--perceptual_weight", "0", "--batch_size", "1", "--label", "group"],
    "encode": ["--label", "group"],
    "evaluate": [],
    "inference": [],
}
JOBS = tuple(MORE)
PAGE = ROOT / "docs" / "robustness.md"
HEAD = "<!-- made by tests/fault_injection.py write -->\n"
TABLE_HEAD = (
    "| fault | times | exit codes | one sentence | half a file | temporary files | of them left by the re-run "
    "| re-run equal |\n" + "|---" * 8 + "|\n"
)


@dataclass(frozen=True)
class Fault:
    """What happens to a job, once.

    Attributes:
        kind: `signal`, `remove`, `kill worker` or "" for nothing.
        number: of the signal.
        change: before the n-th change of a file in the output folder; -1: by `seconds`.
        seconds: of the processor since the start, which do not depend on what else the machine does.
        share: how much of a file that is about to get its final name is left by a SIGKILL.
        path: the file that is removed as soon as the pre-flight check is done.
    """

    kind: str = ""
    number: int = 0
    change: int = -1
    seconds: float = -1.0
    share: float = 1.0
    path: str = ""


@dataclass
class Ended:
    """A job's end: exit code (negative: by a signal), what it printed, processor seconds, and the changes it made."""

    code: int
    text: str
    seconds: float
    changes: list[list[str]]

    @property
    def told(self) -> bool:
        """Whether the user reads one sentence and no traceback."""
        lines = re.findall(r"^(?:error|interrupted): .+$", self.text.replace("\r", "\n"), re.MULTILINE)
        return len(lines) == 1 and "Traceback" not in self.text


@dataclass
class Whole:
    """A run that nobody disturbed: its files, every content that each had under its final name, seconds, changes."""

    files: dict[str, str]
    legal: set[tuple[str, str]]
    seconds: float
    changes: list[list[str]]


@dataclass
class Bench:
    """A small cohort, weights, and the undisturbed run of each job.

    Args:
        folder: where all of it lies.
    """

    folder: Path
    wholes: dict[str, Whole] = field(default_factory=dict)

    def __post_init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
        os.environ |= {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # of the server, which starts now
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["fault_injection", "fault_libraries"])
        server = (
            self.context.Process()
        )  # a process that does nothing: the libraries are loaded before any time is taken
        server.start()
        server.join()
        self.weights = make_weights(self.folder / "model.pt", 0)
        self.overlay = self.folder / "without_lpips.json"
        self.overlay.write_text(json.dumps(WITHOUT_LPIPS))
        self.cohort = self.make_cohort("cohort")

    def make_cohort(self, name: str) -> Path:
        """A BIDS folder of four heads, two to train and two to validate."""
        root = self.folder / name
        lines = ["participant_id\tgroup\tsplit"]
        for number in range(N_SCANS):
            subject = f"sub-{number + 1:02d}"
            write_scan(root / subject / "anat" / f"{subject}_T1w.nii.gz", number)
            lines.append(f"{subject}\t{'ab'[number % 2]}\t{'val' if number > 1 else 'train'}")
        (root / "participants.tsv").write_text("\n".join(lines) + "\n")
        return root

    def arguments(self, job: str, output: Path) -> list[str]:
        """The command line behind `python -m monai.bundle`."""
        files = f"['configs/{job}.json', '{self.overlay}']" if job == "evaluate" else f"configs/{job}.json"
        weights = [] if job == "train" else ["--weights", str(self.weights)]
        return [
            "run", "--config_file", files, "--dataset_dir", str(self.cohort), "--output_dir", str(output),
            *weights, *MORE[job], *TINY_JOB,
        ]  # fmt: skip

    def again(self, job: str, output: Path) -> Ended:
        """The same command, which goes on with a training."""
        return self.run(job, output, more=["--resume", "True"] if job == "train" else [])

    def run(self, job: str, output: Path, fault: Fault | None = None, more: list[str] | None = None) -> Ended:
        """Run a job to its end, which the fault may bring."""
        process, log = self.start(job, output, fault, more)
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{job} hangs after {fault}:\n{log.read_text(errors='replace')}")
        noted = log.with_suffix(".json")
        seconds, changes = json.loads(noted.read_text()) if noted.exists() else (0.0, [])
        return Ended(process.exitcode, log.read_text(errors="replace"), seconds, changes)

    def start(
        self, job: str, output: Path, fault: Fault | None = None, more: list[str] | None = None
    ) -> tuple[Any, Path]:
        """Start a job; its process, and the file with what it prints."""
        log = self.folder / f"log_{len(list(self.folder.glob('log_*.txt')))}.txt"
        arguments = [*self.arguments(job, output), *(more or [])]
        process = self.context.Process(target=run_here, args=(arguments, str(output), str(log), fault or Fault()))
        process.start()
        log.touch()
        return process, log

    def whole(self, job: str) -> Whole:
        """The undisturbed run, made once."""
        if job not in self.wholes:
            output = self.folder / f"whole_{job}"
            ended = self.run(job, output)
            assert ended.code == 0, ended.text
            legal = {(path, sha256) for event, path, sha256 in ended.changes if event == "os.rename"}
            self.wholes[job] = Whole(contents(output), legal, ended.seconds, ended.changes)
        return self.wholes[job]

    def moments(self, job: str, number: int, n: int, seed: str = "") -> list[Fault]:
        """Half of them before changes of files, half at times from start-up to end; the same for the same seed."""
        rng, whole = random.Random(f"{job} {seed}"), self.whole(job)
        chosen = sorted(rng.sample(range(len(whole.changes)), n // 2))
        faults = [Fault("signal", number, change, share=rng.random()) for change in chosen]
        times = [(part + rng.random()) / (n - n // 2) * whole.seconds for part in range(n - n // 2)]
        return faults + [Fault("signal", number, seconds=seconds) for seconds in times]

    def half_written(self, job: str, output: Path) -> list[str]:
        """Files under final names with a content that the undisturbed run never gave them."""
        return [path for path, sha256 in contents(output).items() if (path, sha256) not in self.whole(job).legal]

    def differing(self, job: str, output: Path) -> list[str]:
        """Files that are not those of the undisturbed run."""
        ours, whole = contents(output), self.whole(job).files
        return sorted(path for path in ours.keys() | whole.keys() if ours.get(path) != whole.get(path))


def contents(output: Path) -> dict[str, str]:
    """sha256 of every file under a final name.

    Without TensorBoard's event files, which hold times and grow, and the report of a training, which shows the command.
    """
    return {
        path.relative_to(output).as_posix(): digest(path, path.name)
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name[0] != "." and "tensorboard" not in path.parts
        and not (path.name == "report.html" and (output / "metrics.csv").exists() and (output / "checkpoints").exists())
    }  # fmt: skip


def digest(path: Path, name: str) -> str:
    """sha256 of a file that has or gets this name; of a whole `run.json` without times, command and earlier runs."""
    content = path.read_bytes()
    if name == "run.json":
        with suppress(ValueError):
            record = json.loads(content)
            kept = {key: value for key, value in record.items() if key not in OF_ONE_RUN}
            content = json.dumps([sorted(record), kept]).encode()
    return hashlib.sha256(content).hexdigest()


def left_overs(output: Path) -> list[Path]:
    """Files under temporary names."""
    return [path for path in output.rglob(".*") if path.is_file()]


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
    if fault.seconds >= 0:
        threading.Thread(target=_signal_later, args=(fault,), daemon=True).start()

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
        content = digest(Path(values[0]), Path(path).name) if event == "os.rename" else ""
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
        Path(log).with_suffix(".json").write_text(json.dumps([time.process_time(), changes]))


def _is_for_writing(values: tuple[Any, ...]) -> bool:
    return bool(values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _signal_later(fault: Fault) -> None:
    while time.process_time() < fault.seconds:
        time.sleep(0.002)
    os.kill(os.getpid(), fault.number)


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


@dataclass
class Outcome:
    """What a fault left, and what the same command made of it then.

    Attributes:
        ended: the job's end under the fault.
        half: files under a final name that are not whole.
        n_left: files under temporary names.
        again: the end of the command, given again without the fault.
        still_left: files under temporary names after that.
        differing: files that are not those of the undisturbed run.
    """

    ended: Ended
    half: list[str]
    n_left: int
    again: Ended
    still_left: list[Path]
    differing: list[str]


def outcome_of(bench: Bench, job: str, output: Path, ended: Ended) -> Outcome:
    """Look at the folder, give the command again, and look once more."""
    half, n_left = bench.half_written(job, output), len(left_overs(output))
    again = bench.again(job, output)
    return Outcome(ended, half, n_left, again, left_overs(output), bench.differing(job, output))


def at_a_moment(bench: Bench, job: str, fault: Fault, output: Path) -> Outcome:
    """SIGKILL, SIGINT or SIGTERM."""
    return outcome_of(bench, job, output, bench.run(job, output, fault))


def on_a_full_disk(bench: Bench, job: str, part: float, output: Path) -> Outcome:
    """A file system that holds a part of what the job writes, and then enough."""
    bench.whole(job)
    total = sum(path.stat().st_size for path in (bench.folder / f"whole_{job}").rglob("*") if path.is_file())
    with small_disk(output, int(part * total)) as remount:
        ended = bench.run(job, output)
        half, n_left = bench.half_written(job, output), len(left_overs(output))
        remount("size=256m")
        again = bench.again(job, output)
        return Outcome(ended, half, n_left, again, left_overs(output), bench.differing(job, output))


def on_a_read_only_disk(bench: Bench, job: str, output: Path) -> Outcome:
    """A file system that is mounted read-only, and then not."""
    with small_disk(output, 1 << 28) as remount:
        remount("ro")
        ended = bench.run(job, output)
        remount("rw")
        again = bench.again(job, output)
        return Outcome(ended, [], 0, again, left_overs(output), bench.differing(job, output))


def with_a_scan_gone(bench: Bench, job: str, n_workers: int, output: Path) -> Outcome:
    """The last scan is removed after the pre-flight check, and put back."""
    cohort = bench.cohort
    scan = sorted(cohort.rglob("*.nii.gz"))[-1]
    content, status = scan.read_bytes(), scan.stat()
    fault = Fault("remove", path=str(scan))
    try:
        ended = bench.run(job, output, fault, more=["--num_workers", str(n_workers)])
    finally:
        scan.write_bytes(content)
        os.utime(scan, ns=(status.st_atime_ns, status.st_mtime_ns))
    return outcome_of(bench, job, output, ended)


def with_a_dead_worker(bench: Bench, job: str, output: Path) -> Outcome:
    """The process that loads scans is killed as soon as it is there."""
    more = ["--num_workers", "1"]
    return outcome_of(bench, job, output, bench.run(job, output, Fault("kill worker"), more))


def two_at_once(bench: Bench, job: str, output: Path) -> Outcome:
    """A second run while the first is stopped in the middle; the first is then killed, which must free the folder."""
    first, _ = bench.start(job, output, Fault("signal", signal.SIGSTOP, len(bench.whole(job).changes) // 2))
    while _state(first.pid) != "T":
        assert first.exitcode is None
        time.sleep(0.02)
    second = bench.run(job, output, more=["--resume", "True"] if job == "train" else [])
    first.kill()
    first.join(LONGEST)
    return outcome_of(bench, job, output, second)


def _state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]


def seeded_parts(job: str, n: int) -> list[float]:
    """Parts of a job's output, one in each n-th, the same for the same job."""
    rng = random.Random(job)
    return [(number + rng.random()) / n for number in range(n)]


def faults(bench: Bench, job: str) -> Iterator[tuple[str, Callable[[Path], Outcome]]]:
    """Every fault of the docs' table for one job: its name, and what brings it about in an output folder."""
    for name, number, n in (("SIGKILL", signal.SIGKILL, N_KILLS), ("Ctrl-C", signal.SIGINT, N_INTERRUPTS),
                            ("SIGTERM", signal.SIGTERM, N_INTERRUPTS)):  # fmt: skip
        for fault in bench.moments(job, number, n, name):
            yield name, partial(at_a_moment, bench, job, fault)
    if may_mount():
        for part in seeded_parts(job, N_SIZES):
            yield "full disk", partial(on_a_full_disk, bench, job, part)
        yield "read-only folder", partial(on_a_read_only_disk, bench, job)
    for n_workers in (0, 1):
        yield "a scan gone after the check", partial(with_a_scan_gone, bench, job, n_workers)
    yield "SIGKILL of a worker process", partial(with_a_dead_worker, bench, job)
    yield "a second run into the folder", partial(two_at_once, bench, job)


def measure(path: str, *jobs: str) -> None:
    """Bring about every fault, and note each outcome as one line of JSON."""
    with TemporaryDirectory() as folder, open(path, "a", encoding="utf-8") as stream:
        bench = Bench(Path(folder))
        for job in jobs or JOBS:
            for number, (name, bring_about) in enumerate(faults(bench, job)):
                outcome = bring_about(Path(folder) / f"{job}_{number}")
                row = {
                    "fault": f"SIGKILL, {job}" if name == "SIGKILL" else name,
                    "job": job,
                    "code": outcome.ended.code,
                    "told": outcome.ended.told,
                    "half": len(outcome.half),
                    "temporary": outcome.n_left,
                    "left": len(outcome.still_left),
                    "equal": outcome.again.code == 0 and not outcome.differing,
                }
                print(row, outcome.differing, file=sys.stderr, flush=True)
                stream.write(json.dumps(row) + "\n")
                stream.flush()


def table(path: str) -> str:
    """The outcomes, one line a fault."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    text = TABLE_HEAD
    for fault in dict.fromkeys(row["fault"] for row in sorted(rows, key=lambda row: "SIGKILL," not in row["fault"])):
        mine = [row for row in rows if row["fault"] == fault]
        codes = sorted(Counter(row["code"] for row in mine).items())
        cells = [str(len(mine)), ", ".join(f"{code}: {n}" for code, n in codes)]
        told = [row for row in mine if row["code"] > 0]
        cells += [f"{sum(row['told'] for row in told)} of {len(told)}" if told else ""]
        cells += [str(sum(row[key] for row in mine)) for key in ("half", "temporary", "left")]
        text += f"| {fault} | {' | '.join(cells)} | {sum(row['equal'] for row in mine)} |\n"
    return text


def write(path: str) -> None:
    """Put the table of outcomes into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(HEAD, 1)
    PAGE.write_text(before + HEAD + table(path) + "<!-- end -->" + rest.split("<!-- end -->", 1)[1], encoding="utf-8")


if __name__ == "__main__":
    {"measure": measure, "write": write}[sys.argv[1]](*sys.argv[2:])
