"""Streaming statistics of latents are those of two passes over all of them."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_storage import HEADER

from scripts.jobs.encode import finish_folder
from scripts.latents import ActiveUnits, LatentStatistics, latent_path, read_manifest, write_latent

CASES = {  # volumes, shape, type
    "one volume": (1, (4, 2, 3, 2), torch.float32),
    "some": (7, (4, 3, 4, 3), torch.float32),
    "float16": (5, (4, 3, 4, 3), torch.float16),
    "one channel": (6, (1, 4, 4, 4), torch.float32),
}


def posteriors(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Means far from zero with another spread in each channel, log-variances from -9 to 2."""
    generator = torch.Generator().manual_seed(n)
    channel = torch.arange(1.0, shape[0] + 1).view(-1, 1, 1, 1)
    mu = torch.randn(n, *shape, generator=generator) * channel + 30 * channel
    logvar = 11 * torch.rand(n, *shape, generator=generator) - 9
    return mu.to(dtype), logvar.to(dtype)


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


@pytest.mark.parametrize("case", CASES)
def test_streaming_is_two_pass(case: str) -> None:
    """Every figure against numpy over the stacked cohort, to 1e-9 (float64 sums of at most 1e4 values)."""
    mu, logvar = posteriors(*CASES[case])
    found = flat(streamed(mu, logvar).result())
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
    assert units == ((m.var(0, ddof=1) > 0.01).mean() if len(m) > 1 else None)


def test_shares_merge_to_the_whole() -> None:
    """Three shares, one of them empty, give the figures of one pass, to the rounding of float64."""
    mu, logvar = posteriors(7, (4, 3, 4, 3), torch.float32)
    merged = LatentStatistics()
    for share in (slice(0, 7, 2), slice(7, 7), slice(1, 7, 2)):
        merged.merge(streamed(mu[share], logvar[share]))
    for key, value in flat(streamed(mu, logvar).result()).items():
        np.testing.assert_allclose(flat(merged.result())[key], value, rtol=1e-12, err_msg=key)


def test_a_dead_channel_is_not_blown_up() -> None:
    """An sd of 0 gives the scale factor 1, and an empty cohort an error instead of NaN."""
    with pytest.raises(ValueError, match="no latent"):
        LatentStatistics().result()
    dead = torch.full((2, 1, 2, 2, 2), 3.0)
    assert streamed(dead, dead * -math.inf).result()["scale_factor"] == {"channel": [1.0], "overall": 1.0}


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True), offset=st.floats(-1e3, 1e3), seed=st.integers(0, 9))
def test_active_units_do_not_depend_on_batches(cuts: list[int], offset: float, seed: int) -> None:
    """Any cut into batches, and merging two halves, gives the variance of the whole set."""
    mu = torch.randn(12, 2, 3, 3, 3, generator=torch.Generator().manual_seed(seed)).double() * 0.1 + offset
    units, other = ActiveUnits(), ActiveUnits()
    for number, batch in enumerate(mu.tensor_split(sorted(cuts))):
        (other if number % 2 else units).update(batch)
    units.merge(other)
    assert units.n == 12 and units.share(0.01) == float((mu.var(0) > 0.01).double().mean())


def test_active_units_counts_what_varies() -> None:
    """One of two channels varies by more than the threshold; one volume alone says nothing."""
    units = ActiveUnits()
    units.update(torch.tensor([0.0, 0.0]).view(1, 2, 1, 1, 1))
    assert math.isnan(units.share())
    units.update(torch.tensor([0.3, 0.1]).view(1, 2, 1, 1, 1))  # variances 0.045 and 0.005
    assert units.share() == 0.5
    with pytest.raises(ValueError, match="cannot be compared"):
        units.update(torch.zeros(1, 2, 2, 1, 1))


@pytest.mark.slow
def test_a_large_folder_is_finished_in_flat_memory(tmp_path: Path, n: int = 1_000) -> None:
    """Beside a folder of n / 4 files, memory grows by a path and a row of the report a file (about 2,000 bytes), not by
    the content (two tensors of 4,096 bytes)."""
    peaks = []
    for count in (2, n // 4, n):  # the first imports what a report needs
        folder = tmp_path / str(count)
        for number in range(count):
            mu = torch.full((4, 4, 8, 8), float(number))
            name = f"sub-{number:05d}"
            path = latent_path(folder, name, shards=16)
            write_latent(path, mu, -mu / n, {**HEADER, "name": name, "weights_sha256": "w"})
        tracemalloc.start()
        finish_folder(folder, {"weights_sha256": "w"})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 3_000 * (n - n // 4)
    assert sum(1 for _ in read_manifest(tmp_path / str(n))) == n
