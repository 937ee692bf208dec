"""A user's mistake is one line and exit code 2, switches mean what they say, and files are whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import interruptible

from scripts.run import InputError, as_flag, replacing

ROOT = Path(__file__).parents[1]

FLAGS = [
    (True, True), (1, True), ("True", True), ("true", True), (" YES ", True), ("on", True), ("1", True),
    (False, False), (0, False), ("False", False), ("no", False), ("OFF", False), ("0", False), ("", False),
]  # fmt: skip
NO_FLAGS = [None, 2, -1, "maybe", "truefalse", "None", [], 0.5]

# what a script does after report_input_errors(), and the one line it leaves
MISTAKES = {
    "plain": "raise InputError('no scan')",
    "cause": "try:\n  raise InputError('no scan')\nexcept ValueError as e:\n  raise RuntimeError('outer') from e",
    "context": "try:\n  raise InputError('no scan')\nexcept ValueError:\n  raise KeyError('outer')",
    "cause of a cause": (
        "try:\n  try:\n    raise InputError('no scan')\n  except ValueError as e:\n    raise OSError('a') from e\n"
        "except OSError as e:\n  raise RuntimeError('b') from e"
    ),
    "with a cause of its own": "try:\n  open('/nowhere')\nexcept OSError as e:\n  raise InputError('no scan') from e",
}
# the same behind the wrappers of the libraries, which are imported once for all of them
WRAPPED = {
    "engine": "Engine(lambda engine, batch: fail(batch)).run([1])",
    "transform": "Compose([fail])({})",
    "worker": "list(DataLoader(torch.utils.data.ChainDataset([Failing()]), num_workers=1))",
    "transform in a worker": "list(DataLoader(Dataset([1, 2], fail), num_workers=1))",
    "config": "ConfigParser({'a': '$fail(1)', 'b': '@a'}, globals={'fail': fail}).get_parsed_content('b')",
}
LIBRARIES = """
import logging, sys, torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.transforms import Compose
from torch.utils.data import DataLoader
logging.disable()
def fail(x):
    raise InputError('no scan')
class Failing(torch.utils.data.IterableDataset):
    def __iter__(self):
        fail(1)
def end(body):
    try:
        exec(body)
    except Exception:
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as stop:
            print('exit', stop.code, file=sys.stderr)
"""


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    """Run a body in a new Python after `report_input_errors()`."""
    code = f"from scripts.run.errors import InputError, report_input_errors\nreport_input_errors()\n{body}\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120,
        preexec_fn=interruptible,
    )  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), FLAGS)
def test_as_flag(value, expected):
    """Texts of the command line, numbers and bools become a bool."""
    assert as_flag(value, "resume") is expected


@pytest.mark.parametrize("value", NO_FLAGS, ids=str)
def test_as_flag_refuses(value):
    """Anything else is refused with the key and the value, never taken for true."""
    with pytest.raises(InputError, match="'resume' is .*; give True or False") as error:
        as_flag(value, "resume")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("body", MISTAKES.values(), ids=MISTAKES.keys())
def test_users_mistake_is_one_line(body):
    """However deep it is in the chain of causes: one line, no traceback, exit code 2."""
    done = run_script(body)
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: no scan"])


@pytest.fixture(scope="module")
def wrapped() -> dict[str, list[str]]:
    """The lines on stderr of every case of `WRAPPED`."""
    lines = "\n".join(f"print('== {name}', file=sys.stderr)\nend({body!r})" for name, body in WRAPPED.items())
    sections = run_script(LIBRARIES + lines).stderr.split("== ")[1:]
    return {name: rest for name, *rest in (section.splitlines() for section in sections)}


@pytest.mark.parametrize("name", WRAPPED)
def test_users_mistake_is_one_line_through_the_libraries(wrapped, name):
    """Ignite's engine, MONAI's transforms and config parser and torch's worker processes hide nothing."""
    assert wrapped[name] == ["error: no scan", "exit 2"]


@pytest.mark.parametrize("body", ["raise KeyError('ours')", "1 / 0", "raise ValueError('InputError: of another kind')"])
def test_our_mistake_keeps_its_traceback(body):
    """Every other error keeps traceback and exit code 1."""
    done = run_script(body)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")


SWALLOWED = (
    "import os, time\ntry:\n  os.kill(os.getpid(), {})\n  time.sleep(9)\nexcept BaseException:\n  pass\nraise KeyError"
)


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        (SWALLOWED.format(2), 130, "interrupted: run the same command again."),
        (SWALLOWED.format(15), 143, "interrupted: run the same command again."),
        ("raise KeyboardInterrupt", 130, "interrupted: run the same command again."),
        ("raise Interrupted('go on.', 143)", 143, "interrupted: go on."),
        ("try:\n  raise InputError('x')\nexcept InputError:\n  raise KeyboardInterrupt", 130,
         "interrupted: run the same command again."),
    ],
)  # fmt: skip
def test_an_interruption_is_one_line(body, code, line):
    """Ctrl-C, and what a handler of it raises; also while an error is handled, and where a library drops it."""
    done = run_script(f"from scripts.run.errors import Interrupted\n{body}")
    assert (done.returncode, done.stderr.splitlines()) == (code, [line])


FAULTS = {
    "full disk": ("raise OSError(28, 'No space left on device', '/out/a')", "no space is left on /out/a; free some"),
    "full quota": ("raise OSError(122, 'Disk quota exceeded')", "no space is left on the disk of output_dir; free"),
    "torch's full disk": ("raise RuntimeError('[enforce fail] No space left on device')", "no space is left on the"),
    "a scan gone": (
        "raise RuntimeError('LoadImage cannot find a suitable reader for file: /in/a b.nii.gz.\\n more')",
        "/in/a b.nii.gz can no longer be read; put it back",
    ),
    "a worker killed": (
        "raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. ')",
        "a process that loads scans has ended (killed by signal: Killed); if memory is short",
    ),
    "a worker gone": (
        "raise RuntimeError('DataLoader worker (pid(s) 7, 8) exited unexpectedly')",
        "a process that loads scans has ended (exited unexpectedly)",
    ),
    "the first that is ours": (
        "try:\n  raise OSError(28, 'No space left on device')\nexcept OSError as e:\n  raise InputError('mine') from e",
        "mine",
    ),
}  # fmt: skip


def test_a_full_disk_is_told_once():
    """TensorBoard's thread meets it first; other errors of threads are shown."""
    thread = (
        "import threading\ndef go():\n  raise {}\nthread = threading.Thread(target=go)\nthread.start()\nthread.join()\n"
    )
    full = "OSError(28, 'No space left on device')"
    done = run_script(thread.format(full) + f"raise {full}")
    assert done.stderr.splitlines() == ["error: no space is left on the disk of output_dir; free some, then run again."]
    assert "KeyError" in run_script(thread.format("KeyError('ours')")).stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_under_a_job_is_one_line(fault):
    """With exit code 2, as a mistake."""
    body, expected = FAULTS[fault]
    done = run_script(body)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {expected}")


def test_reporting_twice_prints_once():
    """Two configs in one process install it twice."""
    done = run_script("report_input_errors()\nraise InputError('no scan')")
    assert (done.returncode, done.stderr) == (2, "error: no scan\n")


def test_replacing_makes_the_file_and_its_folder(tmp_path):
    """The file is there after the block, under its name alone, also in folders that were missing."""
    path = tmp_path / "a" / "b" / "table.csv"
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("name", ["scan.nii.gz", "picture.png", "model.pt", "noending"])
def test_replacing_keeps_ending_and_folder(tmp_path, name):
    """Writers choose the format by the ending; a rename is atomic only within one folder; hidden meanwhile."""
    with replacing(tmp_path / name) as temporary:
        assert temporary.name.endswith(name) and temporary.name.startswith(".")
        assert temporary.parent == tmp_path


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replacing_keeps_the_old_file_on_error(tmp_path, error):
    """A write that breaks off leaves the old file whole, and nothing beside it."""
    path = tmp_path / "model.pt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replaced_file_is_never_half(tmp_path):
    """While the new file is being written, readers of the name see the old one."""
    path = tmp_path / "table.csv"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new, first half")
        assert path.read_text() == "old"
    assert path.read_text() == "new, first half"


def test_folder_that_is_a_file_is_named(tmp_path):
    """An output_dir that is a file is refused in one sentence."""
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="out cannot be written to .*; choose another folder"):  # noqa: SIM117
        with replacing(tmp_path / "out" / "table.csv"):
            raise AssertionError("the block must not run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_named(tmp_path):
    """Without the right to write: the folder, the reason and the remedy."""
    folder = tmp_path / "out"
    folder.mkdir(mode=0o500)
    with pytest.raises(InputError, match="out cannot be written to .Permission denied"), replacing(folder / "a.csv"):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("No space left on device"),
    ],
)
def test_a_full_disk_is_said(tmp_path, error):
    """The system's error, or torch's, which gives it on as text."""
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(InputError, match=r"a.csv cannot be written, no space .*; free some, then run again") as raised:  # noqa: SIM117
        with replacing(tmp_path / "a.csv"):
            raise error
    assert raised.value.__cause__ is error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.csv", "old")]


def test_another_error_of_the_block_is_passed_on(tmp_path):
    """It is not taken for the folder's."""
    with pytest.raises(OSError, match="Input/output error") as error, replacing(tmp_path / "a.csv"):
        raise OSError(5, "Input/output error")
    assert not isinstance(error.value, InputError)
