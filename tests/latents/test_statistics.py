"""Streaming statistics of latents are those of two passes over all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from scripts.latents import LatentStatistics


def posteriors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means far from zero with another spread in each channel, log-variances from -9 to 2."""
    generator = torch.Generator().manual_seed(n)
    channel = torch.arange(1.0, 5).view(-1, 1, 1, 1)
    mu = torch.randn(n, 4, 3, 4, 3, generator=generator) * channel + 30 * channel
    return mu, 11 * torch.rand(n, 4, 3, 4, 3, generator=generator) - 9


def streamed(mu: torch.Tensor, logvar: torch.Tensor) -> LatentStatistics:
    """One volume added after the other."""
    statistics = LatentStatistics()
    for one_mu, one_logvar in zip(mu, logvar, strict=True):
        statistics.update(one_mu, one_logvar)
    return statistics


def flat(result: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under joined keys."""
    parts = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in result.items()]
    return {key: value for part in parts for key, value in part.items()}


@pytest.mark.parametrize("n", [1, 7])
def test_streaming_is_two_pass(n: int) -> None:
    """Every figure, of two shares merged, against numpy over all, to 1e-9 (float64 sums of at most 1e4 values)."""
    (mu, logvar), statistics = posteriors(n), LatentStatistics()
    for share in (slice(0, None, 2), slice(1, None, 2)):
        statistics.merge(streamed(mu[share], logvar[share]))
    found = flat(statistics.result())
    m, v = mu.double().numpy(), np.exp(logvar.double().numpy())
    over = (0, 2, 3, 4)
    sd, overall = np.sqrt(m.var(over) + v.mean(over)), np.sqrt(m.var() + v.mean())
    expected = {
        "n": len(m), "shape": m.shape[1:], "mu.mean": m.mean(over), "mu.sd": m.std(over), "mu.mean_overall": m.mean(),
        "mu.sd_overall": m.std(), "z.mean": m.mean(over), "z.sd": sd, "z.mean_overall": m.mean(),
        "z.sd_overall": overall, "scale_factor.channel": 1 / sd, "scale_factor.overall": 1 / overall,
        "shift.channel": m.mean(over), "shift.overall": m.mean(),
    }  # fmt: skip
    kl, units = found.pop("kl"), found.pop("active_units")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-9, err_msg=key)
    # KL is taken in float32: mu^2 of order 1e4 rounds at 1e-3, the mean at less than 1e-6 of it.
    assert math.isclose(kl, (0.5 * (m**2 + v - 1 - logvar.double().numpy())).mean(), rel_tol=1e-5)
    assert units == ((m.var(0, ddof=1) > 0.01).mean() if n > 1 else None)


def test_a_dead_channel_is_not_blown_up() -> None:
    """An sd of 0 gives the scale factor 1."""
    dead = torch.full((2, 1, 2, 2, 2), 3.0)
    assert streamed(dead, dead * -math.inf).result()["scale_factor"] == {"channel": [1.0], "overall": 1.0}
