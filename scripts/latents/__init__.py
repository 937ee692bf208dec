"""Latents as files and folders, their statistics and scaling, and distributions over them."""

from __future__ import annotations

from scripts.latents.dataset import (
    DrawLatentd,
    FirstStage,
    LatentDataset,
    latent_datalist,
)
from scripts.latents.foreign import LoadLatentd, list_latents, read_tensor, to_raw
from scripts.latents.priors import (
    GaussianPrior,
    LowRankPrior,
    Prior,
    StandardPrior,
    fit_prior,
    interpolate,
    load_prior,
)
from scripts.latents.scaling import SCALINGS, LatentScaling, padded_shape
from scripts.latents.statistics import ActiveUnits, LatentStatistics, RunningMoments
from scripts.latents.storage import (
    DTYPES,
    ENDING,
    MANIFEST,
    RECORD_KEYS,
    STATISTICS,
    Latent,
    latent_files,
    latent_path,
    manifest_entry,
    read_header,
    read_latent,
    read_manifest,
    read_manifest_latents,
    read_statistics,
    write_latent,
)

__all__ = [
    "ActiveUnits",
    "DTYPES",
    "DrawLatentd",
    "ENDING",
    "FirstStage",
    "GaussianPrior",
    "Latent",
    "LatentDataset",
    "LatentScaling",
    "LatentStatistics",
    "LoadLatentd",
    "LowRankPrior",
    "MANIFEST",
    "Prior",
    "RECORD_KEYS",
    "RunningMoments",
    "SCALINGS",
    "STATISTICS",
    "StandardPrior",
    "fit_prior",
    "interpolate",
    "latent_datalist",
    "latent_files",
    "latent_path",
    "list_latents",
    "load_prior",
    "manifest_entry",
    "padded_shape",
    "read_header",
    "read_latent",
    "read_manifest",
    "read_manifest_latents",
    "read_statistics",
    "read_tensor",
    "to_raw",
    "write_latent",
]
