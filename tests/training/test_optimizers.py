"""Muon and AdamW in one: what each parameter's step is, that it can be saved and scheduled."""

from __future__ import annotations

import copy
from pathlib import Path

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


class Training:
    """A network, its optimizer and a schedule that halves the rates every second step."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = MuonAdamW(self.model, adam_lr=0.01)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def run(self, steps: range) -> None:
        """Learn to smooth noise that is made from the step's number."""
        for step in steps:
            x = torch.rand(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = (self.model(x) - nn.functional.avg_pool3d(x, 3, 1, 1)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 40), columns=st.integers(2, 80), scale=st.sampled_from([1e-6, 1, 1e6]), seed=st.integers(0, 99)
)  # fmt: skip
def test_singular_values_come_near_one(rows: int, columns: int, scale: float, seed: int):
    """Whatever the scale, singular values end within 0.6 and 1.3 (0.7 to 1.2 is the fixed cycle of the quintic), those
    below 1 % of the largest, which five steps need not lift, left aside; the singular vectors stay."""
    matrix = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalize(matrix) @ vh.T
    diagonal, kept = rotated.diagonal(), values > 0.01 * values.norm()
    assert ((diagonal[kept] > 0.6) & (diagonal[kept] < 1.3)).all()
    assert (rotated - torch.diag(diagonal)).abs().max() < 1e-3  # fp32 through 15 products


def test_orthogonalize_keeps_zero_and_takes_matrices():
    """No gradient, no direction; a kernel that has not been flattened is a mistake of the caller."""
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="matrix must have 2 dimensions"):
        orthogonalize(torch.zeros(2, 3, 3))


@pytest.mark.parametrize("gradient_scale", [1e-8, 1.0, 1e4])
def test_muon_step_is_a_share_of_the_weights_norm(gradient_scale: float):
    """||step|| = lr ||weight||, whatever the gradient's size; fp32 leaves 1e-4."""
    model = network()
    hidden, optimizer = model[2].weight, MuonAdamW(model, lr=0.03)
    for _ in range(3):
        before = hidden.detach().clone()
        hidden.grad = gradient_scale * torch.randn(hidden.shape)
        optimizer.step()
        assert (hidden - before).norm().item() == pytest.approx(0.03 * before.norm().item(), rel=1e-3)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 2e-3)])
def test_muon_follows_nesterov_momentum(bf16: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch):
    """The second step's direction is the orthogonalised G2 + m (m G1 + G2); bf16 turns it by less than 4 degrees."""
    monkeypatch.setattr("scripts.training.optimizers.computes_bf16_fast", lambda device: bf16)
    model, momentum = network(), 0.9
    hidden, optimizer = model[2].weight, MuonAdamW(model, lr=0.01, momentum=momentum)
    first, second = (torch.randn(hidden.shape, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for gradient in (first, second):
        before = hidden.detach().clone()
        hidden.grad = gradient.clone()
        optimizer.step()
    expected = orthogonalize((second + momentum * (momentum * first + second)).flatten(1)).flatten()
    step = (before - hidden.detach()).flatten()
    assert torch.cosine_similarity(step, expected, dim=0).item() == pytest.approx(1, abs=tolerance)


def test_groups():
    """Hidden 3x3x3 convolutions alone go to Muon; every parameter is in exactly one group; there may be no hidden."""
    model = network()
    muon, adamw = MuonAdamW(model).param_groups
    assert muon["muon"] and not adamw["muon"]
    assert [id(p) for p in muon["params"]] == [id(model[2].weight)]
    assert {id(p) for p in adamw["params"]} == {id(p) for p in model.parameters()} - {id(model[2].weight)}
    assert [group["muon"] for group in MuonAdamW(nn.Linear(2, 2)).param_groups] == [False]


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


def test_saved_state_goes_on_to_the_bit(tmp_path: Path):
    """Three steps, a file, three steps more: equal to six steps, with schedule."""
    whole, broken, resumed = (Training() for _ in range(3))
    whole.run(range(6))
    broken.run(range(3))
    torch.save({name: item.state_dict() for name, item in vars(broken).items()}, tmp_path / "state.pt")
    for name, state in torch.load(tmp_path / "state.pt", weights_only=True).items():
        getattr(resumed, name).load_state_dict(state)
    resumed.run(range(3, 6))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("rates", [{"lr": 0}, {"adam_lr": -1.0}])
def test_learning_rates_are_positive(rates: dict[str, float]):
    """Zero or a negative rate is refused, with the config's keys."""
    with pytest.raises(InputError, match="must be positive.* learning_rate and adam_learning_rate"):
        MuonAdamW(network(), **rates)
