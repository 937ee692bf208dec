"""Muon and AdamW in one: what each parameter's step is, that it can be saved, scheduled, and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import TINY_VAE
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.optimizers import WarmupCosineSchedule
from torch import nn

from scripts.networks import BrainVAE
from scripts.training import MuonAdamW, orthogonalize


def network() -> nn.Sequential:
    """First, hidden and last convolution, a 1x1x1 convolution and a norm, on (B, 1, D, H, W)."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv3d(1, 20, 3, padding=1), nn.SiLU(), nn.Conv3d(20, 16, 3, padding=1)]
    layers += [nn.GroupNorm(2, 16), nn.Conv3d(16, 16, 1), nn.SiLU(), nn.Conv3d(16, 1, 3, padding=1)]
    return nn.Sequential(*layers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, schedule=None, first: int = 0) -> list[float]:
    """Train to copy smoothed noise that is made from the step's number; returns the losses."""
    losses = []
    for step in range(first, first + steps):
        x = torch.rand(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - nn.functional.avg_pool3d(x, 3, 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(2, 40),
    columns=st.integers(2, 80),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_singular_values_come_near_one(rows, columns, scale, seed):
    """Whatever the scale, singular values end within 0.6 and 1.3 (0.7 to 1.2 is the fixed cycle of the quintic), those
    below 1 % of the largest, which five steps need not lift, left aside; the singular vectors stay."""
    matrix = scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalize(matrix) @ vh.T
    kept = values > 0.01 * values.norm()
    diagonal = rotated.diagonal()
    assert ((diagonal[kept] > 0.6) & (diagonal[kept] < 1.3)).all()
    assert (rotated - torch.diag(diagonal)).abs().max() < 1e-3  # fp32 through 15 products


def test_orthogonalize_keeps_zero():
    """No gradient, no direction."""
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(3,), (2, 3, 3)])
def test_orthogonalize_takes_matrices(shape):
    """A kernel that has not been flattened is a mistake of the caller."""
    with pytest.raises(ValueError, match="matrix must have 2 dimensions"):
        orthogonalize(torch.zeros(shape))


@pytest.mark.parametrize("gradient_scale", [1e-8, 1.0, 1e4])
def test_muon_step_is_a_share_of_the_weights_norm(gradient_scale):
    """||step|| = lr ||weight||, whatever the gradient's size; fp32 leaves 1e-4."""
    model = network()
    hidden = model[2].weight
    optimizer = MuonAdamW(model, lr=0.03)
    for _ in range(3):
        before = hidden.detach().clone()
        hidden.grad = gradient_scale * torch.randn(hidden.shape)
        optimizer.step()
        assert (hidden - before).norm().item() == pytest.approx(0.03 * before.norm().item(), rel=1e-3)


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 2e-3)])
def test_muon_follows_nesterov_momentum(bf16, tolerance, monkeypatch):
    """The second step's direction is the orthogonalised G2 + m (m G1 + G2); bf16 turns it by less than 4 degrees."""
    monkeypatch.setattr("scripts.networks.computes_bf16_fast", lambda device: bf16)
    model = network()
    hidden, momentum = model[2].weight, 0.9
    optimizer = MuonAdamW(model, lr=0.01, momentum=momentum)
    gradients = [torch.randn(hidden.shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for gradient in gradients:
        before = hidden.detach().clone()
        hidden.grad = gradient.clone()
        optimizer.step()
    expected = orthogonalize((gradients[1] + momentum * (momentum * gradients[0] + gradients[1])).flatten(1)).flatten()
    step = (before - hidden.detach()).flatten()
    assert torch.cosine_similarity(step, expected, dim=0).item() == pytest.approx(1, abs=tolerance)


def test_groups():
    """Hidden 3x3x3 convolutions alone go to Muon; every parameter is in exactly one group."""
    model = network()
    muon, adamw = MuonAdamW(model).param_groups
    assert muon["muon"] and not adamw["muon"]
    assert [id(p) for p in muon["params"]] == [id(model[2].weight)]
    assert {id(p) for p in adamw["params"]} == {id(p) for p in model.parameters()} - {id(model[2].weight)}


def test_groups_of_the_autoencoder():
    """In the VAE neither the convolutions at the image nor those at the latent are Muon's; the folded ones are."""
    vae = BrainVAE(**{**TINY_VAE, "channels": [16, 32]})
    names = {id(p): name for name, p in vae.named_parameters()}
    muon, adamw = ({names[id(p)] for p in group["params"]} for group in MuonAdamW(vae).param_groups)
    assert muon | adamw == set(names.values()) and not muon & adamw
    assert all(min(vae.get_parameter(name).shape[:2]) >= 16 for name in muon)
    assert any("postconv" in name for name in muon)


def test_network_without_hidden_convolutions():
    """Everything is AdamW's where there is nothing for Muon."""
    assert [group["muon"] for group in MuonAdamW(nn.Linear(2, 2)).param_groups] == [False]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_that_of_torch(weight_decay):
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


def test_hidden_convolutions_are_not_decayed():
    """Weight decay is AdamW's alone: with a zero gradient Muon's weight stays."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    MuonAdamW(model, weight_decay=0.5, adam_lr=0.1).step()
    assert torch.equal(model[2].weight, before["2.weight"])
    torch.testing.assert_close(model[0].weight.detach(), 0.95 * before["0.weight"])


def test_parameters_without_gradient_stay():
    """A frozen or unused parameter is passed over."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    MuonAdamW(model, weight_decay=0.5).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saved_state_goes_on_to_the_bit(tmp_path):
    """Three steps, a file, three steps more: equal to six steps, with schedule."""
    models, results = [network(), network(), network()], []
    for number, model in enumerate(models[:2]):
        optimizer = MuonAdamW(model)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        train(model, optimizer, 6 if number == 0 else 3, schedule)
        if number == 1:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save(state, tmp_path / "state.pt")
            model = models[2]
            optimizer = MuonAdamW(model, lr=0.5)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
            state = torch.load(tmp_path / "state.pt", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            train(model, optimizer, 3, schedule, first=3)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_schedules_scale_both_groups():
    """MONAI's warm-up with cosine multiplies both learning rates by one factor."""
    optimizer = MuonAdamW(network(), lr=0.02, adam_lr=0.001)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=4, t_total=10, end_lr=0.0)
    seen = []
    for _ in range(10):
        optimizer.step()
        schedule.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen[1] == pytest.approx([0.01, 0.0005])
    assert seen[3] == pytest.approx([0.02, 0.001])
    assert seen[-1] == pytest.approx([0, 0])
    assert all(muon == pytest.approx(20 * adam) for muon, adam in seen)


def test_it_learns():
    """Forty steps halve the loss of a small problem at least twice."""
    model = network()
    losses = train(model, MuonAdamW(model, adam_lr=0.01), 40)
    assert losses[-1] < losses[0] / 4


def test_closure():
    """The closure is evaluated with gradients and its loss returned."""
    model = network()
    optimizer = MuonAdamW(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1, 4, 4, 4)).square().mean()
        loss.backward()
        return loss

    before = model[2].weight.detach().clone()
    assert optimizer.step(closure).item() > 0
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("rates", [{"lr": 0}, {"adam_lr": -1.0}])
def test_learning_rates_are_positive(rates):
    """Zero or a negative rate is refused."""
    with pytest.raises(ValueError, match="learning rates must be positive"):
        MuonAdamW(network(), **rates)
