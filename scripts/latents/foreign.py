"""Latents from anywhere, for decoding: this bundle's files, or what a diffusion model has written.

`decode.json` lists them with `list_latents` and reads them with `LoadLatentd`. Nothing is guessed. What
was done to a latent (scaling, padding) is said in the config and checked against its shape, and no format is read in a
way that could run code.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from safetensors import safe_open

from scripts.latents.scaling import LatentScaling, padded_shape
from scripts.latents.storage import read_statistics
from scripts.networks import is_packed
from scripts.run import InputError, as_flag
from scripts.transforms import misplaced_voxels, read_voxels

__all__ = ["LoadLatentd", "list_latents", "read_tensor", "to_raw"]

NAMES = ("mu", "z", "latent")
MOST_VALUES = 10**8  # several times more than any latent; what a damaged header declares is not allocated
MOST_HEADER = 1 << 20  # bytes


def list_latents(path: str | Path) -> list[dict[str, str]]:
    """Latent files as records.

    Args:
        path: a file, or a folder that is searched with its subfolders.

    Returns:
        Dicts with latent and file (both the path) and name: the file's stem less `_latent`, with its folders before it
        where two files share it.

    Raises:
        InputError: the path does not exist, no latent file is there, or two of them would share a name.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".") and _suffix(p))
    else:
        files = [path] if path.is_file() and _suffix(path) else []
    if not files:
        kinds = ", ".join(READERS)
        raise InputError(f"{path} is no latent file and no folder of them ({kinds}); give it in 'dataset_dir'.")
    unreadable = next((file for file in files if re.search(r"[\ud800-\udfff]", str(file))), None)
    if unreadable:  # could be written into no report
        raise InputError(f"{ascii(str(unreadable))} is not UTF-8; rename it.")
    stems = [_stem(file) for file in files]
    shared = Counter(stems)
    records = []
    for file, stem in zip(files, stems, strict=True):
        parts = file.relative_to(path).parent.parts if shared[stem] > 1 and path.is_dir() else ()
        records.append({"latent": str(file), "file": str(file), "name": "_".join((*parts, stem))})
    names = Counter(record["name"] for record in records)
    for record in records:  # x.npy beside x.pt
        if names[record["name"]] > 1:
            record["name"] += "_" + _suffix(Path(record["file"]))[1:].replace(".", "_")
    names = Counter(record["name"] for record in records)
    twice = [record["file"] for record in records if names[record["name"]] > 1]
    if twice:  # a/x.npy beside a_x.npy
        raise InputError(f"{twice[0]} and {twice[1]} would get one name; rename one of them.")
    return records


def read_tensor(path: str | Path) -> torch.Tensor:
    """The tensor of a file, float32, as it is found.

    Args:
        path: `.safetensors`, `.npy`, `.npz`, `.pt`, `.pth`, `.nii` or `.nii.gz` (channels last there).

    Raises:
        InputError: the file cannot be read, declares more than 1e8 values, holds none or several tensors without one
            named mu, z or latent, or values that are not finite real numbers.
    """
    path = Path(path)
    if not path.is_file() or not _suffix(path):
        raise InputError(f"{path} is no latent file ({', '.join(READERS)}); check the path.")
    try:
        content = READERS[_suffix(path)](path)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes a reader raise nearly anything
        detail = re.sub(r" object at 0x\w+", "", " ".join(str(error).split()))[:120]
        raise InputError(
            f"{path} is damaged or no {_suffix(path)} file of a latent ({detail}); copy it again."
        ) from error
    tensor = torch.as_tensor(content)
    if tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool:
        raise InputError(f"{path} holds {tensor.dtype} values; a latent is of real numbers.")
    tensor = tensor.to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path} holds NaN or infinite values; sample it again.")
    return tensor


def to_raw(
    tensor: torch.Tensor, path: str | Path, shape: Sequence[int], padded: bool, scaling: LatentScaling
) -> torch.Tensor:
    """Bring a tensor back to the raw latent.

    Args:
        tensor: (C, D, H, W), or with a batch axis of 1.
        path: where it is from, for the error.
        shape: of the raw latent, (C, D, H, W).
        padded: whether the sides are padded to multiples of 4.
        scaling: what was done to it.

    Returns:
        (C, D, H, W) float32.

    Raises:
        InputError: the shape differs from what was said.
    """
    if tensor.ndim == 5 and tensor.shape[0] == 1:
        tensor = tensor[0]
    found, raw = list(tensor.shape), list(shape)
    with_padding = [raw[0], *padded_shape(raw[1:])]
    expected, other = (with_padding, raw) if padded else (raw, with_padding)
    if found == expected:
        return scaling.undo(tensor, raw[1:])
    if found == other:
        raise InputError(f"{path} is {_by(found)}; set 'padded' to {not padded}.")
    one = " Save one latent a file." if tensor.ndim == 5 else ""
    raise InputError(f"{path} is {_by(found)}; a latent of this network is {_by(expected)} here.{one}")


class LoadLatentd(MapTransform):
    """Read the latent of each key's path, raw: (C, D, H, W) float32.

    Args:
        keys: keys that hold paths.
        shape: of the raw latent, (C, D, H, W).
        padded: whether the files are padded to multiples of 4.
        scaling: `raw`, `channel` or `overall`: what was done to the files.
        latent_stats: the `latent_stats.json` they were scaled by; "" for raw ones.

    Raises:
        InputError: an argument is none of its values, or the statistics are missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        shape: Sequence[int],
        padded: bool | str = False,
        scaling: str = "raw",
        latent_stats: str = "",
    ) -> None:
        super().__init__(keys)
        self.shape = list(shape)
        self.padded = as_flag(padded, "padded")
        self.scaling = LatentScaling(scaling, read_statistics(latent_stats) if latent_stats else None)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace each path by its latent."""
        loaded: dict[Hashable, Any] = dict(data)
        for key in self.key_iterator(loaded):
            path = loaded[key]
            loaded[key] = to_raw(read_tensor(path), path, self.shape, self.padded, self.scaling)
        return loaded


def _from_safetensors(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        name = _choose(path, list(file.keys()))
        _check_size(path, file.get_slice(name).get_shape())
        return file.get_tensor(name)


def _from_npy(path: Path) -> np.ndarray:
    with path.open("rb") as stream:
        start = stream.read(12)
    if start[6:7] > b"\1" and int.from_bytes(start[8:], "little") > MOST_HEADER:  # read whole before it is looked at
        raise InputError(f"{path} declares a header of {int.from_bytes(start[8:], 'little')} bytes; copy it again.")
    return _checked_array(path, np.load(path, mmap_mode="r", allow_pickle=False))


def _from_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        name = _choose(path, arrays.files)
        with arrays.zip.open(f"{name}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            declared, _, dtype = read(stream)
            _check_size(path, (*declared, dtype.itemsize // 4 or 1))  # a single text can be of any length
        return _checked_array(path, arrays[name])


def _from_torch(path: Path) -> torch.Tensor:
    if is_packed(path):
        raise InputError(f"{path} is a compressed archive, which torch.save never writes; save it again.")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        content = {str(key): value for key, value in content.items()}
        content = content[_choose(path, list(content))]
    if not torch.is_tensor(content):
        raise InputError(f"{path} holds {type(content).__name__}, no tensor; save the latent alone.")
    if content.layout != torch.strided or content.is_meta:
        raise InputError(f"{path} holds a tensor that is sparse or without values; save it dense.")
    _check_size(path, content.shape)  # an expanded tensor is small in the file alone
    return content.detach()


def _from_nifti(path: Path) -> np.ndarray:
    if reason := misplaced_voxels(path):
        raise InputError(f"{path} {reason}")
    image: Any = nib.load(path)
    _check_size(path, image.shape)
    if image.get_data_dtype().kind not in "fiu":  # as float32, complex values would lose their imaginary part
        raise InputError(f"{path} holds {image.get_data_dtype()} values; a latent is of real numbers.")
    values = read_voxels(image, path)
    if values.ndim == 5 and values.shape[3] == 1:
        values = values[:, :, :, 0]
    if values.ndim != 4:
        raise InputError(f"{path} is {_by(values.shape)}; a latent has its channels in the fourth axis.")
    return np.ascontiguousarray(np.moveaxis(values, -1, 0))


READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _from_safetensors,
    ".npy": _from_npy,
    ".npz": _from_npz,
    ".pt": _from_torch,
    ".pth": _from_torch,
    ".nii": _from_nifti,
    ".nii.gz": _from_nifti,
}


def _suffix(path: Path) -> str:
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), "")


def _stem(path: Path) -> str:
    return path.name.removesuffix(_suffix(path)).removesuffix("_latent")


def _choose(path: Path, names: Sequence[str]) -> str:
    named = [name for name in NAMES if name in names]
    if not named and len(names) != 1:
        raise InputError(f"{path} holds {', '.join(names) or 'nothing'}; name the latent mu, z or latent.")
    return (named or list(names))[0]


def _check_size(path: Path, shape: Sequence[int]) -> None:
    if math.prod(int(side) for side in shape) > MOST_VALUES:
        raise InputError(f"{path} declares {_by(shape)} values, which is no latent; copy it again.")


def _checked_array(path: Path, array: np.ndarray) -> np.ndarray:
    _check_size(path, array.shape)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path} holds {array.dtype} values; a latent is of real numbers.")
    return np.array(array, dtype=np.float32)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
