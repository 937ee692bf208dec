"""Distributions over the latent to sample from, and the way between two latents.

`sample.json` fits one to a folder of latents through `scripts.jobs.sample`. A prior is a mean plus noise of
some covariance. `standard` is N(0, I), what the KL pulls towards; `gaussian` has the cohort's mean and variance at
every value; `lowrank` has the cohort's principal components, so that what varies together is drawn together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

from scripts.latents.statistics import RunningMoments
from scripts.networks import Posterior
from scripts.run import InputError, replacing

__all__ = ["GaussianPrior", "LowRankPrior", "Prior", "StandardPrior", "fit_prior", "interpolate", "load_prior"]

PARALLEL = 1 - 1e-6  # cosine beyond which the great circle is a point or not unique


class Prior(ABC):
    """A distribution over latents.

    Attributes:
        mean: (C, D, H, W) float32.
        label: of the volumes that it was fitted to, kept in the file; "" for every volume.
    """

    kind: str
    parts: tuple[str, ...] = ("mean",)  # the tensors that describe it
    mean: Tensor
    label: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample, (C, D, H, W)."""
        return tuple(self.mean.shape)

    def sample(self, seed: int, index: int, truncation: float = 1.0) -> Tensor:
        """The index-th sample of a seed; it depends on nothing else that was drawn.

        torch's CPU generator has 2^32 starting points: two of 10,000 samples are equal with a probability of 1 %.

        Args:
            seed: of the run, a whole number from 0.
            index: of the sample, from 0.
            truncation: factor on the standard deviation about the mean; 0 gives the mean.

        Returns:
            (C, D, H, W) float32.

        Raises:
            InputError: `seed` is negative or no whole number, or `truncation` negative or no finite number.
        """
        _check_whole("seed", seed, 0)
        if not isinstance(truncation, int | float) or not 0 <= truncation < math.inf:
            raise InputError(f"'truncation' is {truncation!r}; give 0 (the mean) or a positive number.")
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) >> 1
        return self.mean + truncation * self._deviation(torch.Generator().manual_seed(state))

    @abstractmethod
    def _deviation(self, generator: torch.Generator) -> Tensor:
        """A sample less the mean."""

    def save(self, path: str | Path) -> None:
        """Write the prior to one safetensors file, for `load_prior`; InputError where that cannot be written."""
        tensors = {name: getattr(self, name).contiguous() for name in self.parts if getattr(self, name) is not None}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"prior": self.kind, "label": self.label})


class StandardPrior(Prior):
    """N(0, I), for a latent of shape (C, D, H, W)."""

    kind = "standard"

    def __init__(self, shape: Sequence[int]) -> None:
        self.mean = torch.zeros(*shape)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.mean.shape, generator=generator)


class GaussianPrior(Prior):
    """An independent normal distribution at every value of the latent; mean and variance are (C, D, H, W)."""

    kind = "gaussian"
    parts = ("mean", "variance")

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self.mean, self.variance = mean.float(), variance.float()

    @classmethod
    def fit(cls, latents: Iterable[Posterior]) -> GaussianPrior:
        """Mean of mu; variance of mu over the volumes plus mean of sigma squared (law of total variance).

        Args:
            latents: of one volume each, (C, D, H, W), read once, one at a time.

        Raises:
            InputError: fewer than two volumes, or one of another shape or with values that are not finite.
        """
        moments = _Moments()
        for posterior in latents:
            moments.add(posterior)
        return cls(moments.mean, moments.variance() + moments.sigma2 / moments.n)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        return self.variance.sqrt() * torch.randn(self.mean.shape, generator=generator)


class LowRankPrior(Prior):
    """Principal components of the cohort's means: z = mean + sum of sqrt(variance_k) e_k component_k, e_k ~ N(0, 1).

    Args:
        mean: (C, D, H, W).
        components: orthonormal, (K, C, D, H, W).
        variances: along them, (K,).
        residual: variance at every value that is added as independent noise, (C, D, H, W); None for none.
    """

    kind = "lowrank"
    parts = ("mean", "components", "variances", "residual")

    def __init__(self, mean: Tensor, components: Tensor, variances: Tensor, residual: Tensor | None = None) -> None:
        self.mean, self.components, self.variances = mean.float(), components.float(), variances.float()
        self.residual = None if residual is None else residual.float()

    @classmethod
    def fit(cls, latents: Iterable[Posterior], n_components: int, residual: bool = False) -> LowRankPrior:
        """Find the components by incremental PCA: exact for up to 5 K volumes, beyond with slightly small variances.

        Args:
            latents: of one volume each, (C, D, H, W), read once; memory holds a batch of 5 K means.
            n_components: K, fewer than there are volumes.
            residual: whether what the components leave of the variance, and the mean of sigma squared, is added.

        Raises:
            InputError: `n_components` is not from 1 to the number of volumes less one, or as in `GaussianPrior.fit`.
        """
        _check_whole("n_components", n_components, 1)
        moments = _Moments()
        means = (moments.add(posterior).numpy().ravel() for posterior in latents)
        pca = IncrementalPCA(n_components)
        for batch in _batches(means, 5 * n_components, n_components):
            if len(batch) > n_components:
                pca.partial_fit(batch)
        variance, n = moments.variance(), moments.n
        if n <= n_components:
            raise InputError(f"'n_components' is {n_components}, but there are {n} latents; give a smaller number.")
        components, variances = (torch.from_numpy(part) for part in (pca.components_, pca.explained_variance_))
        explained = (variances.double() @ components.double().square()).view_as(variance)
        left = (variance - explained).clamp_min(0) + moments.sigma2 / n
        return cls(moments.mean, components.view(-1, *variance.shape), variances, left if residual else None)

    def _deviation(self, generator: torch.Generator) -> Tensor:
        weights = self.variances.sqrt() * torch.randn(len(self.variances), generator=generator)
        deviation = torch.einsum("k,k...->...", weights, self.components)
        if self.residual is not None:
            deviation = deviation + self.residual.sqrt() * torch.randn(self.mean.shape, generator=generator)
        return deviation


PRIORS = {prior.kind: prior for prior in (StandardPrior, GaussianPrior, LowRankPrior)}


def fit_prior(
    name: str, latents: Iterable[Posterior], shape: Sequence[int], n_components: int = 16, residual: bool = False
) -> Prior:
    """Fit a prior by its name.

    Args:
        name: `standard`, `gaussian` or `lowrank`.
        latents: of one volume each, (C, D, H, W), read once; not read for `standard`.
        shape: of the latent, (C, D, H, W).
        n_components, residual: of `lowrank`, see `LowRankPrior.fit`.

    Returns:
        The prior, with label "".

    Raises:
        InputError: the name is none of its values, or the latents are too few, of another shape, or not finite.
    """
    if name not in PRIORS:
        raise InputError(f"'prior' is {name!r}; give one of {', '.join(PRIORS)}.")
    if name == "standard":
        return StandardPrior(shape)
    prior = GaussianPrior.fit(latents) if name == "gaussian" else LowRankPrior.fit(latents, n_components, residual)
    if prior.shape != tuple(shape):
        raise InputError(f"the latents are {prior.shape}, not {tuple(shape)}; encode the cohort with this network.")
    return prior


def load_prior(path: str | Path) -> Prior:
    """Read what `Prior.save` has written.

    Raises:
        InputError: the file is missing, damaged, or no prior.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        kind = metadata.get("prior", "")
        prior: Prior = StandardPrior(tensors["mean"].shape) if kind == "standard" else PRIORS[kind](**tensors)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing, damaged or no prior ({error}); fit it again.") from error
    prior.label = metadata.get("label", "")
    return prior


def interpolate(start: Tensor, end: Tensor, n_steps: int, kind: str = "linear") -> Tensor:
    """The way from one latent to another.

    Args:
        start, end: (C, D, H, W) both.
        n_steps: latents in all, both ends included; 2 or more.
        kind: `linear`, or `spherical`: along the great circle, the norm going over linearly, so that a middle is as
            far from zero as its ends; straight where the ends are nearly parallel, opposite or zero.

    Returns:
        (n_steps, C, D, H, W) of the start's dtype; the first and last are the ends themselves.

    Raises:
        InputError: `kind` or `n_steps` is none of its values, or the shapes differ.

    Source: Shoemake K., Animating Rotation with Quaternion Curves, SIGGRAPH 1985.
    """
    if start.shape != end.shape:
        raise InputError(f"the two latents are {tuple(start.shape)} and {tuple(end.shape)}; give two of one network.")
    _check_whole("n_steps", n_steps, 2)
    if kind not in ("linear", "spherical"):
        raise InputError(f"'interpolation' is {kind!r}; give linear or spherical.")
    share = torch.linspace(0, 1, n_steps, dtype=torch.float64).view(-1, *[1] * start.ndim)
    first, last = start.double(), end.double()
    lengths = first.norm(), last.norm()
    cosine = float((first * last).sum() / (lengths[0] * lengths[1])) if min(lengths) > 0 else 1.0
    weights = [1 - share, share]
    if kind == "spherical" and abs(cosine) <= PARALLEL:
        angle = math.acos(cosine)
        norm = weights[0] * lengths[0] + weights[1] * lengths[1]
        weights = [norm * torch.sin(w * angle) / math.sin(angle) / n for w, n in zip(weights, lengths, strict=True)]
    path = weights[0] * first + weights[1] * last
    path[0], path[-1] = first, last
    return path.to(start.dtype)


class _Moments(RunningMoments):
    """Moments of checked posteriors: those of mu, and the sum of sigma squared; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma2 = torch.zeros((), dtype=torch.float64)

    def add(self, posterior: Posterior) -> Tensor:
        """Take in a posterior and give back mu."""
        number, mu, logvar = self.n + 1, posterior.mu, posterior.logvar
        if self.n and mu.shape != self.mean.shape:
            raise InputError(f"latent number {number} is of another shape than the first; encode the cohort anew.")
        if not (mu.isfinite().all() and logvar.isfinite().all()):
            raise InputError(f"latent number {number} has values that are not finite; encode that volume anew.")
        self.update(mu[None])
        self.sigma2 = self.sigma2 + logvar.double().exp()
        return mu

    def variance(self) -> Tensor:
        if self.n < 2:
            raise InputError(f"a prior is fitted to two latents or more, there are {self.n}; encode a cohort first.")
        return self.squares / (self.n - 1)


def _check_whole(key: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"'{key}' is {value!r}; give a whole number of {least} or more.")


def _batches(rows: Iterator[np.ndarray], size: int, least: int) -> Iterator[np.ndarray]:
    """Batches of `size` rows; a last one of no more than `least`, too few for a PCA, goes with the one before."""
    batch = list(islice(rows, size))
    while batch:
        following = list(islice(rows, size))
        if 0 < len(following) <= least:
            batch, following = batch + following, []
        yield np.stack(batch)
        batch = following
