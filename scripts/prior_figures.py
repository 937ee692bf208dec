"""How far samples are from real scans, and whether one of them is a copy.

`scripts.sampling.SampleFigures` calls it. The one idea: every figure is given beside its yardstick, the same figure
among real scans, because a distance alone says nothing. Nothing that is kept is as large as a volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from scripts.lpips import LPIPS3D, _first_layer

__all__ = ["VolumeSet", "compare", "nearest_among", "nearest_neighbours", "split_half"]

N_BINS = 64
FOREGROUND = 0.05
Named = tuple[str, torch.Tensor]


class VolumeSet:
    """Histograms and perceptual features of a set of volumes.

    Args:
        slice_step: every so many slices of each axis go through AlexNet.
    """

    def __init__(self, slice_step: int = 4) -> None:
        if slice_step < 1:
            raise ValueError(f"slice_step must be at least 1, got {slice_step}.")
        self.slice_step = slice_step
        self.lpips = LPIPS3D()
        self.names: list[str] = []
        self.histograms: list[np.ndarray] = []
        self.features: list[torch.Tensor] = []

    def add(self, name: str, volume: torch.Tensor) -> None:
        """Add a volume in model space.

        Args:
            name: of the volume.
            volume: (D, H, W), or with leading axes of 1; clamped to [0, 1].
        """
        plain = volume.detach().as_subclass(torch.Tensor).float().cpu().reshape(volume.shape[-3:]).clamp(0, 1)
        inside = plain[plain > FOREGROUND].numpy()
        density = np.histogram(inside, N_BINS, (0, 1))[0] / max(1, inside.size)
        self.names.append(name)
        self.histograms.append(density)
        self.features.append(_features(self.lpips, plain, self.slice_step))


def compare(samples: VolumeSet, real: VolumeSet) -> dict[str, float]:
    """Distance of a set of samples from a set of real scans.

    Returns:
        `histogram_distance`: Wasserstein distance between the mean intensity histograms of the foregrounds, in units
        of model space's intensity. `mmd`: squared maximum mean discrepancy of the LPIPS features (see `_mmd`).

    Raises:
        ValueError: a set has fewer than two volumes.
    """
    sizes = len(samples.names), len(real.names)
    if min(sizes) < 2:
        raise ValueError(f"each set needs two volumes or more, got {sizes[0]} samples and {sizes[1]} real scans.")
    bins = (np.arange(N_BINS) + 0.5) / N_BINS
    ours, theirs = (np.mean(one.histograms, axis=0) for one in (samples, real))
    if not ours.sum() > 0 or not theirs.sum() > 0:
        distance = math.nan  # a set without any foreground
    else:
        distance = float(wasserstein_distance(bins, bins, ours, theirs))
    return {"histogram_distance": distance, "mmd": _mmd(torch.stack(samples.features), torch.stack(real.features))}


def split_half(real: VolumeSet) -> float:
    """The `mmd` between every second real scan and the others: what it is where there is no difference.

    Returns:
        The distance; nan for fewer than four volumes.
    """
    if len(real.names) < 4:
        return math.nan
    features = torch.stack(real.features)
    return _mmd(features[::2], features[1::2])


def nearest_neighbours(latents: Sequence[Named], training: Iterable[Named]) -> list[dict[str, Any]]:
    """The training volume that is nearest to each latent.

    Args:
        latents: names and latents (C, D, H, W).
        training: names and posterior means, read once, one at a time.

    Returns:
        Dicts with name, nearest, and distance: root mean square over the values of the latent. 0 is a copy.
    """
    rows: list[dict[str, Any]] = [{"name": name, "nearest": "", "distance": math.inf} for name, _ in latents]
    for nearest, mu in training:
        for row, (_, z) in zip(rows, latents, strict=True):
            distance = _rms(z, mu)
            if distance < row["distance"]:
                row |= {"nearest": nearest, "distance": distance}
    return rows


def nearest_among(training: Sequence[Named]) -> float:
    """Median over training volumes of the distance to the nearest other one; nan for fewer than two."""
    nearest = [
        min(_rms(mu, other) for number, (_, other) in enumerate(training) if number != own)
        for own, (_, mu) in enumerate(training)
        if len(training) > 1
    ]
    return float(np.median(nearest)) if nearest else math.nan


@torch.no_grad()
def _features(lpips: LPIPS3D, volume: torch.Tensor, slice_step: int) -> torch.Tensor:
    """Means of AlexNet's five layers over positions and over every so many slices of each axis: (1152,)."""
    sums: torch.Tensor | None = None
    n_slices = 0
    for axis in range(3):
        slices = volume.movedim(axis, 0)[slice_step // 2 :: slice_step]
        filters, bias_map = lpips._grey_first_layer(*slices.shape[1:])
        for chunk in slices.split(lpips.chunk_size):
            features = lpips._trunk(_first_layer(chunk, filters, bias_map))
            means = torch.cat([layer.mean((2, 3)) for layer in features], 1).sum(0)
            sums = means if sums is None else sums + means
            n_slices += len(chunk)
    assert sums is not None
    return sums / n_slices


def _mmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features, (M, F) and (N, F).

    Gaussian kernel exp(-d^2 / (2 s^2)) whose s^2 is the median squared distance of the pooled set. By hand, because
    `monai.metrics.MMDMetric` wants sets of equal size and has the linear kernel alone, which compares the means.

    Source: Gretton et al., A kernel two-sample test, JMLR 2012, equation 3.
    """
    m, n = len(first), len(second)
    pooled = torch.cat([first, second]).double()
    squared = torch.cdist(pooled, pooled).square()
    scale = squared[~torch.eye(m + n, dtype=torch.bool)].median().clamp_min(1e-12)
    kernel = torch.exp(-squared / (2 * scale))
    within = [
        (block.sum() - block.diagonal().sum()) / (k * (k - 1))
        for block, k in ((kernel[:m, :m], m), (kernel[m:, m:], n))
    ]
    return float(sum(within) - 2 * kernel[:m, m:].mean())


def _rms(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.float() - second.float()).square().mean().sqrt())
