"""A shipped config with a test's own keys, resolved in this process: a second where a job of its own takes twenty."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from conftest import ROOT, TINY_JOB
from monai.bundle import ConfigParser

from scripts.run import InputError

TINY_KEYS = {key.removeprefix("--"): value for key, value in zip(TINY_JOB[::2], TINY_JOB[1::2], strict=True)}
TINY_KEYS = {key: ast.literal_eval(value) for key, value in TINY_KEYS.items() if key != "device"}


def parsed(job: str, **keys: Any) -> ConfigParser:
    """The config of a job on the tiny network and the CPU."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / f"{job}.json"))
    paths = {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    parser.update({**TINY_KEYS, "device": "$torch.device('cpu')", **paths})
    if "output_dir" in keys:
        Path(keys["output_dir"]).mkdir(parents=True, exist_ok=True)
    return parser


def input_error(error: BaseException | None) -> str:
    """The sentence of the InputError in a chain; MONAI wraps what it evaluates."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return str(error)
