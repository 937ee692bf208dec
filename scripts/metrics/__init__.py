"""The figures of a reconstruction, what it is compared with, and the tables of both."""

from __future__ import annotations

from scripts.metrics.baselines import (
    BASELINES,
    DCT,
    Baseline,
    PatchPCA,
    Trilinear,
    latent_budget,
    make_baselines,
)
from scripts.metrics.lpips import LPIPS3D, MIN_SIDE
from scripts.metrics.peers import Peer, PeerFolder, PeerWeights, read_peers
from scripts.metrics.reconstruction import COLUMNS, VolumeMetric, reconstruction_metrics
from scripts.metrics.samples import (
    VolumeSet,
    compare,
    nearest_among,
    nearest_neighbours,
    split_half,
)
from scripts.metrics.spectrum import MeanSpectra, radial_power
from scripts.metrics.tables import (
    format_paired,
    format_table,
    paired_differences,
    summarise,
    summary_frame,
)

__all__ = [
    "BASELINES",
    "Baseline",
    "COLUMNS",
    "DCT",
    "LPIPS3D",
    "MIN_SIDE",
    "MeanSpectra",
    "PatchPCA",
    "Peer",
    "PeerFolder",
    "PeerWeights",
    "Trilinear",
    "VolumeMetric",
    "VolumeSet",
    "compare",
    "format_paired",
    "format_table",
    "latent_budget",
    "make_baselines",
    "nearest_among",
    "nearest_neighbours",
    "paired_differences",
    "radial_power",
    "read_peers",
    "reconstruction_metrics",
    "split_half",
    "summarise",
    "summary_frame",
]
