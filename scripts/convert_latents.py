"""Whole folders of latents from numpy files, and to the original system's pickles.

    python -m scripts.convert_latents import_folder --folder arrays --output_dir output/latents
    python -m scripts.convert_latents export_folder --folder output/latents --output_dir pickles

The original keeps one Python pickle a volume, {"mu", "logvar", "label"}. A pickle is a program, so none is read here.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import fire
import numpy as np
import torch

from scripts.cohort import split_of
from scripts.jobs.encode import finish_folder
from scripts.latents import RECORD_KEYS, latent_files, latent_path, read_latent, read_manifest, write_latent
from scripts.networks import Posterior
from scripts.run import InputError, bundle_version, replacing, report_input_errors

__all__ = ["export_folder", "import_folder", "write_original"]


def import_folder(folder: str, output_dir: str, val_fraction: float = 0.2, test_fraction: float = 0.0) -> int:
    """Make a finished folder of latents out of `.npz` files, each with `mu` and `logvar` (C, D, H, W), and `label`.

    Each file counts as a subject of its own, named after it; the split is by the hash of that name. The latents know
    neither scan nor weights, so that they decode to model space alone, by weights that the user answers for.

    Args:
        folder: of `.npz` files.
        output_dir: an empty or new folder.
        val_fraction: share of volumes in the split `val`.
        test_fraction: the same for `test`.

    Returns:
        The number of volumes.

    Raises:
        InputError: the output folder holds latents already, or a file is missing, damaged or no such latent.
    """
    if Path(output_dir).is_dir() and latent_files(output_dir):
        raise InputError(f"{output_dir} holds latents already; give another output_dir.")
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise InputError(f"{folder} holds no .npz file; docs/encode.md says how other latents become some.")
    for path in files:  # all of them before the first is written
        _read(path)
    settings = {"weights_sha256": "", "preprocessing_sha256": "", "dtype": "float32"}
    source = {"source_file": "", "source_sha256": "", "bundle_version": bundle_version()}
    for path in files:
        posterior, label = _read(path)
        record = {key: "" for key in RECORD_KEYS} | {"name": path.stem, "subject": path.stem, "label": label}
        record["split"] = split_of(path.stem, val_fraction, test_fraction)
        write_latent(
            latent_path(output_dir, path.stem), posterior.mu, posterior.logvar, {**record, **settings, **source}
        )
    finish_folder(output_dir, settings)
    return len(files)


def _read(path: Path) -> tuple[Posterior, str]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, logvar = (torch.from_numpy(np.array(arrays[key], np.float32)) for key in ("mu", "logvar"))
            label = str(arrays["label"].item()) if "label" in arrays else ""
            posterior = Posterior(mu, logvar)
    except Exception as error:  # a damaged file makes a reader raise nearly anything
        raise InputError(f"{path} is damaged or no latent with mu and logvar ({error}); write it again.") from error
    if mu.ndim != 4 or not (mu.isfinite().all() and logvar.isfinite().all()):
        raise InputError(f"{path} has mu of {tuple(mu.shape)}; finite numbers of (C, D, H, W) are needed.")
    return posterior, label


def export_folder(folder: str, output_dir: str) -> int:
    """Write a finished folder of latents as pickles.

    Args:
        folder: made by `encode.json`.
        output_dir: gets `<name>.pkl` a volume; labels that are whole numbers become numbers.

    Returns:
        The number of volumes.

    Raises:
        InputError: the folder is not finished, or a file of it is damaged.
    """
    n_written = 0
    for entry in read_manifest(folder):
        latent = read_latent(Path(folder) / entry["file"])
        label = int(entry["label"]) if re.fullmatch("-?[0-9]+", entry["label"]) else entry["label"]
        write_original(Path(output_dir) / f"{entry['name']}.pkl", latent.mu, latent.logvar, label)
        n_written += 1
    return n_written


def write_original(path: str | Path, mu: torch.Tensor, logvar: torch.Tensor, label: int | str) -> None:
    """Write one file for the original system, whole or not at all: float32 numpy arrays, pickle protocol 4.

    numpy 2 names its modules anew in pickles, so the reader needs numpy 1.26 or newer.

    Args:
        path: the file, `.pkl` or `.pickle`.
        mu: posterior mean (C, D, H, W).
        logvar: log of the posterior's variance, the same shape.
        label: kept as it is.

    Raises:
        ValueError: the shapes differ or are others, or a value is not finite.
        InputError: the folder cannot be written to.
    """
    if mu.ndim != 4 or mu.shape != logvar.shape:
        raise ValueError(f"mu and logvar must be (C, D, H, W) alike, got {tuple(mu.shape)} and {tuple(logvar.shape)}.")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise ValueError(f"label must be a whole number or a text, got {label!r}.")
    mean, log_variance = (np.ascontiguousarray(t.detach().cpu().float().numpy()) for t in (mu, logvar))
    if not np.isfinite(mean).all() or not np.isfinite(log_variance).all():
        raise ValueError("mu and logvar must be finite in float32.")
    content = {"mu": mean, "logvar": log_variance, "label": label}
    with replacing(path) as temporary:
        temporary.write_bytes(pickle.dumps(content, protocol=4))


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"import_folder": import_folder, "export_folder": export_folder})
