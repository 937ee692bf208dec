"""A user's mistake ends in one sentence and exit code 2; a mistake of ours keeps its traceback.

Every module raises `InputError` for what the user can correct. The configs call `report_input_errors()` first thing
in `initialize`, so that MONAI's and Ignite's wrappers around the error are left out of what the user sees. What breaks
under a job, a full disk, a scan that is gone, a worker process that was killed, is told the same way.
"""

from __future__ import annotations

import errno
import logging
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

from tqdm import tqdm

__all__ = ["InputError", "Interrupted", "as_flag", "is_disk_full", "report_input_errors"]

EXIT_CODE = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
USUAL_HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
received: list[int] = []  # signals to end, in this process


class InputError(ValueError):
    """Input, configuration or weights that the user has to correct; the message names the file and the remedy."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a scheduler's SIGTERM, with what to do next.

    Args:
        remedy: a sentence for the user.
        exit_code: 128 and the signal's number, as shells count.
    """

    def __init__(self, remedy: str = "run the same command again.", exit_code: int = 130) -> None:
        super().__init__(remedy)
        self.exit_code = exit_code


def as_flag(value: bool | int | str, key: str) -> bool:
    """Understand a switch given in JSON or on the command line, where `--resume false` arrives as text.

    Args:
        value: true or false, 1 or 0, or one of the texts true, false, yes, no, on, off (any case).
        key: the config key, named in the error.

    Returns:
        The switch as a bool.

    Raises:
        InputError: the value is none of these.
    """
    if isinstance(value, str):
        word = value.strip().lower()
        if word in ("true", "yes", "on", "1"):
            return True
        if word in ("false", "no", "off", "0", ""):
            return False
    elif value in (0, 1):
        return bool(value)
    raise InputError(f"'{key}' is {value!r}; give True or False.")


def report_input_errors() -> None:
    """Print an `InputError` anywhere in the chain of an uncaught exception as one line, and exit with code 2.

    The same for an interruption, with the exit code 130 (Ctrl-C) or 143 (SIGTERM). Ignite's log of the same error,
    which may hold a worker's traceback, is left out.
    """
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_said_once)
    _end_on_signals()
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if received or isinstance(error, KeyboardInterrupt):  # libraries at times raise another error instead
            usual = Interrupted(exit_code=128 + received[-1]) if received else Interrupted()
            interrupted = next((cause for cause in _chain(error) if isinstance(cause, Interrupted)), usual)
            tqdm.write(f"interrupted: {_printable(str(interrupted))}", file=sys.stderr)
            raise SystemExit(interrupted.exit_code)
        found = (read(cause) for read in (_message, _fault) for cause in _chain(error))
        message = next((message for message in found if message is not None), None)
        if message is not None:
            tqdm.write(f"error: {_printable(message)}", file=sys.stderr)  # on a line of its own, also under a bar
            raise SystemExit(EXIT_CODE)
        previous(kind, error, traceback)

    sys.excepthook = hook
    previous_in_threads = threading.excepthook

    def thread_hook(fault: threading.ExceptHookArgs) -> None:
        if fault.exc_value is None or not is_disk_full(fault.exc_value):  # TensorBoard raises it again when it is used
            previous_in_threads(fault)

    threading.excepthook = thread_hook


def _end_on_signals() -> None:
    """End on SIGTERM as on Ctrl-C, where nobody else has said how."""
    if threading.current_thread() is threading.main_thread():
        for number, usual in USUAL_HANDLERS.items():
            if signal.getsignal(number) == usual:
                signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    received.append(number)
    raise Interrupted(exit_code=128 + number)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that a disk or a quota has no space left.

    torch and safetensors pass the system's error on as text.
    """
    return any(
        isinstance(cause, OSError) and cause.errno in DISK_FULL or "No space left on device" in str(cause)
        for cause in _chain(error)
    )


def _is_said_once(record: logging.LogRecord) -> bool:
    return "run is terminating due to exception" not in str(record.msg)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that led to it."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _printable(text: str) -> str:
    """The text with control characters escaped: a file's name can hold any, and would work on the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _message(error: BaseException) -> str | None:
    """The sentence of an `InputError`, also of one that a data loader's worker process has sent as a traceback."""
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker process" in text:
        found = re.findall(r"^(?:scripts\.run\.errors\.)?InputError: (.+)$", text, re.MULTILINE)
        return found[-1] if found else None
    return text if isinstance(error, InputError) else None


def _fault(error: BaseException) -> str | None:
    """What the system, MONAI's readers and torch's data loader say where something breaks under a running job."""
    text = str(error)
    gone = re.search(r"cannot find a suitable reader for file: (.+)\.\n", text)
    if "io.dictionary.LoadImaged" in text:  # the file went while its voxels were read
        gone = gone or re.search(r"No such file or directory: '(.+)'", "\n".join(map(str, _chain(error))))
    killed = re.search(r"DataLoader worker \(pid.*?\) (?:is )?(killed by signal: \w.*?\.|exited unexpectedly)", text)
    fault = None
    if gone:
        scan = gone[1]
        fault = InputError(f"{scan} can no longer be read; put it back as it was, then run again.")
    elif killed:
        reason = killed[1].rstrip(".")
        fault = InputError(
            f"a process that loads scans has ended ({reason}); if memory is short, lower num_workers, then run again."
        )
    elif is_disk_full(error):
        place = getattr(error, "filename", None) or "the disk of output_dir"
        fault = InputError(f"no space is left on {place}; free some, then run again.")
    return None if fault is None else str(fault)
