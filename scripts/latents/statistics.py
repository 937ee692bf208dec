"""Statistics of a cohort's latents: what a diffusion model scales by, and whether the latent is alive.

Encoding computes them from the finished files, in the manifest's order, so that they do not depend on how often the
run was interrupted or by how many processes it was made. A sample is z = mu + sigma eps, so over a
cohort its mean is that of mu and its variance is var(mu) + mean(sigma^2), without drawing anything.

Source: Rombach et al., https://arxiv.org/abs/2112.10752, appendix G (latents divided by their standard deviation),
there estimated from the first batch, here from all of the cohort.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from scripts.networks import Posterior

__all__ = ["ActiveUnits", "LatentStatistics", "RunningMoments"]


class RunningMoments:
    """Mean and variance at every position of a latent, over a set of volumes of which one is in memory at a time.

    Welford; batches and other processes' shares merged after Chan et al. 1983. Two float64 latents on the CPU.

    Attributes:
        n: number of volumes.
        mean: their mean, (C, D/4, H/4, W/4).
        squares: their sum of squared deviations from it, the same shape.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)

    def update(self, mu: torch.Tensor) -> None:
        """Add a batch.

        Args:
            mu: posterior means (B, C, D/4, H/4, W/4); the shape behind B is the same in every call.
        """
        batch = mu.detach().as_subclass(torch.Tensor).double().cpu()
        self._add(len(batch), batch.mean(0), (batch - batch.mean(0)).square().sum(0))

    def merge(self, other: RunningMoments) -> None:
        """Add what another instance has seen, such as another process's share of the set."""
        if other.n:
            self._add(other.n, other.mean, other.squares)

    def _add(self, n: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        if n == 0:
            return
        if self.n == 0:
            self.n, self.mean, self.squares = n, mean, squares
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"latents of {tuple(self.mean.shape)} and of {tuple(mean.shape)} cannot be compared.")
        difference, total = mean - self.mean, self.n + n
        self.squares = self.squares + squares + difference.square() * (self.n * n / total)
        self.mean = self.mean + difference * (n / total)
        self.n = total


class ActiveUnits(RunningMoments):
    """Share of the latent's channel-positions whose mu varies across a set of volumes (Burda et al. 2016)."""

    def share(self, threshold: float = 0.01) -> float:
        """Share in [0, 1] of positions with a sample variance above `threshold`; nan for fewer than two volumes."""
        if self.n < 2:
            return math.nan
        return float((self.squares / (self.n - 1) > threshold).double().mean())


class LatentStatistics:
    """Streaming statistics; memory is four latents in float64, however many volumes there are."""

    def __init__(self) -> None:
        self._positions = ActiveUnits()
        self._sigma2: torch.Tensor = torch.zeros(0, dtype=torch.float64)
        self._kl = 0.0

    def update(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        """Add one volume's posterior, both (C, D, H, W), any float type."""
        self._positions.update(mu[None])
        sigma2 = logvar.double().exp().flatten(1).mean(1).cpu()
        self._sigma2 = sigma2 if self._positions.n == 1 else self._sigma2 + sigma2
        self._kl += float(Posterior(mu, logvar).kl().mean())

    def merge(self, other: LatentStatistics) -> None:
        """Add what another instance has seen, such as another process's share of the set."""
        if other._positions.n:
            self._sigma2 = other._sigma2 if self._positions.n == 0 else self._sigma2 + other._sigma2
            self._positions.merge(other._positions)
            self._kl += other._kl

    def result(self) -> dict[str, Any]:
        """The statistics, ready for JSON.

        Returns:
            `n`; `shape`; `mu` and `z`, each with `mean` and `sd` per channel (C) and `mean_overall`, `sd_overall`
            over all of them; `scale_factor` (1 / sd of z) and `shift` (mean of z), per `channel` and `overall`; `kl`
            in nats per latent value; `active_units`, None for one volume. Every sd divides by the number of values.
            A dead channel (sd 0) has the scale factor 1.

        Raises:
            ValueError: nothing was added.
        """
        if self._positions.n == 0:
            raise ValueError("no latent was added.")
        n, means, squares = self._positions.n, self._positions.mean, self._positions.squares
        mean, variance = _per_channel(means.flatten(1), squares.flatten(1) / n)
        sigma2 = self._sigma2 / n
        result: dict[str, Any] = {"n": n, "shape": list(means.shape)}
        for name, total in (("mu", variance), ("z", variance + sigma2)):
            overall = total.mean() + mean.var(unbiased=False)
            result[name] = {
                "mean": mean.tolist(),
                "sd": total.sqrt().tolist(),
                "mean_overall": float(mean.mean()),
                "sd_overall": float(overall.sqrt()),
            }
        z = result["z"]
        result["scale_factor"] = {"channel": [_inverse(sd) for sd in z["sd"]], "overall": _inverse(z["sd_overall"])}
        result["shift"] = {"channel": z["mean"], "overall": z["mean_overall"]}
        share = self._positions.share()
        return {**result, "kl": self._kl / n, "active_units": share if n > 1 else None}


def _per_channel(means: torch.Tensor, variances: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each row from those of its positions, all of the same count."""
    return means.mean(1), variances.mean(1) + means.var(1, unbiased=False)


def _inverse(sd: float) -> float:
    return 1 / sd if sd > 0 else 1.0
