"""Whole folders of latents to and from the original system's pickles.

    python -m scripts.latent_exchange import_folder --folder pickles --output_dir output/latents
    python -m scripts.latent_exchange export_folder --folder output/latents --output_dir pickles

See `original_latents` for the single file, which is never run.
"""

from __future__ import annotations

from pathlib import Path

import fire

from scripts.cohort import split_of
from scripts.errors import InputError, report_input_errors
from scripts.latent_writer import finish_folder
from scripts.latents import DTYPES, RECORD_KEYS, latent_files, latent_path, read_latent, read_manifest, write_latent
from scripts.original_latents import convert_from_original, write_original
from scripts.provenance import bundle_version

__all__ = ["export_folder", "import_folder"]


def import_folder(folder: str, output_dir: str, val_fraction: float = 0.2, test_fraction: float = 0.0) -> int:
    """Make a finished folder of latents out of pickles.

    Each file counts as a subject of its own, named after it; the split is by the hash of that name. The latents know
    neither scan nor weights, so that they decode to model space alone, by weights that the user answers for.

    Args:
        folder: of pickles.
        output_dir: an empty or new folder.
        val_fraction: share of volumes in the split `val`.
        test_fraction: the same for `test`.

    Returns:
        The number of volumes.

    Raises:
        InputError: the output folder holds latents already, or a pickle cannot be read.
    """
    if Path(output_dir).is_dir() and latent_files(output_dir):
        raise InputError(f"{output_dir} holds latents already; give another output_dir.")
    settings = {"weights_sha256": "", "preprocessing_sha256": "", "dtype": "float32"}
    n_written = 0
    for name, mu, logvar, label in convert_from_original(folder):
        record = {
            **dict.fromkeys(RECORD_KEYS, ""),
            "name": name,
            "subject": name,
            "label": label,
            "split": split_of(name, val_fraction, test_fraction),
        }
        source = {"source_file": "", "source_sha256": "", "bundle_version": bundle_version()}
        dtype = DTYPES[settings["dtype"]]
        write_latent(latent_path(output_dir, name), mu.to(dtype), logvar.to(dtype), {**record, **settings, **source})
        n_written += 1
    finish_folder(output_dir, settings)
    return n_written


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
        label = int(entry["label"]) if entry["label"].lstrip("-").isdigit() else entry["label"]
        write_original(Path(output_dir) / f"{entry['name']}.pkl", latent.mu, latent.logvar, label)
        n_written += 1
    return n_written


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"import_folder": import_folder, "export_folder": export_folder})
