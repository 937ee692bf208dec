"""Files are whole or absent, and what killed processes have left is found again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.run import InputError, file_sha256, remove_unfinished, replacing

DIES = (
    "import os, signal\nfrom scripts.run.files import replacing\n"
    "with replacing(os.environ['TARGET']) as temporary:\n"
    "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
)


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    """Under a hidden name with the same ending until then, in a folder that is made."""
    with replacing(tmp_path / "new" / "x.nii.gz") as temporary:
        temporary.write_text("whole")
        assert temporary.name.startswith(".") and temporary.name.endswith(".nii.gz")
        assert not (tmp_path / "new" / "x.nii.gz").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.nii.gz"]


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    """And nothing else."""
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(KeyError), replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
        raise KeyError
    assert (tmp_path / "x.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "folder").touch()
    with pytest.raises(InputError, match="cannot be written to"), replacing(tmp_path / "folder" / "x"):
        pass


def test_only_what_the_dead_have_left_is_removed(tmp_path: Path) -> None:
    """A killed process's file goes; those of this process, of another machine and of the user stay."""
    target = tmp_path / "sub" / "x.txt"
    environment = {**os.environ, "TARGET": str(target)}
    killed = subprocess.run([sys.executable, "-c", DIES], cwd=ROOT, env=environment)
    assert killed.returncode < 0 and not target.exists()
    (left,) = target.parent.iterdir()
    machine = left.name.split("-")[0]
    others = [tmp_path / name for name in (f"{machine}-{os.getpid()}.y.txt", ".elsewhere-1.z.txt", ".hidden", "a.txt")]
    for path in others:
        path.touch()
    remove_unfinished(tmp_path)
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_file_sha256(tmp_path: Path) -> None:
    """In hex; a missing file is named."""
    (tmp_path / "w.pt").write_bytes(b"x" * 3_000_000)
    assert file_sha256(tmp_path / "w.pt") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    with pytest.raises(InputError, match="none.pt cannot be read"):
        file_sha256(tmp_path / "none.pt")
