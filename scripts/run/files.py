"""Files that are either whole or absent: everything the bundle writes goes through `replacing`. And their sha256."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.run.errors import InputError, is_disk_full

__all__ = ["check_writable", "file_sha256", "folder_named", "remove_unfinished", "replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and rename it to `path` if the block ends without an error.

    The temporary name keeps the ending, because nibabel and matplotlib choose the format by it; it begins with a dot,
    the machine and the process, so that processes that share a folder do not meet.

    Args:
        path: the final name; its folder is made if it is missing.

    Yields:
        The temporary path.

    Raises:
        InputError: the folder cannot be written to, or its disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        if is_disk_full(error) and not isinstance(error, InputError):
            raise _no_space(path) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Make a folder where it is missing, and try whether files can be written there.

    Raises:
        InputError: the folder cannot be written to, or its disk is full.
    """
    _temporary(Path(folder) / "writable").unlink()


def folder_named(output_dir: str | Path) -> Path:
    """The path of an output folder; InputError where a config or a command line has made something else of it."""
    if isinstance(output_dir, (str, Path)) and str(output_dir):
        return Path(output_dir)
    raise InputError(f"output_dir is {output_dir!r}; give a folder, as ./{output_dir} if its name is a number.")


def remove_unfinished(folder: str | Path) -> None:
    """Remove what processes of this machine that were killed in the middle of `replacing` have left behind.

    Args:
        folder: searched with its subfolders; files of running processes and of other machines stay.
    """
    pattern = re.compile(rf"\.{re.escape(_machine())}-(\d+)\..+")
    for path in Path(folder).rglob(f".{_machine()}-*"):
        match = pattern.fullmatch(path.name)
        if match and not _is_running(int(match.group(1))):
            path.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    """sha256 of a file, in hex; InputError where it cannot be read."""
    if not isinstance(path, (str, os.PathLike)):  # a number would be taken for a file that is open already
        raise InputError(f"{path!r} is no path; give the path of a file.")
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    return digest.hexdigest()


def _temporary(path: Path) -> Path:
    """A new empty file beside `path`, under the name that this process writes it by."""
    folder, temporary = path.parent, path.with_name(f".{_machine()}-{os.getpid()}.{path.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        if is_disk_full(error):
            raise _no_space(folder) from error
        raise InputError(f"{folder} cannot be written to ({error.strerror}); choose another folder.") from error
    return temporary


def _no_space(path: Path) -> InputError:
    return InputError(f"{path} cannot be written, no space is left on its disk; free some, then run again.")


def _machine() -> str:
    return re.sub(r"[^\w]", "_", socket.gethostname())[:32]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
