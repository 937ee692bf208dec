"""Distributions over the latent to sample from, and the way between two latents.

`sample.json` fits one to a folder of latents through `scripts.sampling`. The one idea: a prior is a mean plus noise of
some covariance. `standard` is N(0, I), what the KL pulls towards; `gaussian` has the cohort's mean and variance at
every value; `lowrank` has the cohort's principal components, so that what varies together is drawn together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from sklearn.decomposition import IncrementalPCA

from scripts.errors import InputError
from scripts.files import replacing

__all__ = [
    "PRIORS",
    "GaussianPrior",
    "LowRankPrior",
    "Prior",
    "StandardPrior",
    "fit_prior",
    "interpolate",
    "load_prior",
]

LOGVAR_RANGE = (-30.0, 20.0)
PARALLEL = 1 - 1e-6  # cosine beyond which the great circle is a point or not unique
Posterior = tuple[torch.Tensor, torch.Tensor]


class Prior(ABC):
    """A distribution over latents.

    Attributes:
        mean: (C, D, H, W) float32.
    """

    kind: str
    mean: torch.Tensor

    def sample(self, seed: int, index: int, truncation: float = 1.0) -> torch.Tensor:
        """The index-th sample of a seed; it depends on nothing else that was drawn.

        Args:
            seed: of the run.
            index: of the sample, from 0.
            truncation: factor on the standard deviation about the mean; 0 gives the mean.

        Returns:
            (C, D, H, W) float32.

        Raises:
            InputError: `truncation` is negative.
        """
        if not truncation >= 0:
            raise InputError(f"'truncation' is {truncation!r}; give 0 (the mean) or a positive number.")
        state = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)
        return self.mean + truncation * self._deviation(torch.Generator().manual_seed(state))

    @abstractmethod
    def _deviation(self, generator: torch.Generator) -> torch.Tensor:
        """A sample less the mean."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What describes the prior, for `save`."""
        return {"mean": self.mean}

    def save(self, path: str | Path) -> None:
        """Write the prior to one safetensors file, for `load_prior`."""
        with replacing(path) as temporary:
            save_file({name: t.contiguous() for name, t in self.tensors().items()}, temporary, {"prior": self.kind})


class StandardPrior(Prior):
    """N(0, I).

    Args:
        shape: of the latent, (C, D, H, W).
    """

    kind = "standard"

    def __init__(self, shape: Sequence[int]) -> None:
        self.mean = torch.zeros(*shape)

    def _deviation(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(self.mean.shape, generator=generator)


class GaussianPrior(Prior):
    """An independent normal distribution at every value of the latent.

    Args:
        mean: (C, D, H, W).
        variance: the same shape.
    """

    kind = "gaussian"

    def __init__(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.mean, self.variance = mean.float(), variance.float()

    @classmethod
    def fit(cls, latents: Iterable[Posterior]) -> GaussianPrior:
        """Mean of mu; variance of mu over the volumes plus mean of sigma squared (law of total variance).

        Args:
            latents: mu and logvar, (C, D, H, W) each, read once, one at a time.

        Raises:
            InputError: fewer than two volumes.
        """
        moments = _Moments()
        for mu, logvar in latents:
            moments.add(mu, logvar)
        return cls(moments.mean, moments.total_variance())

    def _deviation(self, generator: torch.Generator) -> torch.Tensor:
        return self.variance.sqrt() * torch.randn(self.mean.shape, generator=generator)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mean and variance."""
        return {"mean": self.mean, "variance": self.variance}


class LowRankPrior(Prior):
    """Principal components of the cohort's means: z = mean + sum of sqrt(variance_k) e_k component_k, e_k ~ N(0, 1).

    Args:
        mean: (C, D, H, W).
        components: orthonormal, (K, C, D, H, W).
        variances: along them, (K,).
        residual: variance at every value that is added as independent noise, (C, D, H, W); None for none.
    """

    kind = "lowrank"

    def __init__(
        self,
        mean: torch.Tensor,
        components: torch.Tensor,
        variances: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> None:
        self.mean, self.components, self.variances = mean.float(), components.float(), variances.float()
        self.residual = None if residual is None else residual.float()

    @classmethod
    def fit(cls, latents: Iterable[Posterior], n_components: int, residual: bool = False) -> LowRankPrior:
        """Find the components by scikit-learn's incremental PCA: exact for cohorts of up to 5 K volumes.

        Args:
            latents: mu and logvar, (C, D, H, W) each, read once; memory holds a batch of 5 K means.
            n_components: K, fewer than there are volumes.
            residual: whether what the components leave of the variance, and the mean of sigma squared, is added.

        Raises:
            InputError: `n_components` is no positive number, or not fewer than there are volumes.
        """
        if isinstance(n_components, bool) or not isinstance(n_components, int) or n_components < 1:
            raise InputError(f"'n_components' is {n_components!r}; give a whole number above 0.")
        moments = _Moments()

        def means() -> Iterator[np.ndarray]:
            for mu, logvar in latents:
                moments.add(mu, logvar)
                yield mu.float().numpy().ravel()

        pca = IncrementalPCA(n_components)
        for batch in _batches(means(), 5 * n_components, n_components):
            if len(batch) <= n_components:
                raise InputError(
                    f"'n_components' is {n_components}, but there are {len(batch)} latents; give a smaller number."
                )
            pca.partial_fit(batch)
        if moments.n == 0:
            raise InputError("there are no latents to fit a prior to; encode a cohort first.")
        shape = moments.mean.shape
        components = torch.from_numpy(pca.components_).float().view(n_components, *shape)
        variances = torch.from_numpy(pca.explained_variance_).float()
        left = None
        if residual:
            explained = torch.einsum("k,k...->...", variances.double(), components.double().square())
            left = (moments.variance() - explained).clamp_min(0) + moments.sigma2 / moments.n
        return cls(torch.from_numpy(pca.mean_).view(shape), components, variances, left)

    def _deviation(self, generator: torch.Generator) -> torch.Tensor:
        weights = self.variances.sqrt() * torch.randn(len(self.variances), generator=generator)
        deviation = torch.einsum("k,k...->...", weights, self.components)
        if self.residual is not None:
            deviation = deviation + self.residual.sqrt() * torch.randn(self.mean.shape, generator=generator)
        return deviation

    def tensors(self) -> dict[str, torch.Tensor]:
        """Mean, components, variances, and the residual where there is one."""
        own = {"mean": self.mean, "components": self.components, "variances": self.variances}
        return own if self.residual is None else {**own, "residual": self.residual}


PRIORS = {kind.kind: kind for kind in (StandardPrior, GaussianPrior, LowRankPrior)}


def fit_prior(
    kind: str,
    latents: Iterable[Posterior],
    shape: Sequence[int],
    n_components: int = 16,
    residual: bool = False,
) -> Prior:
    """Fit a prior by its name.

    Args:
        kind: `standard`, `gaussian` or `lowrank`.
        latents: mu and logvar, (C, D, H, W) each; not read for `standard`.
        shape: of the latent, for `standard`.
        n_components: of `lowrank`.
        residual: of `lowrank`.

    Raises:
        InputError: the name is another, or the latents are too few.
    """
    if kind == "standard":
        return StandardPrior(shape)
    if kind == "gaussian":
        return GaussianPrior.fit(latents)
    if kind == "lowrank":
        return LowRankPrior.fit(latents, n_components, residual)
    raise InputError(f"'prior' is {kind!r}; give one of {', '.join(PRIORS)}.")


def load_prior(path: str | Path) -> Prior:
    """Read what `Prior.save` has written.

    Raises:
        InputError: the file is missing, damaged, or no prior.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("prior", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return StandardPrior(tensors["mean"].shape) if kind == "standard" else PRIORS[kind](**tensors)
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} is missing, damaged or no prior ({error}); fit it again.") from error


def interpolate(start: torch.Tensor, end: torch.Tensor, n_steps: int, kind: str = "linear") -> torch.Tensor:
    """The way from one latent to another.

    Args:
        start: (C, D, H, W).
        end: the same shape.
        n_steps: latents in all, both ends included; 2 or more.
        kind: `linear`, or `spherical`: along the great circle between the directions, the norm going over linearly, so
            that a middle is as far from zero as its ends (Shoemake, Animating rotation with quaternion curves, 1985).

    Returns:
        (n_steps, C, D, H, W).

    Raises:
        InputError: `kind` or `n_steps` is another.
        ValueError: the shapes differ.
    """
    if start.shape != end.shape:
        raise ValueError(f"start and end must have one shape, got {tuple(start.shape)} and {tuple(end.shape)}.")
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < 2:
        raise InputError(f"'n_steps' is {n_steps!r}; give a whole number of 2 or more.")
    if kind not in ("linear", "spherical"):
        raise InputError(f"'interpolation' is {kind!r}; give linear or spherical.")
    share = torch.linspace(0, 1, n_steps, dtype=torch.float64).view(-1, *[1] * start.ndim)
    first, last = start.double(), end.double()
    cosine = float((first * last).sum() / (first.norm() * last.norm()).clamp_min(1e-30))
    if kind == "linear" or abs(cosine) > PARALLEL:
        path = (1 - share) * first + share * last
    else:
        angle = float(np.arccos(cosine))
        norm = (1 - share) * first.norm() + share * last.norm()
        direction = (
            torch.sin((1 - share) * angle) * first / first.norm() + torch.sin(share * angle) * last / last.norm()
        )
        path = norm * direction / np.sin(angle)
    path[0], path[-1] = first, last
    return path.to(start.dtype)


class _Moments:
    """Running mean and variance of mu at every value (Welford), and the sum of sigma squared; float64."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.squares = self.sigma2 = torch.zeros((), dtype=torch.float64)

    def add(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        self.n += 1
        difference = mu.double() - self.mean
        self.mean = self.mean + difference / self.n
        self.squares = self.squares + difference * (mu.double() - self.mean)
        self.sigma2 = self.sigma2 + logvar.double().clamp(*LOGVAR_RANGE).exp()

    def variance(self) -> torch.Tensor:
        if self.n < 2:
            raise InputError(
                f"a prior is fitted to two latents or more, and there are {self.n}; encode a cohort first."
            )
        return self.squares / (self.n - 1)

    def total_variance(self) -> torch.Tensor:
        return self.variance() + self.sigma2 / self.n


def _batches(rows: Iterator[np.ndarray], size: int, least: int) -> Iterator[np.ndarray]:
    """Batches of `size` rows; a last one of no more than `least`, too few for a PCA, goes with the one before."""
    batch = list(islice(rows, size))
    while batch:
        following = list(islice(rows, size))
        if 0 < len(following) <= least:
            batch, following = batch + following, []
        yield np.stack(batch)
        batch = following
