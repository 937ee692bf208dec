"""LPIPS3D against the published definition written out slice by slice, and its behaviour as a loss in training.

Gradients are compared in float64: in float32 a ReLU or a max-pooling that stands at a tie goes either way with the
order of summation, which moves the gradient of single pixels by far more than rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.metrics import LPIPS3D
from scripts.run import InputError

EXAMPLE = ROOT.parent / "shared" / "data" / "lpips_example"
DEFAULT_WEIGHTS = ROOT / "models" / "lpips_alex.safetensors"
SMALL = (1, 1, 31, 31, 31)


def random_pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Make a smooth volume and a noisy copy, both in [0, 1], from NumPy's generator, which keeps its numbers."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((shape[0], 1, 8, 8, 8), dtype=np.float32))
    target = F.interpolate(coarse, size=shape[2:], mode="trilinear")
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return (target + 0.1 * noise).clamp(0, 1), target


@cache
def reference_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """The shipped tensors, by their names."""
    return {name: tensor.to(dtype) for name, tensor in load_file(DEFAULT_WEIGHTS).items()}


def reference_layers(picture: Tensor) -> list[Tensor]:
    """AlexNet's five layers of a picture (1, 3, H, W) in [-1, 1], scaled as published."""
    weights, layers = reference_weights(picture.dtype), []
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=picture.dtype)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=picture.dtype)[:, None, None]
    hidden = (picture - shift) / scale
    for number, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
        hidden = F.max_pool2d(hidden, 3, 2) if number in (3, 6) else hidden
        hidden = F.relu(F.conv2d(hidden, kernel, bias, stride=stride, padding=padding))
        layers.append(hidden)
    return layers


def reference_2d(input: Tensor, target: Tensor) -> Tensor:
    """LPIPS (AlexNet, v0.1) of two pictures (1, 3, H, W) in [-1, 1], as published: one number, with autograd."""

    def unit(feature: Tensor) -> Tensor:
        return feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10)

    distance = input.new_zeros(())
    for number, (ours, theirs) in enumerate(zip(reference_layers(input), reference_layers(target), strict=True)):
        head = reference_weights(input.dtype)[f"lin{number}.weight"]
        distance = distance + F.conv2d((unit(ours) - unit(theirs)) ** 2, head).mean()
    return distance


def reference_slices(input: Tensor, target: Tensor, axis: int) -> list[Tensor]:
    """LPIPS of each slice along one axis of two volumes (D, H, W) in [0, 1]."""
    return [
        reference_2d(*((2 * volume.select(axis, index) - 1).expand(1, 3, -1, -1) for volume in (input, target)))
        for index in range(input.shape[axis])
    ]


@pytest.fixture(scope="module")
def lpips() -> LPIPS3D:
    """The loss as it is by default."""
    return LPIPS3D()


def value_and_gradient(loss: LPIPS3D, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and its gradient for the input."""
    leaf = input.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason="the example pictures are not here")
@pytest.mark.parametrize(("name", "published"), [("ex_p0.png", 0.722), ("ex_p1.png", 0.138)])
def test_published_pictures(lpips: LPIPS3D, name: str, published: float) -> None:
    """The LPIPS repository's example pictures get the published values, to the published digits."""
    pictures = pytest.importorskip("PIL.Image")
    opened = [pictures.open(EXAMPLE / file).convert("RGB") for file in ("ex_ref.png", name)]
    files = [np.asarray(picture, dtype=np.float32) for picture in opened]
    first, second = (torch.from_numpy(file / 127.5 - 1).permute(2, 0, 1)[None] for file in files)
    assert lpips.lpips_2d(first, second).item() == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(("shape", "chunk_size"), [((1, 1, 31, 32, 34), 16), ((2, 1, 33, 35, 31), 5)])
def test_equals_the_slice_loop(shape: tuple[int, ...], chunk_size: int) -> None:
    """Each sample's value, and the gradient where values are weighed, are those that autograd gives the slice-by-slice
    definition, whatever goes through at once and whatever remains of the sides at stride 4 and two poolings."""
    input, target = (volume.double() for volume in random_pair(shape))
    weights, leaves = torch.arange(1.0, len(input) + 1).double(), [input.clone().requires_grad_() for _ in range(2)]
    expected = torch.stack([
        torch.stack([value for axis in range(3) for value in reference_slices(ours[0], theirs[0], axis)]).mean()
        for ours, theirs in zip(leaves[0], target, strict=True)
    ])  # fmt: skip
    loss = LPIPS3D(chunk_size=chunk_size, reduction="none").double()
    values = loss(leaves[1], target)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
    for each in (expected, values):
        (each * weights).sum().backward()
    gradient, found = (leaf.grad for leaf in leaves)
    assert ((found - gradient).norm() / gradient.norm()).item() < 1e-10
    loss.reduction = "mean"
    torch.testing.assert_close(loss(input, target), values.mean().detach())


def test_fraction_is_unbiased() -> None:
    """Over many draws a slice weighs 1 / (D + H + W) on average, within five standard errors: its weight's standard
    deviation is at most its run's length, 4, times the mean."""
    sides, loss = torch.Size((31, 35, 33)), LPIPS3D(slice_fraction=0.3)
    torch.manual_seed(0)
    sums = [torch.zeros(side, dtype=torch.float64) for side in sides]
    for _ in range(2000):
        for total, (indices, weights) in zip(sums, loss._draw(sides), strict=True):
            total[indices] += weights
    mean = torch.cat(sums) * sum(sides) / 2000
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=5 * (4 / 2000) ** 0.5)


def test_constant_volumes(lpips: LPIPS3D) -> None:
    """Nothing differs: 0 and a zero gradient, where features may be all zero too; a black reconstruction, at the start
    of training, is pulled by finite numbers."""
    volume = random_pair(SMALL)[1]
    for same in (volume, torch.zeros_like(volume)):
        value, gradient = value_and_gradient(lpips, same, same)
        assert value == 0 and not gradient.any()
    value, gradient = value_and_gradient(lpips, torch.zeros_like(volume), volume)
    assert value > 0 and gradient.isfinite().all() and gradient.any()


def test_out_of_range_is_clamped_and_pulled_back(lpips: LPIPS3D) -> None:
    """Beyond [0, 1] the value is that of the clamped volume, and so is the gradient: it does not vanish there. Autocast
    changes nothing, bit for bit."""
    input, target = random_pair(SMALL)
    beyond, brighter = 3 * input - 1, 2 * target
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(lpips, beyond, brighter)
    expected, expected_gradient = value_and_gradient(lpips, beyond.clamp(0, 1), brighter.clamp(0, 1))
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
    assert gradient[beyond > 1].any() and gradient[beyond < 0].any()


def test_mistakes_are_named(lpips: LPIPS3D, tmp_path: Path) -> None:
    """Below 31 voxels AlexNet has no output; nothing is broadcast; no gradient of a target is left out; a fraction out
    of range; a file of which a tensor is missing."""
    small, low = torch.zeros(SMALL), torch.zeros(1, 1, 31, 30, 31)
    for input, target, message in (
        (low, low, "at least 31 voxels .* got 31 x 30 x 31"),
        (small, small.expand(2, -1, -1, -1, -1), "must both be"),
        (small, small.clone().requires_grad_(), "target requires a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            lpips(input, target)
    with pytest.raises(InputError, match="slice_fraction"):
        LPIPS3D(slice_fraction=1.5)
    tensors = load_file(DEFAULT_WEIGHTS)
    del tensors["lin3.weight"]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors does not hold .*lin3\.weight"):
        LPIPS3D(str(tmp_path / "x.safetensors"))
