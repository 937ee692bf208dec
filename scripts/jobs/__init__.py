"""One module a job, named like its config: what it writes, and the sections of its report."""

from __future__ import annotations

from types import ModuleType

from scripts import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
