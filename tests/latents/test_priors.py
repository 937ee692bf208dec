"""Priors: fitted as said, drawn reproducibly, kept exactly; the way between two latents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.latents import LowRankPrior, Prior, StandardPrior, fit_prior, interpolate, load_prior
from scripts.networks import Posterior
from scripts.run import InputError

SHAPE = (2, 2, 3, 2)


def cohort(n: int = 60) -> list[Posterior]:
    """Posteriors whose means vary along three directions, plus a little at every value."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, *SHAPE, generator=generator)
    weights = torch.randn(n, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    means = 5 + torch.einsum("nk,k...->n...", weights, directions) + 0.1 * torch.randn(n, *SHAPE, generator=generator)
    logvars = torch.randn(n, *SHAPE, generator=generator) - 3
    return [Posterior(mu, logvar) for mu, logvar in zip(means, logvars, strict=True)]


PRIORS = {
    "standard": StandardPrior(SHAPE),
    "gaussian": fit_prior("gaussian", cohort(), SHAPE),
    "lowrank": fit_prior("lowrank", iter(cohort()), SHAPE, 3),  # a generator is enough
    "lowrank with residual": fit_prior("lowrank", cohort(), SHAPE, 3, True),
}


def draws(prior: Prior) -> torch.Tensor:
    """Many samples of one seed."""
    return torch.stack([prior.sample(7, index) for index in range(4000)])


@pytest.mark.parametrize("name", PRIORS)
def test_a_sample_depends_on_seed_and_index_alone(name: str) -> None:
    """Not on the global generator, nor on what was drawn before; truncation scales about the mean."""
    prior, state = PRIORS[name], torch.get_rng_state()
    first = prior.sample(2**63, 7)
    assert (first.shape, first.dtype) == (prior.shape, torch.float32)
    assert not torch.equal(prior.sample(2**63, 8), first) and not torch.equal(prior.sample(2**63 + 1, 7), first)
    assert not torch.equal(prior.sample(1, 0), prior.sample(0, 1))
    assert torch.equal(prior.sample(2**63, 7), first) and torch.equal(torch.get_rng_state(), state)
    half = prior.mean + (first - prior.mean) / 2
    torch.testing.assert_close(prior.sample(2**63, 7, 0.5), half, rtol=1e-5, atol=1e-5)
    for seed, truncation, key in ((0, -1, "truncation"), (-1, 1.0, "seed")):
        with pytest.raises(InputError, match=f"'{key}'"):
            prior.sample(seed, 0, truncation)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    """The same samples and the same label, and nothing beside the file; another file is named."""
    prior = fit_prior(name.split()[0], cohort(), SHAPE, 3, "residual" in name)
    prior.label = "patient"
    prior.save(tmp_path / "prior.safetensors")
    loaded = load_prior(tmp_path / "prior.safetensors")
    assert (type(loaded), loaded.label) == (type(prior), "patient")
    assert torch.equal(loaded.sample(3, 1), prior.sample(3, 1))
    assert [path.name for path in tmp_path.iterdir()] == ["prior.safetensors"]
    (tmp_path / "prior.safetensors").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"prior\.safetensors"):
        load_prior(tmp_path / "prior.safetensors")


def test_the_gaussian_prior_has_the_cohorts_moments() -> None:
    """Against numpy in two passes; and all samples have them, within 5 standard errors of a variance of 4,000 draws."""
    means = torch.stack([posterior.mu for posterior in cohort()]).double().numpy()
    sigma2 = torch.stack([posterior.logvar for posterior in cohort()]).double().exp().mean(0).numpy()
    variance, prior = means.var(0, ddof=1) + sigma2, PRIORS["gaussian"]
    np.testing.assert_allclose(prior.mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(prior.variance, variance, rtol=1e-6)
    for name, expected in (("gaussian", variance), ("standard", 1), ("lowrank with residual", variance)):
        np.testing.assert_allclose(draws(PRIORS[name]).var(0) / expected, 1, atol=0.12)


@pytest.mark.parametrize("n", [16, 19])
def test_components_are_those_of_a_whole_pca(n: int) -> None:
    """Against an SVD of all means at once, also where the last batch is short (15 means a batch)."""
    data = cohort(n)
    prior = LowRankPrior.fit(data, 3)
    matrix = torch.stack([posterior.mu for posterior in data]).double().numpy().reshape(n, -1)
    _, singular, rows = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
    np.testing.assert_allclose(prior.mean.ravel(), matrix.mean(0), rtol=1e-5)
    # One batch is the whole PCA, in float32. Of several, incremental PCA drops what lies outside its components after
    # each: 1e-3 of the variance here.
    is_one_batch = n <= 5 * 3 + 3
    np.testing.assert_allclose(prior.variances, singular[:3] ** 2 / (n - 1), rtol=1e-5 if is_one_batch else 5e-3)
    overlap = np.abs(rows[:3] @ prior.components.double().numpy().reshape(3, -1).T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-4 if is_one_batch else 3e-2)


def test_what_cannot_be_fitted_is_said() -> None:
    """Also another shape than the network's or than the first's (it could be broadcast), and values not finite."""
    data, mu, logvar = cohort(9), cohort(9)[0].mu, cohort(9)[0].logvar
    for kind, latents, shape, message in (
        ("flow", data, SHAPE, "'prior'"),
        ("gaussian", data[:1], SHAPE, "two latents or more"),
        ("lowrank", data[:3], SHAPE, "'n_components' is 3, but there are 3"),
        ("gaussian", data, (4, *SHAPE[1:]), r"not \(4, 2, 3, 2\)"),
        ("gaussian", [*data, Posterior(mu[:1], logvar[:1])], SHAPE, "number 10 is of another shape"),
        ("gaussian", [*data, Posterior(mu * math.nan, logvar)], SHAPE, "number 10 has values"),
    ):
        with pytest.raises(InputError, match=message):
            fit_prior(kind, latents, shape, 3)


def test_a_way_has_its_ends_and_norms_between() -> None:
    """Exact ends; equal steps on a line, or equal angles and norms that go over linearly along the arc."""
    ends = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    start, end = ends * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    path, share = interpolate(start, end, 7, "linear"), torch.linspace(0, 1, 7)
    expected = torch.stack([torch.lerp(start, end, float(s)) for s in share])
    torch.testing.assert_close(path, expected, rtol=1e-5, atol=1e-5)
    path = interpolate(start, end, 7, "spherical")
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    norms = path.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.lerp(norms[0], norms[-1], share), rtol=1e-4, atol=1e-4)
    angles = torch.cosine_similarity(path.flatten(1), start.flatten()[None].double()).clamp(-1, 1).acos()
    torch.testing.assert_close(angles, share * angles[-1], rtol=0, atol=1e-3, check_dtype=False)
    for end in (-start, 2 * start, 0 * start):  # straight where there is no one great circle
        torch.testing.assert_close(interpolate(start, end, 3, "spherical")[1], (start + end) / 2)
    for end, n_steps, kind in ((start, 1, "linear"), (start, 3, "cubic"), (start[:1], 3, "linear")):
        with pytest.raises(InputError, match="'n_steps'|'interpolation'|two latents"):
            interpolate(start, end, n_steps, kind)
