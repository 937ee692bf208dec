"""The network's own layers against their formulas: folded upsampling, Haar step, normalisation a voxel."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from monai.networks.blocks import UpSample
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

from scripts.networks import FoldedUpsample, PositionNorm, PositionResBlock, haar, inverse_haar

FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
SIZES = [(2, 6, 3, 4, 5), (1, 96, 11, 9, 8)]  # the second goes in two chunks


@pytest.mark.parametrize(("channels", "size"), [((3, 2), (2, 3, 5)), ((2, 4), (4, 1, 3))])
def test_folded_upsample_is_upsample_and_convolution(channels: tuple[int, int], size: tuple[int, ...]):
    """Forward and all gradients agree in float64 to 1e-12."""
    torch.manual_seed(0)
    conv = nn.Sequential()
    conv.add_module("conv", nn.Conv3d(*channels, 3, padding=1))
    plain = UpSample(
        3, channels[0], channels[0], 2, mode="nontrainable", pre_conv=None, interp_mode="nearest",
        align_corners=None, post_conv=conv,
    ).double()  # fmt: skip
    assert FoldedUpsample.replaces(plain)
    folded, results = FoldedUpsample(copy.deepcopy(plain)).double(), []
    x = torch.randn(2, channels[0], *size, dtype=torch.float64, requires_grad=True)
    for block in (plain, folded):
        y = block(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_haar_is_its_formula():
    """Channel a + 2b + 4c of a block of 2 x 2 x 2 is its sum with signs (-1)^(ai + bj + ck), over sqrt(8)."""
    x = torch.rand(1, 1, 4, 2, 6, dtype=torch.float64)
    bands = haar(x)
    assert bands.shape == (1, 8, 2, 1, 3)
    for band in range(8):
        for place in itertools.product(range(2), range(1), range(3)):
            expected = 0.0
            for offset in itertools.product(range(2), repeat=3):
                sign = (-1) ** sum((band >> axis & 1) * offset[axis] for axis in range(3))
                voxel = tuple(2 * p + o for p, o in zip(place, offset, strict=True))
                expected += sign * float(x[(0, 0, *voxel)]) / 8**0.5
            assert float(bands[(0, band, *place)]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_haar_has_an_inverse(dtype: torch.dtype):
    """It gives back what the Haar step was given, of the same type, but for three sums' rounding each way."""
    x = torch.rand(2, 3, 4, 6, 2).to(dtype)
    back, rounding = inverse_haar(haar(x)), 8 * torch.finfo(dtype).eps
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=rounding, atol=rounding)


def plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula of `PositionNorm`, in the words of its docstring."""
    scaled = weight.view(1, -1, 1, 1, 1) * x / torch.sqrt((x**2).mean(1, keepdim=True) + eps)
    return scaled * torch.sigmoid(scaled)


@FORMATS
@pytest.mark.parametrize("size", SIZES)
def test_position_norm_is_its_formula(size: tuple[int, ...], memory_format: torch.memory_format):
    """Forward, and the gradients of the input and of the gain."""
    torch.manual_seed(0)
    norm = PositionNorm(size[1], 1e-2)
    nn.init.normal_(norm.weight)
    x, direction = torch.randn(size).contiguous(memory_format=memory_format), torch.randn(size)
    exact, weight = (value.detach().double().requires_grad_() for value in (x, norm.weight))
    x.requires_grad_()
    y, z = norm(x), plain_norm(exact, weight, 1e-2)
    results = [
        [y.detach(), *torch.autograd.grad((y * direction).sum(), [x, norm.weight])],
        [z.detach(), *torch.autograd.grad((z * direction).sum(), [exact, weight])],
    ]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == torch.float32
        scale = float(expected.abs().max())  # fp32: the gain's gradient sums up to 800 products
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6 * max(scale, 1))


@FORMATS
@pytest.mark.parametrize("n_out", [4, 6], ids=["same channels", "others"])
def test_residual_block_is_its_formula(n_out: int, memory_format: torch.memory_format):
    """Norm, convolution, norm, convolution, and the input or its 1x1x1 convolution added."""
    torch.manual_seed(0)
    block = PositionResBlock(AEKLResBlock(3, 4, norm_num_groups=2, norm_eps=0.1, out_channels=n_out))
    first, second = block.conv1.conv, block.conv2.conv
    assert second.weight.std().item() == pytest.approx(0.2 * (27 * n_out) ** -0.5, rel=0.2)  # nearly the input
    nn.init.normal_(second.weight, std=0.1), nn.init.normal_(block.norm2.weight), nn.init.normal_(block.norm1.weight)
    x = torch.randn(2, 4, 3, 4, 5).contiguous(memory_format=memory_format)
    h = nn.functional.conv3d(plain_norm(x, block.norm1.weight, 0.1), first.weight, first.bias, padding=1)
    h = nn.functional.conv3d(plain_norm(h, block.norm2.weight, 0.1), second.weight, second.bias, padding=1)
    expected = h + (x if n_out == 4 else block.nin_shortcut.conv(x))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)  # fp32 sums of a hundred terms
