"""The loss: its terms against formulas, its weights, precision and behaviour at the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from scripts.networks import AutocastInferer
from scripts.networks.posterior import kl_divergence
from scripts.training import ScaleEquivariance, VAELoss

EXTREME_SIGMAS = [0.0, 1e-45, 1e-20, 1e20, 3e38, math.inf]
# weights by argument, terms that are computed and logged
WEIGHTS = [
    ({}, {"l1", "kl"}),
    ({"perceptual_weight": 0.6, "kl_weight": 0.107}, {"l1", "kl", "lpips"}),
    ({"mse_weight": 2.0, "equivariance_weight": 0.25}, {"l1", "kl", "mse", "equivariance"}),
    (
        {"recon_weight": 0.0, "mse_weight": 1.0, "perceptual_weight": 0.5, "equivariance_weight": 3.0},
        {"l1", "kl", "mse", "lpips", "equivariance"},
    ),
]


class FakeDistance(nn.Module):
    """Largest difference, a scalar; counts its calls, keeps the types it was given and whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []
        self.autocast: list[bool] = []

    def forward(self, recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.types += [recon.dtype, target.dtype]
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return (recon - target).abs().max()


def output_and_target(dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(recon, mu, sigma) of two volumes and their target."""
    generator = torch.Generator().manual_seed(0)
    recon, target = (torch.rand(2, 1, 8, 4, 4, generator=generator) for _ in range(2))
    mu, sigma = torch.randn(2, 4, 2, 1, 1, generator=generator), torch.rand(2, 4, 2, 1, 1, generator=generator) + 0.1
    return tuple(value.to(dtype) for value in (recon, mu, sigma)), target.to(dtype)


@pytest.mark.parametrize(("weights", "terms"), WEIGHTS)
def test_terms_and_total(weights, terms):
    """Each term is its formula, `parts` holds them without weights, the total is their weighted sum."""
    (recon, mu, sigma), target = output_and_target()
    loss = VAELoss(FakeDistance(), lambda mu, sigma, target: (mu.sum() + sigma.sum() + target.sum()).abs(), **weights)
    total = loss((recon, mu, sigma), target)
    error = recon - target
    expected = {
        "l1": error.abs().sum() / error.numel(),
        "mse": (error**2).sum() / error.numel(),
        "kl": (0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log())).sum() / mu.numel(),
        "lpips": error.abs().max(),
        "equivariance": (mu.sum() + sigma.sum() + target.sum()).abs(),
    }
    names = {"l1": "recon_weight", "mse": "mse_weight", "kl": "kl_weight", "lpips": "perceptual_weight"}
    names["equivariance"] = "equivariance_weight"
    defaults = {"recon_weight": 1.0, **dict.fromkeys(list(names.values())[1:], 0.0)}
    assert set(loss.parts) == {"loss", *terms}
    for name in terms:
        assert loss.parts[name] == pytest.approx(float(expected[name]), rel=1e-5)
    assert loss.parts["loss"] == pytest.approx(total.item())
    weighted = sum({**defaults, **weights}[names[name]] * float(expected[name]) for name in terms)
    assert total.item() == pytest.approx(weighted, rel=1e-5)
    assert total.dtype == torch.float32 and total.shape == ()


@settings(max_examples=30, deadline=None)
@given(mu=st.floats(-30, 30), logvar=st.floats(-25, 15))
def test_kl_is_that_of_torch(mu, logvar):
    """Against torch.distributions in float64; fp32 leaves about 1e-6 of the largest of its three summands."""
    sigma = math.exp(logvar / 2)
    expected = torch_kl(Normal(torch.tensor(mu).double(), torch.tensor(sigma).double()), Normal(0.0, 1.0)).item()
    tolerance = 1e-6 * (1 + mu**2 + sigma**2 + abs(logvar))
    assert kl_divergence(torch.tensor([mu]), torch.tensor([sigma])).item() == pytest.approx(expected, abs=tolerance)


def test_kl_of_the_prior_is_zero():
    """N(0, 1) against itself."""
    assert kl_divergence(torch.zeros(3), torch.ones(3)).item() == 0


@pytest.mark.parametrize("sigma", EXTREME_SIGMAS)
def test_kl_stays_finite(sigma):
    """Beyond the clamp value and gradients are finite, and the value is that of the clamp's end."""
    mu, sigma = torch.ones(2, requires_grad=True), torch.full((2,), sigma, requires_grad=True)
    kl = kl_divergence(mu, sigma)
    kl.backward()
    logvar = -30 if sigma[0] < 1 else 20
    assert kl.item() == pytest.approx(0.5 * (1 + math.exp(logvar) - 1 - logvar), rel=1e-5)
    assert mu.grad.tolist() == [0.5, 0.5]
    assert sigma.grad.tolist() == [0, 0]


def test_kl_gradient():
    """Inside of the clamp the gradient is (sigma - 1 / sigma) / n, and mu / n."""
    mu, sigma = torch.tensor([0.5, -2.0], requires_grad=True), torch.tensor([0.25, 2.0], requires_grad=True)
    kl_divergence(mu, sigma).backward()
    torch.testing.assert_close(mu.grad, torch.tensor([0.25, -1.0]))
    torch.testing.assert_close(sigma.grad, torch.tensor([(0.25 - 4) / 2, (2 - 0.5) / 2]))


def test_kl_does_not_depend_on_the_crop():
    """The same posterior on eight times the volume gives the same figure, so one weight serves all sizes."""
    (_, mu, sigma), _ = output_and_target()
    larger = [value.repeat(1, 1, 2, 2, 2) for value in (mu, sigma)]
    assert kl_divergence(*larger).item() == pytest.approx(kl_divergence(mu, sigma).item(), rel=1e-6)


def test_autocast_changes_nothing():
    """Under bf16 autocast every term is computed in fp32: equal to the bit."""
    output, target = output_and_target()
    distance = FakeDistance()
    loss = VAELoss(distance, mse_weight=1.0, perceptual_weight=0.6)
    plain = loss(output, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(output, target), plain)
    assert set(distance.types) == {torch.float32} and distance.autocast == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    """Inputs in half precision are widened first: equal to the loss of the widened inputs, in fp32."""
    output, target = output_and_target(dtype)
    loss = VAELoss(FakeDistance(), mse_weight=1.0, perceptual_weight=0.6)
    total = loss(output, target)
    assert total.dtype == torch.float32
    assert torch.equal(total, loss(tuple(value.float() for value in output), target.float()))


def test_half_precision_does_not_overflow():
    """A log-variance of 20 overflows float16 (22026 squared), but not the loss."""
    sigma = torch.tensor([22026.0], dtype=torch.float16)
    assert kl_divergence(torch.zeros(1, dtype=torch.float16), sigma).item() == pytest.approx(2.4e8, rel=0.02)


@pytest.mark.parametrize(("weight", "calls"), [(0.0, 0), (0.6, 1)])
def test_perceptual_distance_is_called_only_where_it_counts(weight, calls):
    """Its weight of 0 saves its time."""
    distance = FakeDistance()
    VAELoss(distance, perceptual_weight=weight)(*output_and_target())
    assert len(distance.types) == 2 * calls


def test_gradient_reaches_every_output():
    """recon, mu and sigma all get a gradient."""
    output, target = output_and_target()
    leaves = [value.clone().requires_grad_() for value in output]
    VAELoss(FakeDistance(), kl_weight=0.1, perceptual_weight=0.6)(tuple(leaves), target).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)


@pytest.mark.parametrize("name", [f"{term}_weight" for term in ("recon", "mse", "kl", "perceptual", "equivariance")])
def test_negative_weight_is_refused(name):
    """A negative weight would reward the error."""
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        VAELoss(FakeDistance(), **{name: -1.0})


@pytest.mark.parametrize("name", ["perceptual_weight", "equivariance_weight"])
def test_weight_without_what_it_weighs_is_refused(name):
    """Leaving the term out is said, not passed over."""
    with pytest.raises(ValueError, match=f"{name} is 0.6, but nothing is given that computes it"):
        VAELoss(**{name: 0.6})


@pytest.mark.parametrize("size", [(4, 4, 4), (3, 4, 5)])
def test_equivariance_compares_halves(size):
    """By loops over 2 x 2 x 2 values, sigma of 0; an odd plane of the latent has no partner and is left out."""
    mu = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    image = torch.rand(2, 1, *(4 * side for side in size), generator=torch.Generator().manual_seed(1))
    halves = [
        value.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((5, 6, 7)) for value in (mu, image)
    ]  # what lies beyond the last pair is dropped by unfold
    decoded = nn.functional.interpolate(halves[0], scale_factor=4.0)
    expected = (decoded - halves[1][tuple(slice(side) for side in decoded.shape)]).abs().mean()
    term = ScaleEquivariance(lambda z: nn.functional.interpolate(z, scale_factor=4.0), AutocastInferer(False, "cpu"))
    torch.testing.assert_close(term(mu, torch.zeros_like(mu), image), expected)


def test_equivariance_of_a_decoder_that_is_linear_in_scale_is_zero():
    """Repeating each value 4 x 4 x 4 times commutes with taking means over 2 x 2 x 2: nothing is left to punish."""
    mu = torch.randn(1, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    mu = nn.functional.interpolate(mu, scale_factor=2.0)
    term = ScaleEquivariance(lambda z: nn.functional.interpolate(z, scale_factor=4.0), AutocastInferer(False, "cpu"))
    image = nn.functional.interpolate(mu, scale_factor=4.0)
    assert term(mu, torch.zeros_like(mu), image).item() == 0


def test_equivariance_decodes_a_sample():
    """The noise that is averaged over 2 x 2 x 2 values has sd sigma / sqrt(8); under autocast the decoder runs so."""
    seen = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append((z, torch.is_autocast_enabled("cpu")))
        return nn.functional.interpolate(z, scale_factor=4.0)

    mu, image = torch.zeros(1, 1, 50, 50, 50), torch.zeros(1, 1, 200, 200, 200)
    ScaleEquivariance(decode, AutocastInferer(True, "cpu"))(mu, torch.full_like(mu, 2.0), image)
    assert seen[0][0].std().item() == pytest.approx(2 / math.sqrt(8), rel=0.02)  # 15,625 values: 0.6 %
    assert seen[0][1]
