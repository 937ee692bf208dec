"""Files are whole or absent, and what killed processes have left is found again."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from scripts.run import InputError, check_writable, file_sha256, folder_named, remove_unfinished, replacing

ERRORS: list[tuple[BaseException, bool]] = [  # and whether it is a full disk, by the system or by torch, as text
    (OSError(5, "Input/output error"), False),
    (KeyboardInterrupt(), False),
    (OSError(122, "Disk quota exceeded"), True),
    (RuntimeError("No space left on device"), True),
]


def files(folder: Path) -> dict[str, str]:
    """Names and texts."""
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    """Under a hidden name with the same ending until then, which tells writers the format, in a folder that is made."""
    path = tmp_path / "new" / "x.nii.gz"
    with replacing(str(path)) as temporary:
        temporary.write_text("whole")
        assert temporary.name.startswith(".") and temporary.name.endswith("x.nii.gz")
        assert temporary.parent == path.parent and not path.exists()
        inode = temporary.stat().st_ino
    assert files(path.parent) == {"x.nii.gz": "whole"}
    assert path.stat().st_ino == inode, "copied, which a kill cuts short, and not renamed"


@pytest.mark.parametrize(("error", "is_full"), ERRORS)
def test_an_error_leaves_the_old_file(error: BaseException, is_full: bool, tmp_path: Path) -> None:
    """And nothing else; until then readers see the old one; the error is passed on, a full disk as a sentence."""
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(InputError if is_full else type(error)) as raised, replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("half")
        assert (tmp_path / "x.txt").read_text() == "old"
        raise error
    assert (raised.value.__cause__ if is_full else raised.value) is error and files(tmp_path) == {"x.txt": "old"}
    assert not is_full or "x.txt cannot be written, no space" in str(raised.value)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    """A file stands where the folder should be; or it is a number, as the command line has folder 7."""
    (tmp_path / "folder").touch()
    with pytest.raises(InputError, match="folder cannot be written to .*; choose another"):
        check_writable(tmp_path / "folder")
    with pytest.raises(InputError, match="output_dir is 7"):
        folder_named(7)


def die_while_writing(path: Path) -> None:
    """In a process of its own."""
    with replacing(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_only_what_the_dead_have_left_is_removed(tmp_path: Path) -> None:
    """A killed process's file goes; those of this process, of another machine and of the user stay."""
    target = tmp_path / "sub" / "x.txt"
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(target,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not target.exists()
    (left,) = target.parent.iterdir()
    machine = left.name.split("-")[0]
    others = [tmp_path / name for name in (f"{machine}-{os.getpid()}.y.txt", ".elsewhere-1.z.txt", ".hidden", "a.txt")]
    for path in others:
        path.touch()
    remove_unfinished(tmp_path)
    assert not left.exists() and all(path.exists() for path in others)


def test_file_sha256(tmp_path: Path) -> None:
    """In hex, of more than one piece; a missing file is named, and a number is no file."""
    (tmp_path / "w.pt").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "w.pt") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    for path in (tmp_path / "none.pt", 0):
        with pytest.raises(InputError, match="none.pt cannot be read|0 is no path"):
            file_sha256(path)
