"""Folders of latents go to the original system's pickles and come back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from scripts.convert_latents import export_folder, import_folder, write_original
from scripts.latents import LatentDataset
from scripts.run import InputError

SHAPE = (4, 2, 3, 2)


@pytest.fixture
def pickles(tmp_path: Path) -> Path:
    """Six volumes with labels 0 and 1."""
    for number in range(6):
        mu, logvar = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(number))
        write_original(tmp_path / "pickles" / f"scan{number}.pkl", mu, logvar, number % 2)
    return tmp_path / "pickles"


def test_a_folder_goes_there_and_back(pickles: Path, tmp_path: Path) -> None:
    """Pickles become a folder that `LatentDataset` reads, and that folder the same pickles, byte by byte."""
    assert import_folder(str(pickles), str(tmp_path / "latents"), val_fraction=0.5) == 6
    data = LatentDataset(tmp_path / "latents", draw="mean", scaling="raw", check_hashes=True)
    expected = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(data[0]["latent"], expected) and data[1]["label"] == "1"
    assert {item["split"] for item in data.data} == {"train", "val"}
    assert export_folder(str(tmp_path / "latents"), str(tmp_path / "out")) == 6
    for path in pickles.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_used_folder_is_not_mixed(pickles: Path, tmp_path: Path) -> None:
    """Imported latents do not go among others."""
    import_folder(str(pickles), str(tmp_path / "latents"))
    with pytest.raises(InputError, match="holds latents already"):
        import_folder(str(pickles), str(tmp_path / "latents"))


def test_the_command_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    """Exit code 2, no traceback."""
    command = [sys.executable, "-m", "scripts.convert_latents", "import_folder", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
