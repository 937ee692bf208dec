"""Streaming statistics of latents are those of two passes over all of them."""

from __future__ import annotations

import math
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from test_latents import HEADER

from scripts.jobs.encode import finish_folder
from scripts.latents import LatentStatistics, latent_path, read_manifest, write_latent

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


def streamed(mu: torch.Tensor, logvar: torch.Tensor) -> dict:
    """Result of adding one volume after the other."""
    statistics = LatentStatistics()
    for one_mu, one_logvar in zip(mu, logvar, strict=True):
        statistics.update(one_mu, one_logvar)
    return statistics.result()


@pytest.mark.parametrize("case", CASES)
def test_streaming_is_two_pass(case: str) -> None:
    """Every figure against numpy over the stacked cohort, to 1e-9 (float64 sums of at most 1e4 values)."""
    mu, logvar = posteriors(*CASES[case])
    found = streamed(mu, logvar)
    m, v = mu.double().numpy(), np.exp(logvar.double().numpy())
    over = (0, 2, 3, 4)
    sd_z = np.sqrt(m.var(over) + v.mean(over))
    overall = np.sqrt(m.var() + v.mean())
    expected = {
        "mu_mean": m.mean(over), "mu_sd": m.std(over), "z_mean": m.mean(over), "z_sd": sd_z,
        "scale": 1 / sd_z, "overall": 1 / overall, "shift": m.mean(),
    }  # fmt: skip
    got = {
        "mu_mean": found["mu"]["mean"], "mu_sd": found["mu"]["sd"], "z_mean": found["z"]["mean"],
        "z_sd": found["z"]["sd"], "scale": found["scale_factor"]["channel"],
        "overall": found["scale_factor"]["overall"], "shift": found["shift"]["overall"],
    }  # fmt: skip
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-9, err_msg=key)
    # kl_per_value works in float32: mu^2 of order 1e4 rounds at 1e-3, the mean at less than 1e-6 of it.
    kl = (0.5 * (m**2 + v - 1 - logvar.double().numpy())).mean()
    assert math.isclose(found["kl"], kl, rel_tol=1e-5)
    if len(mu) > 1:
        assert found["active_units"] == (m.var(0, ddof=1) > 0.01).mean()
    else:
        assert found["active_units"] is None


def test_shares_merge_to_the_whole() -> None:
    """Three shares, one of them empty, give the figures of one pass, to the rounding of float64."""
    mu, logvar = posteriors(7, (4, 3, 4, 3), torch.float32)
    merged = LatentStatistics()
    for share in (slice(0, 7, 2), slice(7, 7), slice(1, 7, 2)):
        part = LatentStatistics()
        for one_mu, one_logvar in zip(mu[share], logvar[share], strict=True):
            part.update(one_mu, one_logvar)
        merged.merge(part)
    found, expected = merged.result(), streamed(mu, logvar)
    assert found["n"] == 7 and found["active_units"] == expected["active_units"]
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-12)
    for name in ("mu", "z"):
        for key, value in expected[name].items():
            assert found[name][key] == pytest.approx(value, rel=1e-12)


def test_the_scale_factor_is_that_of_drawn_samples() -> None:
    """z = mu + sigma eps, drawn: its sd times the scale factor is 1 within the error of 8,000 draws a channel."""
    mu, logvar = posteriors(50, (2, 4, 5, 4), torch.float32)
    z = mu + torch.exp(logvar / 2) * torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
    scaled = z.transpose(0, 1).flatten(1).std(1) * torch.tensor(streamed(mu, logvar)["scale_factor"]["channel"])
    np.testing.assert_allclose(scaled, 1, atol=0.05)


def test_a_dead_channel_is_not_blown_up() -> None:
    """No spread and almost no sigma: scale factor 1e6 is honest, sd 0 gives 1."""
    statistics = LatentStatistics()
    for _ in range(2):
        statistics.update(torch.full((1, 2, 2, 2), 3.0), torch.full((1, 2, 2, 2), -math.inf))
    assert statistics.result()["scale_factor"] == {"channel": [1.0], "overall": 1.0}


def test_nothing_has_no_statistics() -> None:
    """An empty cohort is an error, not NaN."""
    with pytest.raises(ValueError, match="no latent"):
        LatentStatistics().result()


def test_memory_does_not_grow() -> None:
    """Peak of 400 volumes within 5 % of that of 40."""
    peaks = []
    for n in (40, 400):
        statistics = LatentStatistics()
        tracemalloc.start()
        for seed in range(n):
            value = torch.full((4, 7, 8, 7), float(seed))
            statistics.update(value, -value)
        statistics.result()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] + 10_000


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_large_folder_is_finished_in_flat_memory_and_linear_time(n: int, tmp_path: Path) -> None:
    """A folder of n files beside one of n / 4: a file costs at most 1.5 times as much; memory grows by a path and a row
    of the report (about 2,000 bytes each), not by the content (4,096 bytes and two tensors)."""
    seconds, peaks = [], []
    for count in (2, n // 4, n):  # the first imports what a report needs
        folder = tmp_path / str(count)
        for number in range(count):
            mu = torch.full((4, 4, 8, 4), float(number))
            name = f"sub-{number:05d}"
            path = latent_path(folder, name, shards=16)
            write_latent(path, mu, -mu / n, {**HEADER, "name": name, "weights_sha256": "w"})
        tracemalloc.start()
        start = time.process_time()
        finish_folder(folder, {"weights_sha256": "w"})
        seconds.append((time.process_time() - start) / count)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert seconds[2] < 1.5 * seconds[1]
    assert peaks[2] < peaks[1] + 3_000 * (n - n // 4)
    assert sum(1 for _ in read_manifest(tmp_path / str(n))) == n
