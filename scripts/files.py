"""Files that are either whole or absent: everything the bundle writes goes through `replacing`. And their sha256."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.errors import InputError

__all__ = ["file_sha256", "is_packed", "remove_unfinished", "replacing"]


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
        InputError: the folder cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{_machine()}-{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written to ({error.strerror}); choose another folder.") from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file of `torch.save` holds compressed parts: torch writes none, and they could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())


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
