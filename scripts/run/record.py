"""What an output says of its own origin: version, command and `run.json`, with nothing of its owner."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from scripts.run.checks import RUN_KEYS, SHIPPED, config_files, is_shipped, read_keys
from scripts.run.files import file_sha256, replacing

__all__ = ["METADATA", "RunRecord", "bundle_version", "command_line", "config_sha256"]

METADATA = SHIPPED / "metadata.json"
OWN_FOLDERS = ("configs/", "models/")
PACKAGES = ("monai", "torch", "numpy", "nibabel", "pytorch-ignite", "safetensors")
FOLDER_KEYS = ("_dir", "compare_with", "peers")  # endings of keys whose value may be a folder without any slash


def bundle_version() -> str:
    """The version in metadata.json."""
    return json.loads(METADATA.read_text(encoding="utf-8"))["version"]


def command_line() -> str:
    """What the user ran, less its folders: outputs are made to be shown, and folders are named after people.

    Of a path outside the bundle a file's name is left; a folder becomes `<folder>`.
    """
    words, key = ["python -m monai.bundle"], ""
    for argument in sys.argv[1:]:
        name, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        key = name or key
        shown = name + equals + _without_folders(value, key.endswith(FOLDER_KEYS))
        words.append(f'"{shown}"' if re.search(r"[\s'\[{<]", shown) else shown)
    return " ".join(words)


def config_sha256(argv: Sequence[str]) -> str:
    """sha256 of what a `monai.bundle run` was configured with.

    That is the bundle's version, which stands for its own config files, their names, the content of the user's files,
    and the command line's keys. Keys that name folders do not count and of other paths the file's name does, so that
    the same run on another machine has the same hash.

    Args:
        argv: `sys.argv`.

    Returns:
        64 hex digits; "" where the bundle was not started by `monai.bundle run`.
    """
    keys = read_keys(argv)
    if "config_file" not in keys:
        return ""
    configs = [
        Path(file).name if is_shipped(file) else ConfigParser.load_config_file(file) for file in config_files(keys)
    ]
    shown = {key: _each(value, False) for key, value in keys.items() if key not in RUN_KEYS}
    shown = {key: value for key, value in shown.items() if not key.endswith(FOLDER_KEYS)}
    content = [bundle_version(), configs, shown]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class RunRecord:
    """Write `run.json` beside a job's outputs: all that it takes to make the same bytes again.

    It holds the command and the hash of its configs, the hash of the weights that it began with, the seed, the
    versions of the bundle and its packages, and what else decides about the last bits of a result: device, processor
    features and threads. `finished` is null until the job's engine has ended. What earlier runs into the same folder
    wrote stands under `earlier`, oldest first: a training or an encoding that went on is the work of several.

    Args:
        output_dir: the job's folder.
        weights: the weights file that the job begins with; "" or missing: there is none.
        seed: of all random numbers; None: the job draws none.
    """

    def __init__(self, output_dir: str, weights: str = "", seed: int | None = None) -> None:
        self.path = Path(output_dir) / "run.json"
        self.weights = weights
        self.seed = seed
        self.record: dict[str, Any] = {}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer or evaluator."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        if not self.record:  # a federated training starts its trainer once a round
            self.record = {
                "command": command_line(),
                "bundle_version": bundle_version(),
                "config_sha256": config_sha256(sys.argv),
                "weights_sha256": file_sha256(self.weights) if os.path.isfile(self.weights) else "",
                "seed": self.seed,
                "packages": {name: metadata.version(name) for name in PACKAGES},
                "python": platform.python_version(),
                **_hardware(engine.state.device),
                "started": _now(),
                "finished": None,
                "earlier": _earlier(self.path),
            }
        self._write(engine)

    def _finish(self, engine: Engine) -> None:
        self.record["finished"] = _now()
        self._write(engine)

    def _write(self, engine: Engine) -> None:
        if engine.state.rank == 0:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _hardware(device: torch.device) -> dict[str, Any]:
    """What the order of sums depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": f"{device.type}, {name}", "threads": torch.get_num_threads()}


def _earlier(path: Path) -> list[Mapping[str, Any]]:
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        return [*last.pop("earlier"), last]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []  # none, or no record of this bundle


def _without_folders(text: str, may_be_folder: bool) -> str:
    """A value of the command line: one text, or a list or dict of them."""
    if text.startswith(("[", "(", "{")):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return _last_part(text, may_be_folder)
        shown = _each(value, may_be_folder)
        return text if shown == value else repr(shown)
    return _last_part(text, may_be_folder)


def _each(value: Any, may_be_folder: bool) -> Any:
    if isinstance(value, dict):
        return {key: _each(item, may_be_folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_each(item, may_be_folder) for item in value)
    return _last_part(value, may_be_folder) if isinstance(value, str) else value


def _last_part(text: str, may_be_folder: bool) -> str:
    is_path = "/" in text or "\\" in text
    if is_path and text.startswith("$"):
        return "$..."
    if is_path and text.startswith(OWN_FOLDERS) and ".." not in text:
        return text
    if (is_path or may_be_folder) and os.path.isdir(text):
        return "<folder>"
    return re.split(r"[/\\]", text)[-1]
