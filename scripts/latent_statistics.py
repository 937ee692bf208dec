"""Statistics of a cohort's latents: what a diffusion model scales by, and whether the latent is alive.

Encoding computes them from the finished files, in the manifest's order, so that they do not depend on how often the
run was interrupted or by how many processes it was made. The one idea: a sample is z = mu + sigma eps, so over a
cohort its mean is that of mu and its variance is var(mu) + mean(sigma^2), without drawing anything.

Source: Rombach et al., https://arxiv.org/abs/2112.10752, appendix G (latents divided by their standard deviation),
there estimated from the first batch, here from all of the cohort.
"""

from __future__ import annotations

from typing import Any

import torch

from scripts.metrics import ActiveUnits, kl_per_value

__all__ = ["LatentStatistics"]


class LatentStatistics:
    """Streaming statistics; memory is four latents in float64, however many volumes there are."""

    def __init__(self) -> None:
        self._positions = ActiveUnits()
        self._sigma2: torch.Tensor = torch.zeros(0, dtype=torch.float64)
        self._kl = 0.0

    def update(self, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        """Add one volume's posterior, both (C, D, H, W), any float type."""
        self._positions.update(mu[None])
        sigma2 = logvar.double().exp().flatten(1).mean(1)
        self._sigma2 = sigma2 if self._positions.n == 1 else self._sigma2 + sigma2
        self._kl += float(kl_per_value(mu[None], logvar[None]))

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
        n, means, squares = self._positions.moments()
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
