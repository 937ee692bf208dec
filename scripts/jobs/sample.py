"""From a prior over latents to volumes: what `sample.json` decodes, and how far it is from real scans.

The config fits a prior to a folder of latents, draws from it and decodes. `SampleFigures` says what the samples are
worth: the distance of their intensities and of their LPIPS features from those of real scans, beside the distance that
real scans have among themselves, and how near each sample is to a training volume, so that a copy is noticed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.transforms import MapTransform
from tqdm import tqdm

from scripts.latents import (
    Prior,
    fit_prior,
    interpolate,
    read_latent,
    read_manifest,
    read_manifest_latents,
    read_statistics,
)
from scripts.metrics import VolumeSet, compare, nearest_among, nearest_neighbours, split_half
from scripts.run import InputError, as_flag, file_sha256, replacing

__all__ = ["DrawPriord", "SampleFigures", "fit_to_folder", "interpolation_records", "sample_records"]


def fit_to_folder(
    kind: str,
    folder: str,
    weights: str,
    shape: Sequence[int],
    split: str = "train",
    label_value: str = "",
    n_components: int = 16,
    residual: bool | str = False,
) -> Prior:
    """Fit a prior to the latents of a folder.

    Args:
        kind: `standard` (needs no folder), `gaussian` or `lowrank`.
        folder: a finished folder of latents; "" for none.
        weights: the decoder's weights file; the latents must be of the same.
        shape: of the latent, (C, D, H, W).
        split: the split that is fitted: `train`, `val`, `test` or `all`.
        label_value: fit to the volumes with this label only; "" for every volume.
        n_components: of `lowrank`.
        residual: whether `lowrank` adds the variance that its components leave.

    Raises:
        InputError: the folder is missing or unfinished, of other weights or another shape, or too few volumes are in
            the split with that label.
    """
    if kind == "standard":
        return fit_prior(kind, (), shape)
    if not folder:
        raise InputError(
            f"the prior '{kind}' is fitted to latents: give a folder made by encode.json as 'dataset_dir'."
        )
    _check_folder(folder, weights, shape)
    n_found = sum(split in ("all", e["split"]) and label_value in ("", e["label"]) for e in read_manifest(folder))
    if n_found < 2:
        about = f"split '{split}'" + (f" with label '{label_value}'" if label_value else "")
        raise InputError(f"{folder} has {n_found} latents in {about}; a prior needs at least two.")
    latents = read_manifest_latents(folder, split, label_value)
    bar = tqdm(latents, "fitting the prior", n_found, disable=None, leave=False)
    return fit_prior(kind, (latent.posterior for latent in bar), shape, n_components, as_flag(residual, "residual"))


def sample_records(n_samples: int) -> list[dict[str, Any]]:
    """Records of samples: name and index.

    Raises:
        InputError: `n_samples` is no positive whole number.
    """
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
        raise InputError(f"'n_samples' is {n_samples!r}; give a whole number above 0.")
    return [{"name": f"sample_{index + 1:04d}", "index": index} for index in range(n_samples)]


def interpolation_records(
    folder: str, names: Sequence[str], n_steps: int, kind: str, weights: str, shape: Sequence[int]
) -> list[dict[str, Any]]:
    """Records of the way between two volumes: name and latent.

    Args:
        folder: a finished folder of latents.
        names: of the two volumes, as in the manifest.
        n_steps: volumes in all, both ends included.
        kind: `linear` or `spherical`.
        weights: the decoder's weights file; the latents must be of the same.
        shape: of the latent, (C, D, H, W).

    Raises:
        InputError: not two names, one that the folder lacks, or latents of other weights or another shape.
    """
    if isinstance(names, str) or len(names) != 2:
        raise InputError(f"'between' is {names!r}; give the names of two volumes of the folder.")
    _check_folder(folder, weights, shape)
    files = {entry["name"]: entry["file"] for entry in read_manifest(folder)}
    for name in names:
        if name not in files:
            raise InputError(f"{folder} has no latent '{name}'; it has {', '.join(sorted(files)[:5])}, ...")
    start, end = (read_latent(Path(folder) / files[name]).mu.float() for name in names)
    steps = interpolate(start, end, n_steps, kind)
    return [{"name": f"step_{number + 1:02d}", "latent": z} for number, z in enumerate(steps)]


class DrawPriord(MapTransform):
    """Draw the latent of a record's index: key `index` to key `latent`, (C, D, H, W) float32.

    Args:
        prior: what to draw from.
        seed: of the run; a sample depends on it and on its index alone.
        truncation: factor on the standard deviation about the prior's mean.
    """

    def __init__(self, prior: Prior, seed: int, truncation: float = 1.0) -> None:
        super().__init__("index", allow_missing_keys=True)
        self.prior, self.seed, self.truncation = prior, seed, truncation

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add `latent` where there is an `index`."""
        drawn: dict[Hashable, Any] = dict(data)
        for key in self.key_iterator(drawn):
            drawn["latent"] = self.prior.sample(self.seed, drawn[key], self.truncation)
        return drawn


class SampleFigures:
    """How far the samples are from real scans and from the training set.

    Writes `figures.json` and `nearest.csv`, prints a table, and leaves the figures in the engine's metrics.

    Args:
        output_dir: where to write.
        real: preprocessed real scans.
        folder: the latents of the training set; "" leaves the nearest neighbours out.
        split: their split.
    """

    def __init__(self, output_dir: str, real: Dataset, folder: str, split: str = "train") -> None:
        self.output_dir, self.real, self.folder, self.split = Path(output_dir), real, folder, split
        self.samples = VolumeSet()
        self.latents: list[tuple[str, torch.Tensor]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose iteration gives `latent` and `pred` (`decode_iteration`)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        """Check before the first sample is decoded that there will be figures."""
        n_samples = len(engine.state.dataloader.dataset)
        if min(n_samples, len(self.real)) < 2:
            raise InputError(
                f"'compare_with' compares two sets: {n_samples} samples and {len(self.real)} real scans are too few; "
                "give two or more of each."
            )
        if self.folder and next(self._training(), None) is None:
            raise InputError(f"{self.folder} has no latents in the split '{self.split}'; give another 'split'.")

    def _volumes(self, engine: Engine) -> None:
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.samples.add(record["name"], output["pred"].detach().float().cpu()[0])
            self.latents.append((record["name"], output["latent"].detach().float().cpu()))

    def _finish(self, engine: Engine) -> None:
        real = VolumeSet()
        for scan in tqdm(self.real, desc="real scans", disable=None, leave=False):
            real.add(scan["name"], scan["image"].as_tensor()[0])
        figures = {"n_samples": len(self.latents), "n_real": len(self.real), **compare(self.samples, real)}
        figures["mmd_real"] = split_half(real)
        if self.folder:
            rows = pd.DataFrame(nearest_neighbours(self.latents, self._training()))
            figures["nearest_median"] = float(rows["distance"].median())
            figures["nearest_least"] = float(rows["distance"].min())
            figures["nearest_among_training"] = nearest_among(list(self._training()))
            with replacing(self.output_dir / "nearest.csv") as temporary:
                rows.to_csv(temporary, index=False, float_format="%.6g")
        with replacing(self.output_dir / "figures.json") as temporary:
            finite = {key: value if math.isfinite(value) else None for key, value in figures.items()}
            temporary.write_text(json.dumps(finite, indent=2) + "\n")
        engine.state.metrics.update(figures)
        print("\n".join(f"{key:<24}{value:.5g}" for key, value in figures.items()), flush=True)

    def _training(self) -> Iterator[tuple[str, torch.Tensor]]:
        for latent in read_manifest_latents(self.folder, self.split):
            yield latent.header["name"], latent.mu.float()


def _check_folder(folder: str, weights: str, shape: Sequence[int]) -> None:
    statistics = read_statistics(folder)
    # Latents that were imported from elsewhere do not know their weights.
    if statistics["weights_sha256"] not in ("", file_sha256(weights)):
        raise InputError(f"{folder} was encoded with other weights than {weights}; encode the cohort with these.")
    if list(statistics["shape"]) != list(shape):
        raise InputError(
            f"{folder} holds latents of {statistics['shape']}, the network decodes {list(shape)}; "
            "encode the cohort anew."
        )
