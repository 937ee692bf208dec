"""A user's mistake, a fault under a job, an interruption are one line each; a mistake of ours keeps its traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
from conftest import ROOT, interruptible

from scripts.run import InputError, as_flag

FLAGS = [(True, True), (" YES ", True), ("1", True), (0, False), ("OFF", False), (2, None), ("maybe", None)]
AGAIN = "interrupted: run the same command again."
ERROR = "error: no scan"
MISTAKE = "raise InputError('no scan')"
FULL = "OSError(28, 'No space left on device')"
SWALLOWED = "try:\n  os.kill(os.getpid(), 2)\n  time.sleep(9)\nexcept BaseException:\n  pass\nraise KeyError"
# What a process does after report_input_errors(), its exit code, and how what it leaves on stderr begins.
CASES = {
    "context": (f"try:\n  {MISTAKE}\nexcept ValueError:\n  raise KeyError('outer')", 2, ERROR),
    "with a cause of its own": (f"try:\n  raise {FULL}\nexcept OSError as e:\n  {MISTAKE}", 2, ERROR),
    "control characters": ("raise InputError('no \\x1b[2J scan')", 2, "error: no \\x1b[2J scan"),
    "engine": ("Engine(lambda engine, batch: fail(batch)).run([1])", 2, ERROR),
    "transform in a worker": ("list(DataLoader(Dataset([1, 2], fail), num_workers=1))", 2, ERROR),
    "config": ("ConfigParser({'a': '$fail(1)'}, globals={'fail': fail}).get_parsed_content('a')", 2, ERROR),
    "ours": ("raise KeyError('ours')", 1, "Traceback (most recent call last)"),
    "Ctrl-C that is dropped": (SWALLOWED, 130, AGAIN),
    "Ctrl-C": ("raise KeyboardInterrupt", 130, AGAIN),
    "full disk": ("raise OSError(28, 'No space left on device', '/out/a')", 2, "error: no space is left on /out/a;"),
    "a scan gone": (
        "raise RuntimeError('LoadImage cannot find a suitable reader for file: /in/a b.nii.gz.\\n more')", 2,
        "error: /in/a b.nii.gz can no longer be read; put it back",
    ),
    "a worker killed": (
        "raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')", 2,
        "error: a process that loads scans has ended (killed by signal: Killed); if memory is short",
    ),
}  # fmt: skip
# Each case ends in a process of its own, forked from one that has the libraries.
DRIVER = """
import gc, json, logging, os, sys, tempfile, time
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import Dataset
from torch.utils.data import DataLoader
from scripts.run import InputError, report_input_errors
def fail(x):
    raise InputError('no scan')
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
def test_as_flag(value: object, expected: bool | None) -> None:
    """Texts of the command line, numbers and bools become a bool; anything else is refused with the key."""
    with nullcontext() if expected is not None else pytest.raises(InputError, match="'resume' is .*; give True or"):
        assert as_flag(value, "resume") is expected
