"""Weights read without running what a file may hold, and loaded strictly: every name and every shape must fit."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scripts.run import InputError

__all__ = ["UNREADABLE", "is_packed", "load_state", "load_weights", "read_state_dict"]

# What torch's restricted unpickler and safetensors raise for files that are cut off or of another kind.
UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError, struct.error,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict without executing anything that the file may hold.

    Args:
        path: a `.safetensors` file, or a `torch.save` file that holds a state dict, bare or under the key `model`.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        InputError: the file is missing, is not a weights file, or holds something else than tensors.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"'weights' is {path!r}; give the path of a weights file.")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a weights file as 'weights'.")
    try:
        if path.suffix == ".safetensors":
            return _real_numbers(load_file(path), path)
        if is_packed(path):
            raise ValueError("a compressed archive, which torch.save never writes")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged or no weights file; copy it again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise InputError(f"{path} holds no state dict (names to tensors); export the network's state_dict().")
    return _real_numbers(content, path)


def _real_numbers(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The state dict, if its tensors hold finite real numbers; with others a network gives black or nothing."""
    for name, tensor in state.items():
        has_values = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        # one number of an expanded tensor is all that it has, however many it declares
        if not has_values or tensor.is_complex() or not torch.isfinite(_stored(tensor)).all():
            raise InputError(f"{path}: '{name}' holds NaN, infinite, complex or no values; export the weights again.")
    return dict(state)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load weights strictly: every name and every shape must fit.

    Args:
        network: the network to fill, in place.
        path: see `read_state_dict`.

    Returns:
        The network.

    Raises:
        InputError: the file cannot be read, or is of another architecture.
    """
    return load_state(network, read_state_dict(path), path)


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> nn.Module:
    """`load_weights` of a state dict that has been read already; `path` is where from, for the message."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if missing or unknown or reshaped:
        example = (
            f"'{reshaped[0]}' is {tuple(state[reshaped[0]].shape)} there and {tuple(own[reshaped[0]].shape)} here"
            if reshaped
            else f"'{missing[0]}' is missing"
            if missing
            else f"'{unknown[0]}' is not known here"
        )
        raise InputError(
            f"{path} is of another architecture than network_def: {len(missing)} missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape ({example}); use the config that trained it, or an overlay such as "
            "configs/maisi.json."
        )
    network.load_state_dict(state)
    return network


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file of `torch.save` holds compressed parts: torch writes none, and they could unpack to any size."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
