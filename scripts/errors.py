"""A user's mistake ends in one sentence and exit code 2; a mistake of ours keeps its traceback.

Every module raises `InputError` for what the user can mend. The configs call `report_input_errors()` first thing
in `initialize`, so that MONAI's and Ignite's wrappers around the error are left out of what the user sees.
"""

from __future__ import annotations

import re
import sys
from types import TracebackType

__all__ = ["InputError", "as_flag", "report_input_errors"]

EXIT_CODE = 2


class InputError(ValueError):
    """Input, configuration or weights that the user has to mend; the message names the file and the remedy."""


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
    """Print an `InputError` anywhere in the chain of an uncaught exception as one line, and exit with code 2."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        cause: BaseException | None = error
        while cause is not None:
            message = _message(cause)
            if message is not None:
                print(f"error: {_printable(message)}", file=sys.stderr, flush=True)
                raise SystemExit(EXIT_CODE)
            cause = cause.__cause__ or cause.__context__
        previous(kind, error, traceback)

    sys.excepthook = hook


def _printable(text: str) -> str:
    """The text with control characters escaped: a file's name can hold any, and would work on the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def _message(error: BaseException) -> str | None:
    """The sentence of an `InputError`, also of one that a data loader's worker process has sent as a traceback."""
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker process" in text:
        found = re.findall(r"^(?:scripts\.errors\.)?InputError: (.+)$", text, re.MULTILINE)
        return found[-1] if found else None
    return text if isinstance(error, InputError) else None
