"""Latents of every format: read exactly, checked against what the config says, and never run."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scripts.latents import LatentScaling, LoadLatentd, list_latents, read_tensor, to_raw
from scripts.run import InputError

SHAPE = [4, 4, 6, 4]
PADDED = [4, 4, 8, 4]
STATISTICS = {
    "scale_factor": {"channel": [0.5, 2.0, 1.0, 4.0], "overall": 0.75},
    "shift": {"channel": [1.0, -2.0, 0.0, 3.0], "overall": 0.5},
}


def latent(shape: list[int] | None = None) -> torch.Tensor:
    """A latent."""
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(0))


def save(path: Path, z: torch.Tensor) -> None:
    """Write a latent in the format of the ending."""
    array = z.numpy()
    if path.suffix == ".safetensors":
        save_file({"z": z, "other": torch.zeros(1)}, path)
    elif path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, latent=array, other=np.zeros(1))
    elif path.suffix in (".pt", ".pth"):
        torch.save({"latent": z, "other": torch.zeros(1)} if path.suffix == ".pt" else z, path)
    else:
        nib.save(nib.Nifti1Image(np.moveaxis(array, 0, -1), np.eye(4)), path)


ENDINGS = [".safetensors", ".npy", ".npz", ".pt", ".pth", ".nii", ".nii.gz"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_is_read(ending: str, tmp_path: Path) -> None:
    """Bit by bit."""
    save(tmp_path / f"x{ending}", latent())
    assert torch.equal(read_tensor(tmp_path / f"x{ending}"), latent())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("content", [b"", b"<html>no such page</html>"], ids=["empty", "html"])
def test_a_damaged_file_is_named(ending: str, content: bytes, tmp_path: Path) -> None:
    """Whatever its reader raises."""
    (tmp_path / f"x{ending}").write_bytes(content)
    with pytest.raises(InputError, match=f"x{ending}"):
        read_tensor(tmp_path / f"x{ending}")


@pytest.mark.parametrize("ending", [".npy", ".pt"])
def test_a_pickle_is_not_run(ending: str, tmp_path: Path) -> None:
    """numpy's object arrays and torch's old format are pickles."""

    class Trap:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'sentinel')!r}, 'w')",)

    if ending == ".npy":
        np.save(tmp_path / "x.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    else:
        (tmp_path / "x.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="x"):
        read_tensor(tmp_path / f"x{ending}")
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("fault", ["terabytes", "no syntax"])
def test_a_damaged_header_is_not_allocated(fault: str, tmp_path: Path) -> None:
    """A .npy that declares 1e12 values and holds none, and one whose header breaks off."""
    with (tmp_path / "x.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (10**4,) * 3})
    if fault == "no syntax":
        content = (tmp_path / "x.npy").read_bytes()
        (tmp_path / "x.npy").write_bytes(content.replace(b"(10000, ", b"(((((((("))
    with pytest.raises(InputError, match=r"x\.npy"):
        read_tensor(tmp_path / "x.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    """A diffusion model that diverged."""
    z = latent()
    z[0, 0, 0, 0] = value
    save(tmp_path / "x.npy", z)
    with pytest.raises(InputError, match="NaN"):
        read_tensor(tmp_path / "x.npy")


def test_complex_numbers_and_unnamed_tensors_are_refused(tmp_path: Path) -> None:
    """Nothing is guessed."""
    np.save(tmp_path / "c.npy", np.zeros(SHAPE, dtype=complex))
    with pytest.raises(InputError, match="real numbers"):
        read_tensor(tmp_path / "c.npy")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="a, b"):
        read_tensor(tmp_path / "x.safetensors")


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["raw", "channel", "overall"])
def test_what_was_done_is_undone(kind: str, padded: bool, batch: bool) -> None:
    """Scaling, padding, and a batch axis of one."""
    scaling = LatentScaling(kind, STATISTICS, pad=padded)
    given = scaling.apply(latent())
    found = to_raw(given[None] if batch else given, "x", SHAPE, padded, scaling)
    torch.testing.assert_close(found, latent(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "padded", "message"),
    [
        (PADDED, False, "set 'padded' to True"),
        (SHAPE, True, "set 'padded' to False"),
        ([4, 4, 6, 5], False, "is 4 x 4 x 6 x 5"),
        ([2, *SHAPE], False, "one latent a file"),
    ],
)
def test_another_shape_is_refused(shape: list[int], padded: bool, message: str) -> None:
    """With what to set, where that would do."""
    with pytest.raises(InputError, match=message):
        to_raw(latent(shape), "x.npy", SHAPE, padded, LatentScaling("raw"))


def test_scaled_latents_need_statistics() -> None:
    """The key is named."""
    with pytest.raises(InputError, match="latent_stats"):
        LoadLatentd("latent", SHAPE, scaling="channel")


def test_names_are_unique(tmp_path: Path) -> None:
    """Stems less `_latent`; folders before equal stems; the ending where even those are equal; no hidden files."""
    for name in ("a/x_latent.safetensors", "b/x.npy", "y.npy", "y.pt", ".hidden.npy", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = {Path(record["file"]).name: record["name"] for record in list_latents(tmp_path)}
    assert names == {"x_latent.safetensors": "a_x", "x.npy": "b_x", "y.npy": "y_npy", "y.pt": "y_pt"}


@pytest.mark.parametrize("name", ["missing.npy", "note.txt", "empty"])
def test_a_place_without_latents_is_said(name: str, tmp_path: Path) -> None:
    """A missing file, another kind of file, an empty folder."""
    (tmp_path / "note.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        list_latents(tmp_path / name)
