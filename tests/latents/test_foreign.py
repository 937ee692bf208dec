"""Latents of every format: read exactly, and checked against what the config says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_scaling import STATISTICS

from scripts.latents import LatentScaling, LoadLatentd, list_latents, read_tensor, to_raw
from scripts.run import InputError

SHAPE = [4, 4, 6, 3]
Z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
NOT_FINITE = Z.masked_fill(Z > 2, torch.inf)
ENDINGS = [".safetensors", ".npy", ".npz", ".pt", ".pth", ".nii", ".nii.gz"]


def save(path: Path, z: torch.Tensor) -> None:
    """Write a latent in the format of the ending, beside another entry where there can be one."""
    array = z.numpy()
    if path.suffix == ".safetensors":
        save_file({"z": z, "other": torch.zeros(1)}, path)
    elif path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, latent=array, other=np.zeros(1))
    elif path.suffix in (".pt", ".pth"):
        torch.save({"mu": z, "other": torch.zeros(1)} if path.suffix == ".pt" else z, path)
    else:
        nib.save(nib.Nifti1Image(np.moveaxis(array, 0, -1), np.eye(4)), path)


# file, how it is written, what the error says besides its name
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("x.npy", lambda path: None, "is no latent file"),
    "not finite": ("x.npy", lambda path: save(path, NOT_FINITE), "NaN"),
    "expanded": ("x.pt", lambda path: torch.save(torch.zeros(1).expand(10**12), path), "declares"),
    "unnamed": ("x.safetensors", lambda path: save_file({"a": Z, "b": Z + 1}, path), "a, b"),
    "3D image": ("x.nii", lambda path: nib.save(nib.Nifti1Image(Z[0].numpy(), np.eye(4)), path), "fourth axis"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_is_read(ending: str, tmp_path: Path) -> None:
    """Bit by bit, float32, whatever stands beside it; half a file is named."""
    path = tmp_path / f"x{ending}"
    save(path, Z)
    found = read_tensor(path)
    assert torch.equal(found, Z) and found.dtype == torch.float32
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=f"x{ending}"):
        read_tensor(path)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_latent_is_named(case: str, tmp_path: Path) -> None:
    """Nothing is guessed, and nothing that a header declares is allocated."""
    name, write, message = REFUSED[case]
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} .*{message}"):
        read_tensor(tmp_path / name)


@pytest.mark.parametrize(("batch", "padded"), [(False, "no"), (True, "yes")])
def test_what_was_done_is_undone(batch: bool, padded: str, tmp_path: Path) -> None:
    """Scaling, padding and a batch axis of one, as `decode.json` says them."""
    (tmp_path / "latent_stats.json").write_text(json.dumps(STATISTICS))
    given = LatentScaling("channel", STATISTICS, pad=padded == "yes").apply(Z)
    save(tmp_path / "x.npy", given[None] if batch else given)
    load = LoadLatentd("latent", SHAPE, padded, "channel", str(tmp_path / "latent_stats.json"))
    torch.testing.assert_close(load({"latent": str(tmp_path / "x.npy")})["latent"], Z, rtol=1e-5, atol=1e-5)


def test_another_shape_is_refused() -> None:
    """With what to set, where that would do."""
    raw = LatentScaling("raw")
    for shape, padded, message in (
        ([4, 4, 8, 4], False, "set 'padded' to True"),
        (SHAPE, True, "set 'padded' to False"),
        ([2, *SHAPE], False, "one latent a file"),
    ):
        with pytest.raises(InputError, match=message):
            to_raw(torch.zeros(shape), "x.npy", SHAPE, padded, raw)


def test_names_are_unique(tmp_path: Path) -> None:
    """Stems less `_latent`; folders before equal stems; the ending where even those are equal; no hidden files."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for file in ("a/x_latent.safetensors", "b/x.npy", "y.npy", "y.pt", ".h.npy", "n.txt"):
        (tmp_path / file).touch()
    assert [record["name"] for record in list_latents(tmp_path)] == ["a_x", "b_x", "y_npy", "y_pt"]
    (tmp_path / "b_x.npy").touch()  # outputs would overwrite each other
    with pytest.raises(InputError, match="would get one name"):
        list_latents(tmp_path)
