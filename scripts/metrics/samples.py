"""How far samples are from real scans, and whether one of them is a copy.

`scripts.jobs.sample.SampleFigures` calls it. Every figure is given beside its yardstick, the same figure
among real scans, because a distance alone says nothing. Nothing that is kept is as large as a volume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.stats import wasserstein_distance

from scripts.conventions import FOREGROUND
from scripts.metrics.lpips import LPIPS3D, MIN_SIDE
from scripts.run import InputError

__all__ = ["VolumeSet", "compare", "nearest_among", "nearest_neighbours", "split_half"]

N_BINS = 64
Named = tuple[str, torch.Tensor]


class VolumeSet:
    """Histograms and perceptual features of a set of volumes.

    Args:
        slice_step: every so many slices of each axis go through AlexNet, 1 to 31.

    Attributes:
        names: of the volumes.
        histograms: shares of the foreground (x > 0.05) in 64 bins on [0, 1], (64,) each; zeros without foreground.
        features: means of AlexNet's activations, (1152,) float32 each.

    Raises:
        ValueError: `slice_step` is out of range.
    """

    def __init__(self, slice_step: int = 4) -> None:
        if not 1 <= slice_step <= MIN_SIDE:
            raise ValueError(f"slice_step must be from 1 to {MIN_SIDE}, got {slice_step}.")
        self.slice_step = slice_step
        self.lpips = LPIPS3D()
        self.names: list[str] = []
        self.histograms: list[np.ndarray] = []
        self.features: list[torch.Tensor] = []

    def add(self, name: str, volume: torch.Tensor) -> None:
        """Add a volume in model space.

        Args:
            name: of the volume.
            volume: (D, H, W) or (1, 1, D, H, W), floating point; clamped to [0, 1].

        Raises:
            InputError: a side is shorter than 31 voxels, or a voxel is not finite.
            ValueError: another shape.
        """
        if volume.ndim < 3 or math.prod(volume.shape[:-3]) != 1:
            raise ValueError(f"{name} must be (D, H, W) or (1, 1, D, H, W), got {tuple(volume.shape)}.")
        plain = volume.detach().as_subclass(torch.Tensor).float().cpu().reshape(volume.shape[-3:])
        if min(plain.shape) < MIN_SIDE:
            sides = " x ".join(map(str, plain.shape))
            raise InputError(f"{name} is {sides}; LPIPS features need {MIN_SIDE} voxels or more along every axis.")
        if not plain.isfinite().all():
            raise InputError(f"{name} has voxels that are not finite; decode it in full precision, or leave it out.")
        plain = plain.clamp(0, 1)
        inside = plain[plain > FOREGROUND].numpy()
        self.histograms.append(np.histogram(inside, N_BINS, (0, 1))[0] / max(1, inside.size))
        self.features.append(self.lpips.features(plain, self.slice_step))
        self.names.append(name)


def compare(samples: VolumeSet, real: VolumeSet) -> dict[str, float]:
    """Distance of a set of samples from a set of real scans.

    Returns:
        `histogram_distance`: Wasserstein distance between the mean intensity histograms of the foregrounds, in units
        of model space's intensity; nan if a volume has no foreground, because a mean without it would flatter. `mmd`:
        squared maximum mean discrepancy of the LPIPS features, about 0, also below, for sets of one kind (see `_mmd`).

    Raises:
        InputError: a set has fewer than two volumes.
    """
    sizes = len(samples.names), len(real.names)
    if min(sizes) < 2:
        counts = f"{sizes[0]} samples and {sizes[1]} real scans"
        raise InputError(f"each set needs two volumes or more, got {counts}; give more, or leave the comparison out.")
    distance = math.nan
    if all(histogram.any() for histogram in samples.histograms + real.histograms):
        bins = (np.arange(N_BINS) + 0.5) / N_BINS
        ours, theirs = (np.mean(one.histograms, axis=0) for one in (samples, real))
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


def nearest_neighbours(latents: Iterable[Named], training: Iterable[Named]) -> list[dict[str, Any]]:
    """The training volume that is nearest to each latent.

    Args:
        latents: names and latents (C, D, H, W); all are held in memory.
        training: names and posterior means, read once, one at a time.

    Returns:
        Dicts with name, nearest, and distance: root mean square over the values of the latent. 0 is a copy.

    Raises:
        InputError: there are latents but no training volumes, or one has another shape.
    """
    pairs = list(latents)
    rows: list[dict[str, Any]] = [{"name": name, "nearest": "", "distance": math.inf} for name, _ in pairs]
    for nearest, mu in training:
        for row, (name, z) in zip(rows, pairs, strict=True):
            if z.shape != mu.shape:
                shapes = f"{tuple(z.shape)} and {tuple(mu.shape)}"
                raise InputError(f"the latents of {name} and {nearest} are {shapes}; encode both with one network.")
            distance = _rms(z, mu)
            if distance < row["distance"]:
                row |= {"nearest": nearest, "distance": distance}
    for row in rows:
        if not row["nearest"]:
            raise InputError(f"{row['name']} has no neighbour: there is no training latent at a finite distance of it.")
    return rows


def nearest_among(training: Iterable[Named]) -> float:
    """Median over training volumes of the distance to the nearest other one.

    Neighbours are found by a matrix product, which is fast and rounds; their distances are then computed exactly.

    Args:
        training: names and posterior means (C, D, H, W); all are held in memory.

    Returns:
        The median of root mean squares over the values of the latent; nan for fewer than two volumes.

    Raises:
        InputError: the latents differ in shape.
    """
    means = [mu.float().flatten() for _, mu in training]
    if len(means) < 2:
        return math.nan
    if len({len(mu) for mu in means}) > 1:
        raise InputError("the training latents differ in shape; encode the cohort anew with one network.")
    matrix = torch.stack(means)
    matrix -= matrix.mean(0)  # a common offset would drown the differences
    distances = torch.cdist(matrix, matrix, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    return float(np.median([_rms(matrix[own], matrix[other]) for own, other in enumerate(distances.argmin(1))]))


def _mmd(first: torch.Tensor, second: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of features, (M, F) and (N, F).

    Gaussian kernel exp(-d^2 / (2 s^2)) whose s^2 is the median squared distance of the pooled set. By hand, because
    `monai.metrics.MMDMetric` wants sets of equal size and has the linear kernel alone, which compares the means; its
    estimator is this one. Without bias the value is 0 in the mean for sets of one kind, hence at times below.

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
