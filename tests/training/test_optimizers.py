"""Muon and AdamW in one: what each parameter's step is, that it can be saved and scheduled."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY_VAE
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scripts.networks import BrainVAE
from scripts.run import InputError
from scripts.training import MuonAdamW, orthogonalize


def network() -> nn.Sequential:
    """First, hidden and last convolution, a 1x1x1 convolution and a norm, on (B, 1, D, H, W)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv3d(1, 20, 3, padding=1), nn.SiLU(), nn.Conv3d(20, 16, 3, padding=1)]
    layers += [nn.GroupNorm(2, 16), nn.Conv3d(16, 16, 1), nn.SiLU(), nn.Conv3d(16, 1, 3, padding=1)]
    return nn.Sequential(*layers)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 80), st.sampled_from([1e-6, 1, 1e6]), st.integers(0, 99))
def test_singular_values_come_near_one(rows: int, columns: int, scale: float, seed: int):
    """Whatever the scale, singular values end within 0.6 and 1.3 (0.7 to 1.2 is the fixed cycle of the quintic), those
    below 1 % of the largest, which five steps need not lift, left aside; the singular vectors stay."""
    matrix = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalize(matrix) @ vh.T
    diagonal, kept = rotated.diagonal(), values > 0.01 * values.norm()
    assert ((diagonal[kept] > 0.6) & (diagonal[kept] < 1.3)).all()
    assert (rotated - torch.diag(diagonal)).abs().max() < 1e-3  # fp32 through 15 products


@pytest.mark.parametrize(("bf16", "scale", "tolerance"), [(False, 1e-8, 1e-4), (False, 1.0, 1e-4), (True, 1e4, 2e-3)])
def test_muon_follows_nesterov_momentum(bf16: bool, scale: float, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """The second step's direction is the orthogonalised G2 + m (m G1 + G2), its length lr ||weight||, whatever the
    gradient's size; bf16 turns it by less than 4 degrees."""
    monkeypatch.setattr("scripts.training.optimizers.computes_bf16_fast", lambda device: bf16)
    model, momentum = network(), 0.9
    hidden, optimizer = model[2].weight, MuonAdamW(model, lr=0.01, momentum=momentum)
    first, second = (scale * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for gradient in (first, second):
        before = hidden.detach().clone()
        hidden.grad = gradient.clone()
        optimizer.step()
    expected = orthogonalize((second + momentum * (momentum * first + second)).flatten(1)).flatten()
    step = (before - hidden.detach()).flatten()
    assert torch.cosine_similarity(step, expected, dim=0).item() == pytest.approx(1, abs=tolerance)
    assert step.norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-3)


def test_groups_of_the_autoencoder():
    """In the VAE neither the convolutions at the image nor those at the latent are Muon's; the folded ones are."""
    vae = BrainVAE(**{**TINY_VAE, "channels": [16, 32]})
    names = {id(p): name for name, p in vae.named_parameters()}
    muon, adamw = ({names[id(p)] for p in group["params"]} for group in MuonAdamW(vae).param_groups)
    assert muon | adamw == set(names.values()) and not muon & adamw
    assert all(min(vae.get_parameter(name).shape[:2]) >= 16 for name in muon)
    assert any("postconv" in name for name in muon)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay: float):
    """Ten steps on the same gradients end where torch's AdamW (eps 1e-8) ends, to fp32 rounding."""
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        MuonAdamW(ours, adam_lr=0.01, betas=(0.8, 0.95), weight_decay=weight_decay),
        torch.optim.AdamW(theirs.parameters(), 0.01, betas=(0.8, 0.95), weight_decay=weight_decay),
    ]
    for step in range(10):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():  # the first step is that small that eps counts
                parameter.grad = (1e-8 if step == 0 else 1.0) * torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_weight_decay_is_adamws_alone():
    """With a zero gradient Muon's weight stays; without one, as of a frozen parameter, every weight does."""
    model = network()
    before, optimizer = copy.deepcopy(model.state_dict()), MuonAdamW(model, weight_decay=0.5, adam_lr=0.1)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model[2].weight, before["2.weight"])
    torch.testing.assert_close(model[0].weight.detach(), 0.95 * before["0.weight"])


def test_learning_rates_are_positive():
    """Zero or a negative rate is refused, with the config's keys."""
    with pytest.raises(InputError, match="must be positive.* learning_rate and adam_learning_rate"):
        MuonAdamW(network(), adam_lr=-1.0)
