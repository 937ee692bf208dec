"""A job's output folder: writable, free of what killed runs have left, and of one run at a time.

The first line of each config's `run`. The folder itself is locked, which leaves no file behind, and the
system lifts the lock when the process ends, however it ends. The processes of one torchrun are one run: the first
locks.
"""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from pathlib import Path

from scripts.run.errors import InputError
from scripts.run.files import check_writable, folder_named, remove_unfinished

__all__ = ["claim_folder", "share_folder"]

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

HELD: dict[str, int] = {}  # folder to open file of the locks of this process, which keep them until it ends


def claim_folder(output_dir: str) -> None:
    """Make the folder this run's own.

    Args:
        output_dir: made where it is missing, and removed again if nothing is written to it.

    Raises:
        InputError: it cannot be written to, or another run is writing to it.
    """
    _begin(output_dir, is_shared=False)


def share_folder(output_dir: str) -> None:
    """As `claim_folder`, for a job of which several may write to one folder at once, but none of another kind.

    Args:
        output_dir: see `claim_folder`.

    Raises:
        InputError: see `claim_folder`.
    """
    _begin(output_dir, is_shared=True)


def _begin(output_dir: str, is_shared: bool) -> None:
    if int(os.environ.get("RANK", "0")) > 0:
        return
    folder = folder_named(output_dir)
    is_new = not folder.exists()
    check_writable(folder)
    if is_new:
        atexit.register(_remove_if_empty, folder)
    _lock(folder, is_shared)
    remove_unfinished(folder)


def _lock(folder: Path, is_shared: bool) -> None:
    key = os.path.realpath(folder)
    if fcntl is None or key in HELD:
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(file)
        raise InputError(
            f"another run is writing to {folder}; wait until it has ended, or give another --output_dir."
        ) from error
    except OSError:  # a file system without locks
        os.close(file)
        return
    HELD[key] = file
    os.register_at_fork(after_in_child=lambda: os.close(file))  # workers may outlive a killed run for seconds


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
