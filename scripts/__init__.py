"""Code of the brain_t1_vae bundle that MONAI lacks; the JSON files in configs/ put it together.

A config imports it once, `$import scripts`, and names the rest by its package: `$scripts.cohort.select(...)`. Packages
are loaded when they are first named, so that a job pays for those that it uses.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def submodule(package: str, name: str) -> ModuleType:
    """Import a module of a package when it is first named; AttributeError where there is none."""
    try:
        return import_module(f"{package}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{package}.{name}":
            raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}") from None


def __getattr__(name: str) -> ModuleType:
    return submodule(__name__, name)
