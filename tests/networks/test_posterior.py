"""The posterior: its KL divergence, samples and standard deviations, also at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch.distributions import Normal, kl_divergence

from scripts.networks import Posterior, logvar_of, sigma_of


@settings(max_examples=30, deadline=None)
@given(mu=st.floats(-30, 30), logvar=st.floats(-25, 15))
def test_kl_is_that_of_torch(mu: float, logvar: float):
    """Against torch.distributions in float64; fp32 leaves about 1e-6 of the largest of its three summands."""
    sigma = math.exp(logvar / 2)
    expected = kl_divergence(Normal(torch.tensor(mu).double(), torch.tensor(sigma).double()), Normal(0.0, 1.0)).item()
    tolerance = 1e-6 * (1 + mu**2 + sigma**2 + abs(logvar))
    for posterior in (
        Posterior(torch.tensor([mu]), torch.tensor([logvar])),
        Posterior.of_sigma(torch.tensor([mu]), torch.tensor([sigma])),
    ):
        assert posterior.kl().item() == pytest.approx(expected, abs=tolerance)


def test_kl_keeps_its_digits_near_the_prior():
    """0 for N(0, 1) itself, and logvar^2 / 4 close to it, where sigma^2 - 1 alone would lose all but one digit."""
    kl = Posterior(torch.zeros(2), torch.tensor([0.0, 1e-3])).kl()
    assert kl[0] == 0 and kl[1].item() == pytest.approx(2.5e-7, rel=2e-3)


@pytest.mark.parametrize("value", [0.0, 1e-20, math.inf])
def test_kl_stays_finite(value: float):
    """Beyond the clamp value and gradients are finite, and the value is that of the clamp's end."""
    mu, sigma = torch.ones(2, requires_grad=True), torch.full((2,), value, requires_grad=True)
    kl = Posterior.of_sigma(mu, sigma).kl().mean()
    kl.backward()
    logvar = -30 if value < 1 else 20
    assert kl.item() == pytest.approx(0.5 * (1 + math.exp(logvar) - 1 - logvar), rel=1e-5)
    assert mu.grad.tolist() == [0.5, 0.5] and sigma.grad.tolist() == [0, 0]


@pytest.mark.parametrize("logvar", [-30.0, -8.0, 20.0])
def test_sigma_and_logvar_are_inverse(logvar: float):
    """sigma is exp(logvar / 2), which gives back the log-variance up to the clamp's ends."""
    sigma = sigma_of(torch.tensor([logvar]))
    assert sigma.item() == pytest.approx(math.exp(logvar / 2), rel=1e-6)
    assert logvar_of(sigma).item() == pytest.approx(logvar, abs=1e-5)
    assert torch.equal(Posterior(sigma, torch.tensor([logvar])).sigma, sigma)
    assert torch.equal(sigma_of(torch.tensor([-99.0, 99.0])), sigma_of(torch.tensor([-30.0, 20.0])))


def test_values_are_plain_and_clamped():
    """A MetaTensor's numbers are taken without its meta, a log-variance beyond the range at its end."""
    posterior = Posterior(MetaTensor(torch.zeros(2)), MetaTensor(torch.tensor([-99.0, 99.0])))
    assert type(posterior.mu) is type(posterior.logvar) is torch.Tensor
    assert posterior.logvar.tolist() == [-30, 20]
