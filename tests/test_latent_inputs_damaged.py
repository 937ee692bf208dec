"""Latents whose files are damaged in ways that readers do not foresee, and MONAI's own padding."""

from __future__ import annotations

import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import CenterSpatialCrop, SpatialPad
from safetensors.torch import save_file

from scripts.latents import LatentScaling, list_latents, padded_shape, read_tensor, to_raw
from scripts.run import InputError

VALUES = np.random.default_rng(0).normal(size=(4, 6, 5, 3)).astype(np.float32)


def save(path: Path, values: np.ndarray = VALUES) -> bytes:
    """Write values in the format of the ending; gives the file's bytes."""
    if path.suffix == ".safetensors":
        save_file({"z": torch.from_numpy(values)}, path)
    elif path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez_compressed(path, z=values)
    elif path.suffix == ".pt":
        torch.save(torch.from_numpy(values), path)
    else:
        nib.save(nib.Nifti1Image(np.moveaxis(values, 0, -1), np.eye(4)), path)
    return path.read_bytes()


@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz"])
def test_damage_anywhere_is_named(ending: str, tmp_path: Path) -> None:
    """Files cut at twenty places, and with a stretch of bytes overwritten, end in one sentence or are read."""
    path = tmp_path / f"x{ending}"
    raw = save(path)
    for place in range(0, len(raw) - 8, len(raw) // 20):
        path.write_bytes(raw[:place])
        with pytest.raises(InputError, match=f"x{ending}"):
            read_tensor(path)
        for byte in (b"\xff", b"\x77"):
            path.write_bytes(raw[:place] + byte * 8 + raw[place + 8 :])
            try:
                read_tensor(path)
            except InputError as error:
                assert f"x{ending}" in str(error)


@pytest.mark.parametrize("shape", [(10**12,), (2**62, 8), (10**30,), (-1, 3)])
def test_declared_sizes_are_not_allocated(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Headers of .npy, alone and in an archive, that declare what no memory holds."""
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(tmp_path / "x.npy", "z.npy")
    for name in ("x.npy", "x.npz"):
        with pytest.raises(InputError, match=name):
            read_tensor(tmp_path / name)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3) > 0],
    ids=["expanded", "sparse", "meta", "bool"],
)
def test_tensors_that_are_no_values_are_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    """What torch.save takes, and a latent is not."""
    torch.save(tensor, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt"):
        read_tensor(tmp_path / "x.pt")


def test_complex_images_are_refused(tmp_path: Path) -> None:
    """Read as float32 they would lose their imaginary part."""
    save(tmp_path / "x.nii", VALUES.astype(np.complex64))
    with pytest.raises(InputError, match="x.nii holds complex64"):
        read_tensor(tmp_path / "x.nii")


def test_images_of_vectors_and_the_only_entry(tmp_path: Path) -> None:
    """A fifth axis after one of size 1 (NIfTI's vectors), and a dict's only tensor under a key that is no text."""
    nib.save(nib.Nifti1Image(np.moveaxis(VALUES, 0, -1)[:, :, :, None], np.eye(4)), tmp_path / "x.nii.gz")
    torch.save({0: torch.from_numpy(VALUES)}, tmp_path / "x.pt")
    for name in ("x.nii.gz", "x.pt"):
        assert torch.equal(read_tensor(tmp_path / name), torch.from_numpy(VALUES))


@pytest.mark.parametrize("name", ["x.txt", "folder.npy", "missing.npy"])
def test_other_files_are_named(name: str, tmp_path: Path) -> None:
    """Another ending, a folder, nothing."""
    (tmp_path / "x.txt").touch()
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(InputError, match=f"{name} is no latent file"):
        read_tensor(tmp_path / name)


def test_names_that_would_meet_are_refused(tmp_path: Path) -> None:
    """A folder's name before a stem can be another file's stem: outputs would overwrite each other."""
    for name in ("a/x.npy", "b/x.npy", "a_x.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="one name"):
        list_latents(tmp_path)


@pytest.mark.parametrize("sides", [(28, 34, 28), (6, 4, 10)])
def test_padding_is_that_of_monais_latent_diffusion_inferer(sides: tuple[int, int, int]) -> None:
    """Padded by MONAI's SpatialPad, cropped here and by its CenterSpatialCrop: the same, and the latent itself."""
    z = torch.randn(4, *sides, generator=torch.Generator().manual_seed(0))
    padded = SpatialPad(padded_shape(sides))(z).as_tensor()
    found = to_raw(padded, "x", (4, *sides), True, LatentScaling("raw"))
    assert torch.equal(found, z)
    assert torch.equal(found, CenterSpatialCrop(sides)(padded).as_tensor())
