"""Folders of latents from numpy files, and to the original system's pickles."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.cohort import split_of
from scripts.convert_latents import export_folder, import_folder
from scripts.latents import LatentDataset, latent_path, read_latent, read_manifest
from scripts.run import InputError

GOOD = np.zeros((4, 2, 3, 2), np.float32)
LABELS: list[int | str] = [0, "patient", "", -1]


def posterior(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar of a volume."""
    mu, logvar = torch.randn(2, *GOOD.shape, generator=torch.Generator().manual_seed(number))
    return mu, logvar


def test_arrays_become_latents_and_pickles(tmp_path: Path) -> None:
    """A finished folder with the subjects' splits, and from it pickles of float32 arrays with the labels' own types."""
    arrays, latents, out = (tmp_path / name for name in ("arrays", "latents", "out"))
    arrays.mkdir()
    for number, label in enumerate(LABELS):
        mu, logvar = posterior(number)
        more = {} if label == "" else {"label": label}
        np.savez(arrays / f"scan{number}.npz", mu=mu.double().numpy(), logvar=logvar.numpy(), **more)
    assert import_folder(str(arrays), str(latents), val_fraction=0.5) == 4
    data = LatentDataset(latents, draw="mean", scaling="raw", check_hashes=True)
    assert [item["label"] for item in data] == [str(label) for label in LABELS]
    assert all(torch.equal(data[number]["latent"], posterior(number)[0]) for number in range(4))
    assert [entry["split"] for entry in read_manifest(latents)] == [split_of(f"scan{n}", 0.5) for n in range(4)]
    assert torch.equal(read_latent(latent_path(latents, "scan3")).logvar, posterior(3)[1])
    with pytest.raises(InputError, match="holds latents already"):
        import_folder(str(arrays), str(latents))
    assert export_folder(str(latents), str(out)) == 4
    assert sorted(path.name for path in out.iterdir()) == [f"scan{number}.pkl" for number in range(4)]
    for number, label in enumerate(LABELS):
        content = pickle.loads((out / f"scan{number}.pkl").read_bytes())
        assert content["label"] == label and type(content["label"]) is type(label)
        for key, expected in zip(("mu", "logvar"), posterior(number), strict=True):
            assert content[key].dtype == np.float32 and np.array_equal(content[key], expected)


@pytest.mark.parametrize("arrays", [{"mu": GOOD}, {"mu": GOOD * np.nan, "logvar": GOOD}])
def test_a_file_that_is_no_latent_is_named(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    """And no folder is finished."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError, match=r"x\.npz"):
        import_folder(str(tmp_path), str(tmp_path / "latents"))
    assert not (tmp_path / "latents" / "manifest.jsonl").exists()
