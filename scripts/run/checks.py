"""What is checked before anything is built: the keys that were given, the device, the sizes of volumes.

Every config calls `begin` first thing in `initialize`. MONAI itself takes a misspelt `--epoch 5` as a new key that
nothing reads, and the run would go on with the default.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, run, update_kwargs
from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS

from scripts.conventions import MOST_VOXELS, ROOT, SPACING_RANGE_MM, STRIDE
from scripts.run.errors import InputError, report_input_errors

__all__ = [
    "RUN_KEYS",
    "begin",
    "check_count",
    "check_crop",
    "check_device",
    "check_size",
    "check_spacing",
    "config_files",
    "is_shipped",
    "read_keys",
    "refuse_unknown_keys",
]

SHIPPED = ROOT / "configs"
RUN_KEYS = tuple(inspect.signature(run).parameters)  # of `monai.bundle run` itself


def begin(device: torch.device | str, spacing: float, spatial_size: Sequence[int], num_workers: int) -> None:
    """What every job does first: report mistakes as one sentence, and look for some.

    Args:
        device: see `check_device`.
        spacing: see `check_spacing`.
        spatial_size: see `check_size`.
        num_workers: see `check_count`.

    Raises:
        InputError: a key that no config has, or a setting that is out of its range.
    """
    report_input_errors()
    refuse_unknown_keys(sys.argv)
    check_device(device)
    check_spacing(spacing)
    check_size(spatial_size, "spatial_size")
    check_count(num_workers, "num_workers")


def refuse_unknown_keys(argv: Sequence[str]) -> None:
    """Make sure that every key of a `monai.bundle run`, on the command line or in a file of the user's own, is read.

    In a file of the user's own, a new key is read where another value names it (`@key`). The name of a block, such as
    `dataset`, is no setting: as a plain value it would take the block's place.

    Args:
        argv: `sys.argv`; anything but a `run` with `--config_file` passes unchecked.

    Raises:
        InputError: a key that no config has or that is a block, with the nearest setting that exists.
    """
    keys = read_keys(argv)
    if "config_file" not in keys:
        return
    files = config_files(keys)
    everything = ConfigParser(ConfigParser.load_config_files(files))
    if own := [file for file in files if not is_shipped(file)]:
        _refuse_unread([file for file in files if is_shipped(file)] or _shipped_jobs(), own, everything)
    known = set(RUN_KEYS) | _tracking_keys(keys.get("tracking"))
    for key, value in keys.items():
        if key in known or key.startswith("+"):
            continue
        if key not in everything and key.replace("-", "_") not in everything:
            raise InputError(f"{keys['config_file']} has no key '{key}'{_hint(key, everything)}")
        _refuse_block(key, value, "the command line", everything)


def config_files(keys: Mapping[str, Any]) -> list[str]:
    """The config files of a run, from what `read_keys` gives."""
    given = keys["config_file"]
    return [str(file) for file in (given if isinstance(given, list | tuple) else [given])]


def is_shipped(file: str) -> bool:
    """Whether a config file is one of the bundle's own."""
    return Path(file).resolve().parent == SHIPPED


def _refuse_unread(shipped_files: Sequence[str], own: Sequence[str], everything: ConfigParser) -> None:
    """See `refuse_unknown_keys`: the keys of files of the user's own, against those of the bundle's."""
    shipped, text = (
        ConfigParser(ConfigParser.load_config_files(shipped_files)),
        json.dumps(everything.get(), default=str),
    )
    for file in own:
        for key, value in ConfigParser.load_config_file(file).items():
            named = re.search(rf"[@%]{re.escape(key)}(?!\w)", text)
            if not (named or key.startswith("_") or key == "imports" or key.removeprefix("+") in shipped):
                raise InputError(f"{file} has the key '{key}', which nothing reads{_hint(key, shipped)}")
            _refuse_block(key, value, file, shipped)


def _settings(parser: ConfigParser) -> list[str]:
    """The keys that a user may change: those before the network; all, where there is none."""
    names = [name for name in parser.get() if isinstance(name, str)]
    return names[: names.index("network_def")] if "network_def" in names else names


def _refuse_block(key: str, value: Any, place: str, parser: ConfigParser) -> None:
    if _is_plain(value) and not _is_plain(parser.get().get(key, "")) and key not in (*_settings(parser), "_meta_"):
        raise InputError(f"'{key}' on {place} is a block of the config, no setting{_hint(key, parser)}")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list) and not str(value).startswith(("$", "@", "%"))


def _hint(key: str, parser: ConfigParser) -> str:
    settings = _settings(parser)
    near = difflib.get_close_matches(key, settings, n=1) or [name for name in settings if name.startswith(key)]
    return f"; did you mean --{near[0]}?" if near else "; the keys stand at the top of the config file."


def _shipped_jobs() -> list[str]:
    """Every config that is a job of its own."""
    found = sorted(SHIPPED.glob("*.json"))
    return [
        str(path) for path in found if "network_def" in (content := json.loads(path.read_text())) and "run" in content
    ]


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
    if len(sides) != 3 or any(not isinstance(side, int) or side < 1 or side % STRIDE for side in sides):
        raise InputError(f"'{key}' is {size!r}; give three positive multiples of {STRIDE}.")
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
    whole = not isinstance(side, bool) and isinstance(side, int) and side % STRIDE == 0
    if not whole or not 0 <= side <= min(spatial_size):
        raise InputError(
            f"'crop_size' is {side!r}; give a multiple of {STRIDE} up to the smallest side of 'spatial_size' "
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
    low, high = SPACING_RANGE_MM
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
