"""A user's mistake, a fault under a job, an interruption are one line each; a mistake of ours keeps its traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, interruptible

from scripts.run import InputError, as_flag

FLAGS = [
    (True, True), (1, True), ("True", True), (" YES ", True), ("on", True), ("1", True),
    (False, False), (0, False), ("false", False), ("no", False), ("OFF", False), ("0", False), ("", False),
]  # fmt: skip
NO_FLAGS = [None, 2, -1, "maybe", "truefalse", "None", [], 0.5]

AGAIN = "interrupted: run the same command again."
ERROR = "error: no scan"
MISTAKE = "raise InputError('no scan')"
FULL = "OSError(28, 'No space left on device')"
SWALLOWED = "try:\n  os.kill(os.getpid(), {})\n  time.sleep(9)\nexcept BaseException:\n  pass\nraise KeyError"
THREAD = "def go():\n  raise {}\nt = threading.Thread(target=go)\nt.start()\nt.join()\n"
# What a process does after report_input_errors(), its exit code, and how what it leaves on stderr begins.
CASES = {
    "plain": (MISTAKE, 2, ERROR),
    "reported twice": (f"report_input_errors()\n{MISTAKE}", 2, ERROR),
    "cause": (f"try:\n  {MISTAKE}\nexcept ValueError as e:\n  raise RuntimeError('outer') from e", 2, ERROR),
    "context": (f"try:\n  {MISTAKE}\nexcept ValueError:\n  raise KeyError('outer')", 2, ERROR),
    "with a cause of its own": (f"try:\n  raise {FULL}\nexcept OSError as e:\n  {MISTAKE}", 2, ERROR),
    "control characters": ("raise InputError('no \\x1b[2J scan')", 2, "error: no \\x1b[2J scan"),
    "engine": ("Engine(lambda engine, batch: fail(batch)).run([1])", 2, ERROR),
    "transform": ("Compose([fail])({})", 2, ERROR),
    "worker": ("list(DataLoader(torch.utils.data.ChainDataset([Failing()]), num_workers=1))", 2, ERROR),
    "transform in a worker": ("list(DataLoader(Dataset([1, 2], fail), num_workers=1))", 2, ERROR),
    "config": (
        "ConfigParser({'a': '$fail(1)', 'b': '@a'}, globals={'fail': fail}).get_parsed_content('b')", 2, ERROR,
    ),
    "ours": ("raise KeyError('ours')", 1, "Traceback (most recent call last)"),
    "ours by another name": ("raise ValueError('InputError: of another kind')", 1, "Traceback"),
    "Ctrl-C that is dropped": (SWALLOWED.format(2), 130, AGAIN),
    "SIGTERM that is dropped": (SWALLOWED.format(15), 143, AGAIN),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, AGAIN),
    "Ctrl-C within an error": (f"try:\n  {MISTAKE}\nexcept InputError:\n  raise KeyboardInterrupt", 130, AGAIN),
    "a remedy": ("raise Interrupted('go on.', 143)", 143, "interrupted: go on."),
    "full disk": ("raise OSError(28, 'No space left on device', '/out/a')", 2, "error: no space is left on /out/a;"),
    "full quota": ("raise OSError(122, 'Disk quota exceeded')", 2, "error: no space is left on the disk of output"),
    "torch's full disk": ("raise RuntimeError('[enforce fail] No space left on device')", 2, "error: no space is left"),
    "full disk, in a thread first": (THREAD.format(FULL) + f"raise {FULL}", 2, "error: no space is left on the"),
    "ours, in a thread": (THREAD.format("KeyError('ours')"), 0, "Exception in thread"),
    "a scan gone": (
        "raise RuntimeError('LoadImage cannot find a suitable reader for file: /in/a b.nii.gz.\\n more')", 2,
        "error: /in/a b.nii.gz can no longer be read; put it back",
    ),
    "a worker killed": (
        "raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')", 2,
        "error: a process that loads scans has ended (killed by signal: Killed); if memory is short",
    ),
    "a worker gone": (
        "raise RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly')", 2,
        "error: a process that loads scans has ended (exited unexpectedly)",
    ),
}  # fmt: skip
# Each case ends in a process of its own, forked from one that has the libraries.
DRIVER = """
import gc, json, logging, os, sys, tempfile, threading, time
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.transforms import Compose
from torch.utils.data import DataLoader
from scripts.run import InputError, Interrupted, report_input_errors
def fail(x):
    raise InputError('no scan')
class Failing(torch.utils.data.IterableDataset):
    def __iter__(self):
        fail(1)
logging.basicConfig()
gc.freeze()  # else a process copies all pages when it ends
ended = {}
for name, body in json.loads(sys.argv[1]).items():
    file = tempfile.TemporaryFile('w+')
    child = os.fork()
    if child == 0:
        os.dup2(file.fileno(), 2)
        break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    file.seek(0)
    ended[name] = [code, file.read().splitlines()]
else:
    print(json.dumps(ended))
    sys.exit()
report_input_errors()
exec(body)
"""


@pytest.fixture(scope="module")
def ended() -> dict[str, tuple[int, list[str]]]:
    """Exit code and lines on stderr of every case."""
    bodies = json.dumps({name: body for name, (body, _, _) in CASES.items()})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, bodies], env=environment, stdout=subprocess.PIPE, text=True, timeout=300,
        preexec_fn=interruptible,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_how_a_process_ends(case: str, ended: dict[str, tuple[int, list[str]]]) -> None:
    """However deep a mistake lies, also behind ignite, MONAI and torch's workers: one line and the exit code."""
    _, expected, begins = CASES[case]
    code, lines = ended[case]
    assert code == expected and lines[0].startswith(begins), lines
    assert len(lines) == 1 or not begins.startswith(("error", "interrupted")), lines


@pytest.mark.parametrize(("value", "expected"), FLAGS)
def test_as_flag(value: object, expected: bool) -> None:
    """Texts of the command line, numbers and bools become a bool."""
    assert as_flag(value, "resume") is expected


@pytest.mark.parametrize("value", NO_FLAGS, ids=str)
def test_as_flag_refuses(value: object) -> None:
    """Anything else is refused with the key, never taken for true."""
    with pytest.raises(InputError, match="'resume' is .*; give True or False"):
        as_flag(value, "resume")
