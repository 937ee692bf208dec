"""The loss: its terms against formulas, its weights and its precision; the equivariance against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from scripts.networks import AutocastInferer
from scripts.run import InputError
from scripts.training import ScaleEquivariance, VAELoss

NAMES = {"l1": "recon", "mse": "mse", "kl": "kl", "lpips": "perceptual", "equivariance": "equivariance"}
ALL = {"recon_weight": 0.0, "mse_weight": 2.0, "perceptual_weight": 0.5, "equivariance_weight": 3.0}


class FakeDistance(nn.Module):
    """Largest difference, a scalar; keeps the types it was given and whether autocast was on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, recon: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.seen += [recon.dtype, target.dtype, torch.is_autocast_enabled("cpu")]
        return (recon - target).abs().max()


def output_and_target(dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """(recon, mu, sigma) of two volumes and their target."""
    generator = torch.Generator().manual_seed(0)
    recon, target = (torch.rand(2, 1, 8, 4, 4, generator=generator) for _ in range(2))
    mu, sigma = torch.randn(2, 4, 2, 1, 1, generator=generator), torch.rand(2, 4, 2, 1, 1, generator=generator) + 0.1
    return tuple(value.to(dtype) for value in (recon, mu, sigma)), target.to(dtype)


@pytest.mark.parametrize(("weights", "terms"), [({"kl_weight": 0.107}, {"l1", "kl"}), (ALL, set(NAMES))])
def test_terms_and_total(weights: dict[str, float], terms: set[str]):
    """Each term is a mean by its formula, `parts` holds those that count without weights, the total is their sum."""
    (recon, mu, sigma), target = output_and_target()
    loss = VAELoss(FakeDistance(), lambda mu, sigma, target: (mu.sum() + sigma.sum() + target.sum()).abs(), **weights)
    total = loss((recon, mu, sigma), target)
    error = recon - target
    expected = {
        "l1": error.abs().sum() / error.numel(),
        "mse": (error**2).sum() / error.numel(),
        "kl": (0.5 * (mu**2 + sigma**2 - 1 - 2 * sigma.log())).mean(),
        "lpips": error.abs().max(),
        "equivariance": (mu.sum() + sigma.sum() + target.sum()).abs(),
    }
    assert loss.parts == pytest.approx({"loss": total.item(), **{name: float(expected[name]) for name in terms}}, 1e-5)
    weight = {name: weights.get(f"{NAMES[name]}_weight", float(name == "l1")) for name in terms}
    assert total.item() == pytest.approx(sum(weight[name] * float(expected[name]) for name in terms), rel=1e-5)
    assert total.dtype == torch.float32 and total.shape == ()
    assert bool(loss.perceptual.seen) is ("lpips" in terms)  # a weight of 0 saves its time


def test_everything_is_computed_in_fp32():
    """Half precision is widened first, and autocast changes nothing: equal to the bit."""
    output, target = output_and_target(torch.bfloat16)
    distance = FakeDistance()
    loss = VAELoss(distance, mse_weight=1.0, perceptual_weight=0.6)
    expected = loss(tuple(value.float() for value in output), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(output, target)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    assert distance.seen == [torch.float32, torch.float32, False] * 2


def test_weights_that_cannot_be_meant_are_refused():
    """A negative weight would reward the error; a term that nothing computes is not left out without a word."""
    with pytest.raises(InputError, match="the weight of kl must not be negative, got -1"):
        VAELoss(kl_weight=-1.0)
    with pytest.raises(InputError, match="perceptual_weight is 0.6, but nothing is given that computes it"):
        VAELoss(perceptual_weight=0.6)


def enlarged(z: torch.Tensor) -> torch.Tensor:
    """A decoder that repeats each value 4 x 4 x 4 times."""
    return nn.functional.interpolate(z, scale_factor=4.0)


@pytest.mark.parametrize("size", [(4, 4, 4), (3, 4, 5)])
def test_equivariance_compares_halves(size: tuple[int, ...]):
    """By means over 2 x 2 x 2 values, sigma of 0; an odd plane of the latent has no partner and is left out."""
    mu, image = torch.randn(2, 1, *size), torch.rand(2, 1, *(4 * side for side in size))
    halves = [value.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).mean((5, 6, 7)) for value in (mu, image)]
    decoded = enlarged(halves[0])
    expected = (decoded - halves[1][tuple(slice(side) for side in decoded.shape)]).abs().mean()
    term = ScaleEquivariance(enlarged, AutocastInferer(False, "cpu"))
    torch.testing.assert_close(term(mu, torch.zeros_like(mu), image), expected)


def test_equivariance_decodes_a_sample():
    """The noise that is averaged over 2 x 2 x 2 values has sd sigma / sqrt(8); under autocast the decoder runs so."""
    seen: list[tuple[torch.Tensor, bool]] = []

    def decode(z: torch.Tensor) -> torch.Tensor:
        seen.append((z, torch.is_autocast_enabled("cpu")))
        return enlarged(z)

    mu, image = torch.zeros(1, 1, 50, 50, 50), torch.zeros(1, 1, 200, 200, 200)
    ScaleEquivariance(decode, AutocastInferer(True, "cpu"))(mu, torch.full_like(mu, 2.0), image)
    assert seen[0][0].std().item() == pytest.approx(2 / math.sqrt(8), rel=0.02)  # 15,625 values: 0.6 %
    assert seen[0][1]
