"""Folders of latents from numpy files, and to the original system's pickles."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

from scripts.cohort import split_of
from scripts.convert_latents import export_folder, import_folder
from scripts.latents import LatentDataset, latent_path, read_latent, read_manifest
from scripts.run import InputError

SHAPE = (4, 2, 3, 2)
GOOD = np.zeros(SHAPE, np.float32)
DAMAGED: dict[str, dict[str, Any]] = {
    "no logvar": {"mu": GOOD},
    "a pickle": {"mu": GOOD, "logvar": np.array([{}] * 2, dtype=object)},
    "shapes": {"mu": GOOD, "logvar": GOOD[:1]},
    "not finite": {"mu": GOOD * np.nan, "logvar": GOOD},
}


def posterior(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar of a volume."""
    mu, logvar = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(number))
    return mu, logvar


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Six volumes; labels 0 and 1, a text, none."""
    folder = tmp_path / "arrays"
    folder.mkdir()
    labels: list[dict[str, Any]] = [{"label": 0}, {"label": 1}, {"label": "patient"}, {}, {"label": -1}, {"label": 0}]
    for number, label in enumerate(labels):
        mu, logvar = posterior(number)
        np.savez(folder / f"scan{number}.npz", mu=mu.double().numpy(), logvar=logvar.numpy(), **label)
    return folder


def test_arrays_become_latents_and_pickles(arrays: Path, tmp_path: Path) -> None:
    """A finished folder with the subjects' splits, and from it pickles of float32 arrays with the labels' own types."""
    latents, out = tmp_path / "latents", tmp_path / "out"
    assert import_folder(str(arrays), str(latents), val_fraction=0.5) == 6
    data = LatentDataset(latents, draw="mean", scaling="raw", check_hashes=True)
    assert [item["label"] for item in data] == ["0", "1", "patient", "", "-1", "0"]
    assert all(torch.equal(data[number]["latent"], posterior(number)[0]) for number in range(6))
    assert [entry["split"] for entry in read_manifest(latents)] == [split_of(f"scan{n}", 0.5) for n in range(6)]
    assert torch.equal(read_latent(latent_path(latents, "scan3")).logvar, posterior(3)[1])
    with pytest.raises(InputError, match="holds latents already"):
        import_folder(str(arrays), str(latents))
    assert export_folder(str(latents), str(out)) == 6
    assert sorted(path.name for path in out.iterdir()) == [f"scan{number}.pkl" for number in range(6)]
    for number, label in enumerate([0, 1, "patient", "", -1, 0]):
        content = pickle.loads((out / f"scan{number}.pkl").read_bytes())
        assert list(content) == ["mu", "logvar", "label"] and content["label"] == label
        assert type(content["label"]) is type(label)
        for key, expected in zip(("mu", "logvar"), posterior(number), strict=True):
            assert content[key].dtype == np.float32 and np.array_equal(content[key], expected)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_is_no_latent_is_named(case: str, tmp_path: Path) -> None:
    """And no folder is finished."""
    np.savez(tmp_path / "x.npz", **DAMAGED[case])
    with pytest.raises(InputError, match=r"x\.npz"):
        import_folder(str(tmp_path), str(tmp_path / "latents"))
    assert not (tmp_path / "latents" / "manifest.jsonl").exists()


def test_the_command_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    """Exit code 2, no traceback."""
    command = [sys.executable, "-m", "scripts.convert_latents", "import_folder", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "no .npz file" in done.stderr
