"""The file of one volume's latent, and the folder that holds a cohort's.

Encoding writes it, decoding, priors and diffusion trainings read it. The posterior (mu and logvar) is
kept, never one baked-in sample, so that every later draw is fresh, and with it stands what is needed to find the way
home. A file is plain safetensors: `mu` and `logvar`, (C, D, H, W), and a header of texts. A folder is finished when it
has its `manifest.jsonl`, one line a file, and `latent_stats.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from scripts.conventions import MOST_VOXELS, SPACING_RANGE_MM
from scripts.networks import Posterior
from scripts.run import InputError, file_sha256, replacing

__all__ = [
    "DTYPES",
    "ENDING",
    "MANIFEST",
    "RECORD_KEYS",
    "STATISTICS",
    "Latent",
    "latent_files",
    "latent_path",
    "manifest_entry",
    "read_header",
    "read_latent",
    "read_manifest",
    "read_manifest_latents",
    "read_statistics",
    "write_latent",
]

FORMAT = "brain_t1_vae latent 1"
ENDING = "_latent.safetensors"
MANIFEST = "manifest.jsonl"
STATISTICS = "latent_stats.json"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
UNITS = {"unknown", "meter", "mm", "micron", "sec", "msec", "usec", "hz", "ppm", "rads"}  # NIfTI's
RECORD_KEYS = ("name", "subject", "session", "label", "split")
# Texts stand in the header as they are, everything else as JSON.
TEXT_KEYS = (
    *RECORD_KEYS,
    "dtype",
    "source_file",
    "source_sha256",
    "weights_sha256",
    "preprocessing_sha256",
    "bundle_version",
)


@dataclass(frozen=True)
class Latent:
    """One volume's posterior and where it comes from.

    Attributes:
        mu: posterior mean (C, D/4, H/4, W/4), as stored.
        logvar: log of the posterior's variance, the same shape.
        header: the record (name, subject, session, label, split), the source's file name and sha256, the weights'
            and the preprocessing's, the bundle's version, and what `scripts.transforms.SourceGrid` keeps.
    """

    mu: torch.Tensor
    logvar: torch.Tensor
    header: dict[str, Any]

    @property
    def posterior(self) -> Posterior:
        """The distribution, in fp32."""
        return Posterior(self.mu, self.logvar)


def latent_path(folder: str | Path, name: str, shards: int = 0) -> Path:
    """Where a volume's latent lies.

    Args:
        folder: the output folder.
        name: the record's name.
        shards: 0 for one flat folder, else the number of subfolders; which one is a hash of the name, so that a new
            volume moves no other.

    Raises:
        InputError: `shards` is negative or no whole number.
    """
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 0:
        raise InputError(f"'shards' is {shards!r}; give the number of subfolders, or 0 for none.")
    if not shards:
        return Path(folder) / f"{name}{ENDING}"
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % shards
    return Path(folder) / f"{number:04d}" / f"{name}{ENDING}"


def latent_files(folder: str | Path) -> list[Path]:
    """Every latent file of a folder and its subfolders, sorted by file name; unfinished ones are not among them."""
    return sorted((p for p in Path(folder).rglob(f"*{ENDING}") if not p.name.startswith(".")), key=lambda p: p.name)


def write_latent(path: str | Path, mu: torch.Tensor, logvar: torch.Tensor, header: Mapping[str, Any]) -> None:
    """Write one latent file, whole or not at all; the same content always gives the same bytes.

    Args:
        path: the file.
        mu: (C, D, H, W), float16 or float32.
        logvar: the same shape and type.
        header: see `Latent`.

    Raises:
        ValueError: shapes or types differ or are others.
        InputError: the folder cannot be written to.
    """
    if mu.shape != logvar.shape or mu.ndim != 4 or mu.dtype != logvar.dtype or mu.dtype not in DTYPES.values():
        raise ValueError(
            f"mu and logvar must be (C, D, H, W) of one float type, got {tuple(mu.shape)} {mu.dtype} and "
            f"{tuple(logvar.shape)} {logvar.dtype}."
        )
    texts = {key: value if key in TEXT_KEYS else json.dumps(value) for key, value in header.items()}
    payload = save({"mu": mu.contiguous(), "logvar": logvar.contiguous()}, {"format": FORMAT, **texts})
    with replacing(path) as temporary:
        temporary.write_bytes(_sorted_header(payload))


def read_header(path: str | Path) -> dict[str, Any]:
    """Read the header alone, without the tensors.

    Raises:
        InputError: the file is missing, damaged, or no latent of this bundle.
    """
    try:
        _refuse_pipe(path)
        with safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
        if texts.pop("format", "") != FORMAT:
            raise InputError(f"{path} is not a latent file of this bundle ('{FORMAT}'); make it with encode.json.")
        header = {key: text if key in TEXT_KEYS else json.loads(text) for key, text in texts.items()}
    except (OSError, ValueError, SafetensorError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is missing or damaged ({error}); delete it and encode again.") from error
    missing = [key for key in RECORD_KEYS if key not in header]
    wrong = [key for key, is_good in GRID_CHECKS.items() if key in header and not is_good(header[key])]
    if missing or wrong:
        fault = f"its header has no {missing[0]}" if missing else f"{wrong[0]} is {str(header[wrong[0]])[:60]}"
        raise InputError(f"{path} is damaged ({fault}); delete it and encode again.")
    return header


def read_latent(path: str | Path) -> Latent:
    """Read one latent file.

    Raises:
        InputError: the file is missing, damaged, or no latent of this bundle.
    """
    header = read_header(path)
    try:
        tensors = load_file(path)
        latent = Latent(tensors["mu"], tensors["logvar"], header)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and encode again.") from error
    if latent.mu.ndim != 4 or latent.mu.shape != latent.logvar.shape:
        shapes = f"mu is {tuple(latent.mu.shape)}, logvar {tuple(latent.logvar.shape)}"
        raise InputError(f"{path} is damaged ({shapes}); delete it and encode again.")
    return latent


def manifest_entry(folder: Path, path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's line of one file: where it is, its sha256 and size, its record and its source."""
    entry = {"file": path.relative_to(folder).as_posix(), "sha256": file_sha256(path), "bytes": path.stat().st_size}
    return {**entry, **{key: header[key] for key in (*RECORD_KEYS, "source_file")}}


def read_manifest(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's manifest, one at a time.

    Raises:
        InputError: there is none, or a line is damaged or names a file outside the folder.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} has no {MANIFEST}: it is no finished folder of latents; run encode.json on it.")
    with path.open("rb") as lines:  # as bytes, so that a line that is no text is named by its number, too
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                is_outside = bool(re.match(r"[/\\]|\w:", entry["file"])) or ".." in re.split(r"[/\\]", entry["file"])
                is_outside = is_outside or bool(re.search(r"[/\\]", entry.get("name", "")))  # exports are named by it
                texts = [entry[key] for key in ("file", *RECORD_KEYS)] if not is_outside else []
                is_good = all(isinstance(text, str) and text.isprintable() for text in texts)
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                is_outside, is_good = False, False
            if is_outside:
                named = entry["file"] if entry["file"].isprintable() else ascii(entry["file"])
                raise InputError(
                    f"{path} names {named} in line {number}, a file outside the folder; "
                    "delete it and run encode.json again."
                )
            if not is_good:
                raise InputError(f"{path} is damaged in line {number}; delete it and run encode.json again.")
            yield entry


def read_manifest_latents(folder: str | Path, split: str = "all", label: str = "") -> Iterator[Latent]:
    """The latents of a folder, one at a time.

    Args:
        folder: a finished folder of latents.
        split: `train`, `val`, `test` or `all`.
        label: only volumes of this label; "" for every volume.
    """
    for entry in read_manifest(folder):
        if split in ("all", entry["split"]) and label in ("", entry["label"]):
            yield read_latent(Path(folder) / entry["file"])


def read_statistics(path: str | Path) -> dict[str, Any]:
    """Read `latent_stats.json`.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        InputError: it is missing or damaged.
    """
    path = Path(path) / STATISTICS if Path(path).is_dir() else Path(path)
    try:
        _refuse_pipe(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        (scales, scale), (shifts, shift) = (
            (content[key]["channel"], content[key]["overall"]) for key in ("scale_factor", "shift")
        )
        is_good = len(scales) == len(shifts) > 0 and _are_finite(*scales, scale, *shifts, shift)
        is_good = is_good and all(number > 0 for number in (*scales, scale))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is missing or no {STATISTICS} of encode.json; run encode.json again.") from error
    if not is_good:
        raise InputError(f"{path} is damaged: its scales and shifts are no finite numbers; run encode.json again.")
    return content


def _refuse_pipe(path: str | Path) -> None:
    """Opening a pipe waits for a writer, for ever; safetensors does not even wake up for a Ctrl-C."""
    if not Path(path).is_file():
        raise FileNotFoundError("there is no such file")


def _are_finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and abs(value) < 1e30 for value in values)  # false for NaN, too


def _is_shape(value: Any) -> bool:
    is_good = isinstance(value, list) and len(value) == 3 and all(isinstance(side, int) and side > 0 for side in value)
    return is_good and math.prod(value) <= MOST_VOXELS


def _is_affine(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    if [len(row) if isinstance(row, list) else 0 for row in rows] != [4] * 4 or not _are_finite(*sum(rows, [])):
        return False
    axes = torch.tensor(rows, dtype=torch.float64)[:3, :3]
    low, high = SPACING_RANGE_MM
    return bool((axes.norm(dim=0) > low / 2).all() and (axes.norm(dim=0) < high * 2).all() and axes.det().abs() > 1e-9)


# What `scripts.transforms.SourceGrid` takes from a header, and would else make volumes of.
GRID_CHECKS: dict[str, Callable[[Any], bool]] = {
    "source_shape": _is_shape,
    "source_affine": _is_affine,
    "source_codes": lambda value: isinstance(value, list) and len(value) == 2 and set(value) <= {0, 1, 2, 3, 4, 5},
    "source_units": lambda value: isinstance(value, list) and len(value) == 2 and set(value) <= UNITS,
    "model_affine": _is_affine,
    "intensity_factor": lambda value: isinstance(value, int | float) and math.isfinite(value),
}


def _sorted_header(payload: bytes) -> bytes:
    """Safetensors bytes with the header's texts in order: the library's own order changes from process to process."""
    length = int.from_bytes(payload[:8], "little")
    text = json.dumps(json.loads(payload[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload[8 + length :]
