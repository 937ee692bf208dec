"""What an output says of its own origin: the bundle's version and the command, with nothing of the machine."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["bundle_version", "command_line"]

METADATA = Path(__file__).resolve().parents[1] / "configs" / "metadata.json"
OWN_FOLDERS = ("configs/", "models/")
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
