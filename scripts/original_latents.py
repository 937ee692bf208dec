"""Exchange with the original system, which keeps one Python pickle a volume: {"mu", "logvar", "label"}.

The converters of latents use it, in both directions. The one idea: a pickle is a program, so none of its names is ever
looked up; the few that arrays need stand for functions of this module, which read plain bytes and shapes. Everything
else is refused before it could run.

Source: https://docs.python.org/3/library/pickle.html#restricting-globals.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.errors import InputError
from scripts.files import replacing
from scripts.latent_statistics import LOGVAR_RANGE

__all__ = ["convert_from_original", "read_original", "write_original"]

SUFFIXES = (".pkl", ".pickle")
MOST_VALUES = 10**9  # a hundred times more than any latent
ZIP_MAGIC = b"PK\x03\x04"  # what torch.save writes since version 1.6
OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first of the several pickles that older ones write


def read_original(path: str | Path) -> dict[str, Any]:
    """Read one file of the original system without executing anything that it may hold.

    Args:
        path: a pickle (protocols 2 to 5) or a `torch.save` file of a dict with mu and logvar, numpy arrays or torch
            tensors, (C, D, H, W) or with a batch axis of 1, and label, a whole number or a text; a missing label or
            None is "".

    Returns:
        mu and logvar, each (C, D, H, W) float32, logvar clamped to [-30, 20]; label as a text.

    Raises:
        InputError: the file is missing or damaged, holds code, or is no such dict; an array is not of finite real
            numbers, or the two differ in shape.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a latent of the original system.")
    try:
        content = _load(path)
    except _HoldsCodeError as error:
        raise InputError(
            f"{path} holds code or objects ({error}), which are never run; ask for a file of numpy arrays alone."
        ) from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # a damaged file makes a reader raise nearly anything
        raise InputError(f"{path} is damaged or no latent of the original system; copy it again.") from error
    if not isinstance(content, Mapping) or not {"mu", "logvar"} <= content.keys():
        raise InputError(f"{path} is no dict with mu, logvar and label; export it from the original system again.")
    mu, logvar = (_as_tensor(content[key], path, key) for key in ("mu", "logvar"))
    if mu.shape != logvar.shape:
        raise InputError(f"{path} has mu of {_by(mu.shape)} and logvar of {_by(logvar.shape)}; they must be equal.")
    return {"mu": mu, "logvar": logvar.clamp(*LOGVAR_RANGE), "label": _as_label(content.get("label"), path)}


def write_original(path: str | Path, mu: torch.Tensor, logvar: torch.Tensor, label: int | str) -> None:
    """Write one file for the original system, whole or not at all: float32 numpy arrays, pickle protocol 4.

    numpy 2 names its modules anew in pickles, so the reader needs numpy 1.26 or newer.

    Args:
        path: the file, `.pkl` or `.pickle`.
        mu: posterior mean (C, D, H, W).
        logvar: log of the posterior's variance, the same shape.
        label: kept as it is.

    Raises:
        ValueError: the shapes differ or are others, or a value is not finite.
        InputError: the folder cannot be written to.
    """
    if mu.ndim != 4 or mu.shape != logvar.shape:
        raise ValueError(f"mu and logvar must be (C, D, H, W) alike, got {tuple(mu.shape)} and {tuple(logvar.shape)}.")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"label must be a whole number or a text, got {label!r}.")
    mean, log_variance = (np.ascontiguousarray(t.detach().cpu().float().numpy()) for t in (mu, logvar))
    if not np.isfinite(mean).all() or not np.isfinite(log_variance).all():
        raise ValueError("mu and logvar must be finite in float32.")
    content = {"mu": mean, "logvar": log_variance, "label": label}
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(content, protocol=4))


def convert_from_original(folder_in: str | Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, str]]:
    """The latents of a folder of the original system, one at a time, sorted by file name.

    Args:
        folder_in: folder of `.pkl` and `.pickle` files; subfolders and hidden files are left out.

    Returns:
        Iterator of name (the file's stem), mu and logvar (C, D, H, W) float32, and label; each file is read, and
        checked as in `read_original`, when its turn comes.

    Raises:
        InputError: at once if there is no such folder or no file in it, or two files have one stem.
    """
    folder = Path(folder_in)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [p for p in found if p.suffix in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not files:
        raise InputError(f"{folder} is no folder with {' or '.join(SUFFIXES)} files; give that of the original system.")
    stems = [file.stem for file in files]
    twice = next((file for file in files if stems.count(file.stem) > 1), None)
    if twice:
        raise InputError(f"{folder} holds {twice.stem} with two endings; remove or rename one of them.")
    return _read_each(files)


def _read_each(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, str]]:
    for file in files:
        content = read_original(file)
        yield file.stem, content["mu"], content["logvar"], content["label"]


class _HoldsCodeError(Exception):
    """A pickle asks for a name that arrays do not need."""


class _Unpickler(pickle.Unpickler):
    """Unpickler that hands out the stand-ins of this module and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in of a name; `_HoldsCodeError` if there is none."""
        if f"{module}.{name}" not in STAND_INS:
            raise _HoldsCodeError(f"{module}.{name}"[:80])
        return STAND_INS[f"{module}.{name}"]


class _Call:
    """A function that a pickle may call, but, unlike a bare one, not change."""

    __slots__ = ("__call",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__call = function

    def __call__(self, *args: Any) -> Any:
        return self.__call(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a pickle changes a function")


class _Dtype:
    """Stand-in of numpy's dtype: real numbers and texts only, as what it says could else be taken for pointers."""

    __slots__ = ("dtype",)

    def __init__(self, text: str, *_align_and_copy: object) -> None:
        if not isinstance(text, str) or not re.fullmatch(r"[<>=|]?[bfiuU]\d{1,4}", text):
            raise InputError(f"holds values of type {str(text)[:40]!r}; export real numbers.")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple) -> None:
        order, parts = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts):
            raise pickle.UnpicklingError("a compound dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in of an array or tensor: its values, filled in by the state where the pickle keeps them apart."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray | torch.Tensor | None = None) -> None:
        self.values = values

    def __setstate__(self, state: tuple) -> None:
        _version, shape, dtype, is_fortran, raw = state
        self.values = _from_bytes(raw, dtype, shape, "F" if is_fortran else "C").values


def _from_bytes(
    raw: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> _Array:
    """numpy's `_frombuffer`; later versions give the order of the axes in memory."""
    values = np.frombuffer(raw, dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return _Array(values if axes is None else values.transpose(axes))


def _scalar(dtype: _Dtype, raw: bytes) -> Any:
    return np.frombuffer(raw, dtype=dtype.dtype, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """`codecs.encode`, by which protocol 2 keeps bytes, for the one encoding it uses."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("bytes in another encoding than latin1")
    return text.encode("latin1")


def _storage(raw: bytes) -> _Array:
    """torch's `_load_from_bytes`, restricted: a storage as a tensor of one axis."""
    storage = _torch_load(io.BytesIO(raw))
    return _Array(torch.tensor([], dtype=storage.dtype).set_(storage))


def _strided(storage: _Array, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_rest: object) -> _Array:
    """torch's `_rebuild_tensor_v2`; `as_strided` refuses what lies outside the storage."""
    if not torch.is_tensor(storage.values):
        raise pickle.UnpicklingError("a tensor without storage")
    return _Array(storage.values.as_strided(size, stride, offset))


NUMPY_STAND_INS: dict[str, Any] = {
    "numpy.ndarray": _Call(lambda *_: _Array()),
    "numpy.dtype": _Call(_Dtype),
    "_codecs.encode": _Call(_encode),
    **{f"numpy.{core}.multiarray._reconstruct": _Call(lambda *_: _Array()) for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Call(_scalar) for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Call(_from_bytes) for core in ("core", "_core")},
}
STAND_INS: dict[str, Any] = {
    **NUMPY_STAND_INS,
    "collections.OrderedDict": _Call(dict),
    "torch.storage._load_from_bytes": _Call(_storage),
    "torch._utils._rebuild_tensor_v2": _Call(_strided),
    "torch._utils._rebuild_parameter": _Call(lambda tensor, *_: tensor),
}
# torch's own restricted unpickler gets numpy's names alone; the classes may be given a state.
TORCH_GLOBALS: list[Any] = [(stand_in, name) for name, stand_in in NUMPY_STAND_INS.items()] + [_Array, _Dtype]


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_torch = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        file.seek(0)
        content = OLD_TORCH_MAGIC if is_torch else _Unpickler(file).load()
    if content != OLD_TORCH_MAGIC:
        return content
    with torch.serialization.safe_globals(TORCH_GLOBALS):
        return _torch_load(path)


def _torch_load(source: Path | io.BytesIO) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|Unsupported (?:global|class)):? (\S+)", str(error))
        if name is None:
            raise
        raise _HoldsCodeError(name.group(1)[:80]) from error


def _as_tensor(value: Any, path: Path, key: str) -> torch.Tensor:
    values = value.values if isinstance(value, _Array) else value
    if not isinstance(values, (np.ndarray, torch.Tensor)):
        raise InputError(f"{path} holds no array as '{key}'; export it from the original system again.")
    if len(values.shape) == 5 and values.shape[0] == 1:
        values = values[0]
    if len(values.shape) != 4 or not 0 < math.prod(values.shape) <= MOST_VALUES:
        raise InputError(f"{path} has '{key}' of shape {_by(values.shape)}; one latent is channels x D x H x W.")
    tensor = _real(values)
    if tensor is None or not torch.isfinite(tensor).all():
        raise InputError(f"{path} has values in '{key}' that are not finite real numbers; encode the scan again.")
    return tensor


def _real(values: np.ndarray | torch.Tensor) -> torch.Tensor | None:
    """The values as float32, contiguous; None if they are no real numbers."""
    if isinstance(values, np.ndarray):
        with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is reported
            return torch.from_numpy(np.array(values, np.float32, order="C")) if values.dtype.kind in "fiu" else None
    if values.is_complex() or values.is_quantized or values.is_meta or values.layout != torch.strided:
        return None
    return values.detach().to(torch.float32).contiguous()


def _as_label(value: Any, path: Path) -> str:
    label = value.values if isinstance(value, _Array) else value
    if isinstance(label, (np.ndarray, torch.Tensor)) and math.prod(label.shape) == 1:
        label = label.reshape(-1)[0].item()
    if label is None:
        return ""
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise InputError(f"{path} has a {type(label).__name__} as label; give a whole number or a text.")
    return str(label)


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one value"
