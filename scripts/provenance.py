"""What an output says of its own origin: the bundle's version and the command, with nothing of the machine."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path, PurePath

__all__ = ["bundle_version", "command_line"]

METADATA = Path(__file__).resolve().parents[1] / "configs" / "metadata.json"


def bundle_version() -> str:
    """The version in metadata.json."""
    return json.loads(METADATA.read_text(encoding="utf-8"))["version"]


def command_line() -> str:
    """What the user ran, with the last part of every path but the bundle's own: outputs are made to be shown."""
    words = ["python -m monai.bundle"]
    for argument in sys.argv[1:]:
        parts = re.split(r"(['\",=\[\]{}])", argument)
        shown = "".join(_last_part(part) for part in parts)
        words.append(f'"{shown}"' if re.search(r"[\s'\[{]", shown) else shown)
    return " ".join(words)


def _last_part(text: str) -> str:
    return PurePath(text).name if "/" in text and not text.startswith(("configs/", "models/")) else text
