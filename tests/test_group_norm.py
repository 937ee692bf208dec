"""Group normalisation in chunks against PyTorch's in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_VAE
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import AutoencoderKL
from torch import nn

from scripts import group_norm
from scripts.group_norm import GroupNormSiLU, channel_moments, scale_and_shift
from scripts.networks import BrainVAE, ResBlock

# type, largest difference of the output, largest relative difference of a gradient
PRECISION = [(torch.float32, 5e-6, 1e-6), (torch.bfloat16, 0.04, 5e-3)]


def normalisation(channels: int, groups: int, silu: bool) -> GroupNormSiLU:
    """One with parameters that are not 1 and 0."""
    norm = nn.GroupNorm(groups, channels, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return GroupNormSiLU(norm, silu)


def volumes(channels: int, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Two channels-last volumes whose channels have means and spreads of their own."""
    values = torch.randn(2, channels, *size) * torch.rand(1, channels, 1, 1, 1) + torch.randn(2, channels, 1, 1, 1) * 3
    return values.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def in_double(module: GroupNormSiLU, x: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, in double precision."""
    norm = F.group_norm(x, module.num_groups, module.weight.double(), module.bias.double(), module.eps)
    return F.silu(norm) if module.silu else norm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("dtype", "largest", "relative"), PRECISION)
def test_values_and_gradients_are_pytorchs(
    dtype: torch.dtype, largest: float, relative: float, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_norm, "CHUNK", 500)  # several chunks, the last one short
    torch.manual_seed(0)
    module, x = normalisation(8, 4, silu), volumes(8, 6, 5, 7, dtype=dtype).requires_grad_()
    direction = torch.randn_like(x)
    output = module(x)
    output.backward(direction)
    gradients = [x.grad, module.weight.grad, module.bias.grad]

    exact = copy.deepcopy(module).double()
    double = x.detach().double().requires_grad_()
    wanted = in_double(exact, double)
    wanted.backward(direction.double())
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last_3d)
    assert (output - wanted).abs().max() < largest
    for got, expected in zip(gradients, [double.grad, exact.weight.grad, exact.bias.grad], strict=True):
        assert (got - expected).abs().max() < relative * expected.abs().max()


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    chunk=st.integers(1, 4000),
    offset=st.floats(-1e4, 1e4),
)
def test_moments_do_not_depend_on_the_chunks(size: tuple[int, int, int], chunk: int, offset: float) -> None:
    """A mean far from zero is what E[x^2] - E[x]^2 does not survive."""
    rows = torch.randn(size[0] * size[1] * size[2], 6) + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm, "CHUNK", chunk)
        mean, variance = channel_moments(rows)
    expected = torch.var_mean(rows.double(), dim=0, correction=0)
    torch.testing.assert_close(mean, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, expected[0], rtol=1e-3, atol=1e-6 + 1e-12 * offset**2)


def test_a_map_of_each_channel_is_the_normalisation() -> None:
    module, x = normalisation(8, 2, silu=False), volumes(8, 4, 4, 4)[:1]
    rows = x[0].flatten(1).T
    scale, shift = scale_and_shift(*channel_moments(rows), module.weight, module.bias, 2, module.eps)
    torch.testing.assert_close((rows * scale + shift).T.view_as(x[0]), module(x)[0])


def test_a_large_volume_keeps_its_digits() -> None:
    """Two million voxels a group and a mean of 5, where PyTorch's channels-last kernel is a thousandth off."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 2)
    x = (torch.randn(1, 2, 96, 112, 96) + 5).contiguous(memory_format=torch.channels_last_3d)
    exact = F.group_norm(x.double(), 1)
    assert (norm(x) - exact).abs().max() > 1e-4
    assert (GroupNormSiLU(norm, silu=False)(x) - exact).abs().max() < 2e-6


def test_only_channels_last_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = normalisation(8, 4, silu=True), volumes(8, 4, 4, 4)
    monkeypatch.setattr(group_norm, "_Chunked", None)
    expected = F.silu(F.group_norm(x, 4, module.weight, module.bias, module.eps))
    torch.testing.assert_close(module(x.contiguous()), expected)
    with pytest.raises(AttributeError):
        module(x)


def test_it_is_differentiated_once() -> None:
    module, x = normalisation(8, 4, silu=True), volumes(8, 4, 4, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_the_network_is_monais() -> None:
    """Channels-last training step: output, posterior and every parameter's gradient."""
    torch.manual_seed(0)
    ours = BrainVAE(**TINY_VAE)
    plain = AutoencoderKL(**TINY_VAE)
    plain.load_state_dict(ours.state_dict())
    ours, plain = ours.to(memory_format=torch.channels_last_3d), plain.double()
    x = torch.rand(1, 1, 16, 20, 16)
    noise = torch.randn(1, TINY_VAE["latent_channels"], 4, 5, 4)
    results = []
    for network, image in ((ours, x.contiguous(memory_format=torch.channels_last_3d)), (plain, x.double())):
        mu, sigma = network.encode(image)
        recon = network.decode(mu + sigma * noise.to(mu))
        (recon.square().mean() + mu.square().mean() + sigma.mean()).backward()
        results.append((recon, mu, sigma, {name: p.grad for name, p in network.named_parameters()}))
    for got, expected in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    for name, expected in results[1][3].items():
        torch.testing.assert_close(results[0][3][name].double(), expected, rtol=1e-3, atol=1e-6, msg=name)
    assert any(isinstance(module, ResBlock) for module in ours.modules())
