"""Priors: fitted as said, drawn reproducibly, kept exactly; the way between two latents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.latents import GaussianPrior, LowRankPrior, Prior, StandardPrior, fit_prior, interpolate, load_prior
from scripts.networks import Posterior
from scripts.run import InputError

SHAPE = (2, 2, 3, 2)
N = 60


def cohort(n: int = N, rank: int = 3, seed: int = 0) -> list[Posterior]:
    """Posteriors whose means vary along a few directions, plus a little at every value."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(rank, *SHAPE, generator=generator)
    weights = torch.randn(n, rank, generator=generator) * torch.tensor([3.0, 2.0, 1.0])[:rank]
    means = 5 + torch.einsum("nk,k...->n...", weights, directions) + 0.1 * torch.randn(n, *SHAPE, generator=generator)
    logvars = torch.randn(n, *SHAPE, generator=generator) - 3
    return [Posterior(mu, logvar) for mu, logvar in zip(means, logvars, strict=True)]


PRIORS = {
    "standard": StandardPrior(SHAPE),
    "gaussian": fit_prior("gaussian", cohort(), SHAPE),
    "lowrank": fit_prior("lowrank", iter(cohort()), SHAPE, 3),  # a generator is enough
    "lowrank with residual": fit_prior("lowrank", cohort(), SHAPE, 3, True),
}


def draws(prior: Prior, n: int = 4000) -> torch.Tensor:
    """Many samples of one seed."""
    return torch.stack([prior.sample(7, index) for index in range(n)])


@pytest.mark.parametrize("name", PRIORS)
def test_a_sample_depends_on_seed_and_index_alone(name: str) -> None:
    """Not on the global generator, nor on what was drawn before; truncation scales about the mean."""
    prior, state = PRIORS[name], torch.get_rng_state()
    first = prior.sample(2**63, 7)
    assert (first.shape, first.dtype) == (prior.shape, torch.float32)
    assert not torch.equal(prior.sample(2**63, 8), first) and not torch.equal(prior.sample(2**63 + 1, 7), first)
    assert not torch.equal(prior.sample(1, 0), prior.sample(0, 1))
    assert torch.equal(prior.sample(2**63, 7), first) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prior.sample(0, 0, 0), prior.mean)
    half = prior.mean + (first - prior.mean) / 2
    torch.testing.assert_close(prior.sample(2**63, 7, 0.5), half, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    """The same samples and the same label, and nothing beside the file."""
    prior = fit_prior(name.split()[0], cohort(), SHAPE, 3, "residual" in name)
    assert prior.label == ""
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
    """Against numpy in two passes; and its samples have them, within 5 standard errors of a variance of 4,000 draws."""
    means = torch.stack([posterior.mu for posterior in cohort()]).double().numpy()
    sigma2 = torch.stack([posterior.logvar for posterior in cohort()]).double().exp().mean(0).numpy()
    variance, prior = means.var(0, ddof=1) + sigma2, PRIORS["gaussian"]
    assert isinstance(prior, GaussianPrior)
    np.testing.assert_allclose(prior.mean, means.mean(0), rtol=1e-6)
    np.testing.assert_allclose(prior.variance, variance, rtol=1e-6)
    np.testing.assert_allclose(draws(prior).var(0) / variance, 1, atol=0.12)
    np.testing.assert_allclose(draws(PRIORS["standard"]).var(0), 1, atol=0.12)


@pytest.mark.parametrize("n", [15, 16, 18, 19, N])
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
    np.testing.assert_allclose(overlap.diagonal(), 1, atol=1e-5 if is_one_batch else 1e-3)


def test_low_rank_samples_lie_along_the_components() -> None:
    """With the variance of each, uncorrelated, and nowhere else; 5 standard errors of 4,000 draws."""
    prior = PRIORS["lowrank"]
    assert isinstance(prior, LowRankPrior)
    samples = (draws(prior) - prior.mean).flatten(1)
    basis = prior.components.flatten(1)
    along = samples @ basis.T
    torch.testing.assert_close(along @ basis, samples, rtol=0, atol=1e-4)  # float32 of values about 10
    torch.testing.assert_close(along.var(0) / prior.variances, torch.ones(3), rtol=0, atol=0.12)
    torch.testing.assert_close(along.T.corrcoef(), torch.eye(3), rtol=0, atol=0.08)


def test_the_residual_completes_the_variance() -> None:
    """With it, every value has the cohort's total variance."""
    total = PRIORS["gaussian"].variance  # type: ignore[attr-defined]
    np.testing.assert_allclose(draws(PRIORS["lowrank with residual"]).var(0) / total, 1, atol=0.12)


@pytest.mark.parametrize(
    ("kind", "n", "message"),
    [
        ("flow", 9, "'prior'"),
        ("gaussian", 1, "two latents or more"),
        ("lowrank", 3, "'n_components' is 3, but there are 3"),
        ("lowrank", 0, "there are 0"),
    ],
)
def test_what_cannot_be_fitted_or_drawn_is_said(kind: str, n: int, message: str) -> None:
    """With the numbers."""
    with pytest.raises(InputError, match=message):
        fit_prior(kind, cohort(n), SHAPE, 3)
    for seed, truncation, key in ((0, -1, "truncation"), (0, math.nan, "truncation"), (-1, 1.0, "seed")):
        with pytest.raises(InputError, match=f"'{key}'"):
            PRIORS["standard"].sample(seed, 0, truncation)


@pytest.mark.parametrize("kind", ["gaussian", "lowrank"])
def test_latents_that_do_not_fit_are_refused(kind: str) -> None:
    """Another shape than the network's or than the first's (it could be broadcast), and values that are not finite."""
    data = cohort(9)
    mu, logvar = data[0].mu, data[0].logvar
    for latents, shape, message in (
        (data, (4, *SHAPE[1:]), r"not \(4, 2, 3, 2\)"),
        ([*data, Posterior(mu[:1], logvar[:1])], SHAPE, "number 10 is of another shape"),
        ([*data, Posterior(mu * math.nan, logvar)], SHAPE, "number 10 has values"),
    ):
        with pytest.raises(InputError, match=message):
            fit_prior(kind, latents, shape, 2)


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_a_way_has_its_ends_and_norms_between(kind: str) -> None:
    """Exact ends; equal steps on a line, or equal angles and norms that go over linearly along the arc."""
    n_steps, ends = 7, torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    start, end = ends * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    path = interpolate(start, end, n_steps, kind)
    assert path.shape == (n_steps, *SHAPE)
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    share = torch.linspace(0, 1, n_steps)
    if kind == "linear":
        expected = torch.stack([torch.lerp(start, end, float(s)) for s in share])
        torch.testing.assert_close(path, expected, rtol=1e-5, atol=1e-5)
    else:
        norms = path.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.lerp(norms[0], norms[-1], share), rtol=1e-4, atol=1e-4)
        angles = torch.cosine_similarity(path.flatten(1), start.flatten()[None].double()).clamp(-1, 1).acos()
        torch.testing.assert_close(angles, share * angles[-1], rtol=0, atol=1e-3, check_dtype=False)


def test_opposite_and_equal_ends_go_straight() -> None:
    """Where there is no one great circle; zero has no direction."""
    z = torch.randn(SHAPE)
    for end in (z, -z, 2 * z, 0 * z):
        torch.testing.assert_close(interpolate(z, end, 3, "spherical")[1], (z + end) / 2)


def test_an_impossible_way_is_refused() -> None:
    """The key is named, and latents of two networks are noticed."""
    z = torch.ones(SHAPE)
    for end, n_steps, kind in ((z, 1, "linear"), (z, 3, "cubic"), (z[:1], 3, "linear")):
        with pytest.raises(InputError, match="'n_steps'|'interpolation'|two latents"):
            interpolate(z, end, n_steps, kind)
