"""What is checked before anything is built: the keys on the command line, the device, the sizes of volumes.

Every config calls these first in `initialize`. MONAI itself takes a misspelt `--epoch 5` as a new key that nothing
reads, and the run would go on with the default.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.bundle import ConfigParser, run, update_kwargs
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from scripts.errors import InputError
from scripts.preflight import MOST_VOXELS, SPACING_MM

__all__ = [
    "check_count",
    "check_crop",
    "check_device",
    "check_size",
    "check_spacing",
    "read_keys",
    "refuse_unknown_keys",
]

LATENT_STRIDE = 4
RUN_KEYS = tuple(inspect.signature(run).parameters)  # of `monai.bundle run` itself


def refuse_unknown_keys(argv: Sequence[str]) -> None:
    """Make sure that every `--key` of a `monai.bundle run` names a key of its config files.

    Args:
        argv: `sys.argv`; anything but a `run` with `--config_file` passes unchecked.

    Raises:
        InputError: a key that no config file has, with the nearest one that exists.
    """
    keys = read_keys(argv)
    if "config_file" not in keys:
        return
    parser = ConfigParser(ConfigParser.load_config_files(keys["config_file"]))
    own = set(RUN_KEYS) | _tracking_keys(keys.get("tracking"))
    for key in keys:
        if key in own or key.startswith("+") or key in parser or key.replace("-", "_") in parser:
            continue
        near = difflib.get_close_matches(key, [name for name in parser.get() if isinstance(name, str)], n=1)
        hint = f"; did you mean --{near[0]}?" if near else "; the keys stand at the top of the config file."
        raise InputError(f"{keys['config_file']} has no key '{key}'{hint}")


def read_keys(argv: Sequence[str]) -> dict[str, Any]:
    """The keys of a `monai.bundle run` and their values, as Fire and MONAI understand them.

    Args:
        argv: `sys.argv`.

    Returns:
        Key without dashes to value, those of `--args_file` first; empty for anything but a `run`.
    """
    keys: dict[str, Any] = {}
    if "run" not in argv[1:2]:
        return keys
    for word, following in zip(argv[2:], [*argv[3:], "--"], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            keys[name[2:]] = _literal(value if equals else "True" if following.startswith("--") else following)
    return update_kwargs(keys["args_file"], ignore_none=False, **keys) if "args_file" in keys else keys


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _tracking_keys(settings: str | dict[str, Any] | None) -> set[str]:
    """Keys that `--tracking` adds to the config: those of MONAI's settings for MLflow, or of the file that it names."""
    if settings is None:
        return set()
    known: dict[str, Any] = DEFAULT_EXP_MGMT_SETTINGS.get(str(settings)) or ConfigParser.load_config_files(settings)
    return set(known.get("configs", {}))


def check_device(device: torch.device | str) -> None:
    """Make sure that the device is there.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".

    Raises:
        InputError: it is not.
    """
    try:
        if not isinstance(device, torch.device | str):
            raise TypeError("it is no text")
        torch.empty(1, device=device).tolist()  # a device without values, "meta", fails here
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"'device' is {str(device)!r}, which cannot be used here ({reason}); try --device cpu."
        ) from error


def check_size(size: Sequence[int], key: str) -> None:
    """Make sure that the network can code volumes of this size.

    Args:
        size: three sides in voxels.
        key: the config key, named in the error.

    Raises:
        InputError: not three positive multiples of 4, or more voxels than any scan has.
    """
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 3 or any(not isinstance(side, int) or side < 1 or side % LATENT_STRIDE for side in sides):
        raise InputError(f"'{key}' is {size!r}; give three positive multiples of {LATENT_STRIDE}.")
    if math.prod(sides) > MOST_VOXELS:
        raise InputError(f"'{key}' is {size!r}, more than {round(MOST_VOXELS ** (1 / 3))} cubed; give smaller sides.")


def check_crop(side: int, spatial_size: Sequence[int]) -> None:
    """Make sure that cubes of this side can be cut out of every volume.

    Args:
        side: in voxels; 0 for whole volumes.
        spatial_size: the volumes' sides.

    Raises:
        InputError: not 0, and no positive multiple of 4 within the smallest side; turned crops have to stay equal.
    """
    whole = not isinstance(side, bool) and isinstance(side, int) and side % LATENT_STRIDE == 0
    if not whole or not 0 <= side <= min(spatial_size):
        raise InputError(
            f"'crop_size' is {side!r}; give a multiple of {LATENT_STRIDE} up to the smallest side of 'spatial_size' "
            f"({min(spatial_size)}), or 0 for whole volumes."
        )


def check_spacing(spacing: float, key: str = "spacing") -> None:
    """Make sure that scans can be resampled to voxels of this size.

    Args:
        spacing: edge of a voxel of model space in mm.
        key: the config key, named in the error.

    Raises:
        InputError: not a number within what the pre-flight check takes for a voxel of a head.
    """
    low, high = SPACING_MM
    if isinstance(spacing, bool) or not isinstance(spacing, int | float) or not low <= spacing <= high:
        raise InputError(f"'{key}' is {spacing!r}; give the size of a voxel in mm, {low:g} to {high:g}.")


def check_count(count: int, key: str) -> None:
    """Make sure that a number of workers or the like is one.

    Args:
        count: 0 or more.
        key: the config key, named in the error.

    Raises:
        InputError: it is not a whole number, or negative.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise InputError(f"'{key}' is {count!r}; give a whole number, 0 or more.")
