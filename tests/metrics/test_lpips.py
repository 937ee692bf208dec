"""LPIPS3D against the published definition written out slice by slice, and its behaviour as a loss in training.

Gradients are compared in float64: in float32 a ReLU or a max-pooling that stands at a tie goes either way with the
order of summation, which moves the gradient of single pixels by far more than rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.metrics import LPIPS3D
from scripts.run import InputError

SHARED = ROOT.parent / "shared" / "data"
DEFAULT_WEIGHTS = ROOT / "models" / "lpips_alex.safetensors"

# Stride 4, two poolings: every remainder of the sides matters. With how many slices go through at once.
SHAPES = [((1, 1, 31, 32, 34), 16), ((1, 1, 33, 35, 31), 5)]
# Published for the example pictures of the LPIPS repository, three digits.
EXAMPLES = [("ex_p0.png", 0.722), ("ex_p1.png", 0.138)]
SETTINGS = [{"slice_fraction": 0.0}, {"slice_fraction": 1.5}, {"chunk_size": 0}, {"reduction": "sum"}]
SMALL = (1, 1, 31, 31, 31)
WRONG_SHAPES = [
    ((1, 1, 32, 32), (1, 1, 32, 32)), ((1, 2, 32, 32, 32), (1, 2, 32, 32, 32)), (SMALL, (2, *SMALL[1:])),
]  # fmt: skip


def random_pair(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make a smooth volume and a noisy copy, both in [0, 1], from NumPy's generator, which keeps its numbers."""
    rng = np.random.default_rng(seed)
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
    weights = reference_weights(picture.dtype)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=picture.dtype)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=picture.dtype)[:, None, None]

    def convolve(hidden: Tensor, number: int, stride: int, padding: int) -> Tensor:
        kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
        return F.relu(F.conv2d(hidden, kernel, bias, stride=stride, padding=padding))

    relu1 = convolve((picture - shift) / scale, 0, 4, 2)
    relu2 = convolve(F.max_pool2d(relu1, 3, 2), 3, 1, 2)
    relu3 = convolve(F.max_pool2d(relu2, 3, 2), 6, 1, 1)
    relu4 = convolve(relu3, 8, 1, 1)
    return [relu1, relu2, relu3, relu4, convolve(relu4, 10, 1, 1)]


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


def reference(input: Tensor, target: Tensor) -> Tensor:
    """LPIPS of volumes (B, 1, D, H, W): mean over the slices of all axes, one value a sample."""
    values = []
    for sample in zip(input[:, 0], target[:, 0], strict=True):
        slices = [value for axis in range(3) for value in reference_slices(*sample, axis)]
        values.append(torch.stack(slices).mean())
    return torch.stack(values)


@pytest.fixture(scope="module")
def lpips() -> LPIPS3D:
    """The loss as it is by default."""
    return LPIPS3D()


def value_and_gradient(loss: LPIPS3D, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and its gradient for the input."""
    leaf = input.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize(("name", "published"), EXAMPLES)
def test_published_pictures(lpips: LPIPS3D, name: str, published: float) -> None:
    """The LPIPS repository's example pictures get the published values, to the published digits."""
    pictures = pytest.importorskip("PIL.Image")
    folder = SHARED / "lpips_example"
    if not folder.is_dir():
        pytest.skip("the example pictures are not here")
    files = [np.asarray(pictures.open(folder / file).convert("RGB"), dtype=np.float32) for file in ("ex_ref.png", name)]
    first, second = (torch.from_numpy(file / 127.5 - 1).permute(2, 0, 1)[None] for file in files)
    assert lpips.lpips_2d(first, second).item() == pytest.approx(published, abs=5e-4)


def test_pictures_are_compared_by_the_definition(lpips: LPIPS3D) -> None:
    """In colour, one value a picture."""
    first, second = (2 * torch.rand(2, 3, 40, 36) - 1 for _ in range(2))
    expected = [reference_2d(first[i : i + 1], second[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(lpips.lpips_2d(first, second), torch.stack(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("shape", "chunk_size"), SHAPES)
def test_equals_the_slice_loop(shape: tuple[int, ...], chunk_size: int) -> None:
    """Value and gradient are those that autograd gives the slice-by-slice definition, whatever goes through at once;
    only rounding is left."""
    input, target = (volume.double() for volume in random_pair(shape))
    leaf = input.clone().requires_grad_()
    expected = reference(leaf, target).mean()
    expected.backward()
    value, gradient = value_and_gradient(LPIPS3D(chunk_size=chunk_size).double(), input, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    assert ((gradient - leaf.grad).norm() / leaf.grad.norm()).item() < 1e-10


@pytest.mark.parametrize("slice_step", [1, 5])
def test_features_are_the_layers_means(lpips: LPIPS3D, slice_step: int) -> None:
    """Of every so many slices of each axis, from half a step on, and of all their positions."""
    volume = random_pair((1, 1, 31, 33, 32))[1][0, 0]
    slices = [plane for axis in range(3) for plane in volume.unbind(axis)[slice_step // 2 :: slice_step]]
    layers = [reference_layers((2 * plane - 1).expand(1, 3, -1, -1)) for plane in slices]
    expected = torch.stack([torch.cat([layer.mean((0, 2, 3)) for layer in each]) for each in layers]).mean(0)
    with torch.autocast("cpu", torch.bfloat16):
        features = lpips.features(volume, slice_step)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-6)  # fp32 through five layers


def test_samples_are_independent(lpips: LPIPS3D) -> None:
    """A batch's values are those of its samples alone, the mean is over the batch, and weights on the samples' values
    weigh their gradients, as with any loss."""
    input, target = random_pair((2, 1, 31, 32, 33))
    loss, leaf = LPIPS3D(reduction="none"), input.clone().requires_grad_()
    values = loss(leaf, target)
    alone = torch.stack([lpips(input[i : i + 1], target[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(values.detach(), alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(lpips(input, target), alone.mean())
    (values * torch.tensor([0.0, 3.0])).sum().backward()
    _, gradient = value_and_gradient(loss, input[1:], target[1:])
    assert leaf.grad is not None and not leaf.grad[0].any()
    torch.testing.assert_close(leaf.grad[1:], 3 * gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


def test_draws_are_the_global_generators(lpips: LPIPS3D) -> None:
    """The same seed, the same value; another draw, another one; a whole volume leaves the generator alone."""
    loss, pair = LPIPS3D(slice_fraction=0.2), random_pair((1, 1, 31, 32, 33))
    torch.manual_seed(3)
    first, second = loss(*pair), loss(*pair)
    torch.manual_seed(3)
    assert torch.equal(loss(*pair), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    lpips(*pair)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7])
def test_fraction_is_unbiased(fraction: float) -> None:
    """Over many draws a slice weighs 1 / (D + H + W) on average: so does the estimate equal the mean of all.

    2000 draws; a slice's weight has a standard deviation of at most its run's length times the mean, so 5 standard
    errors are 5 * sqrt(run / 2000) of the mean, 0.7 at a run of 35 slices.
    """
    sides, loss = torch.Size((31, 35, 33)), LPIPS3D(slice_fraction=fraction)
    torch.manual_seed(0)
    sums = [torch.zeros(side, dtype=torch.float64) for side in sides]
    for _ in range(2000):
        for total, (indices, weights) in zip(sums, loss._draw(sides), strict=True):
            total[indices] += weights
    for side, total in zip(sides, sums, strict=True):
        longest_run = -(-side // max(1, round(fraction * side)))
        tolerance = 5 * (longest_run / 2000) ** 0.5
        torch.testing.assert_close(total * sum(sides) / 2000, torch.ones(side).double(), rtol=0, atol=tolerance)


def test_fraction_weighs_its_slices() -> None:
    """The estimate is the weighted sum of the drawn slices' LPIPS, its gradient zero where no drawn slice is."""
    input, target = random_pair((1, 1, 31, 34, 32))
    loss = LPIPS3D(slice_fraction=0.1)
    torch.manual_seed(5)
    drawn = loss._draw(input.shape[2:])
    torch.manual_seed(5)
    value, gradient = value_and_gradient(loss, input, target)
    expected, untouched = 0.0, torch.ones(input.shape[2:], dtype=torch.bool)
    for axis, (indices, weights) in enumerate(drawn):
        slices = torch.stack(reference_slices(input[0, 0], target[0, 0], axis))
        expected += (slices[indices] * weights).sum().item()
        untouched.index_fill_(axis, indices, False)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert untouched.any() and not gradient[0, 0][untouched].any()


def test_constant_volumes(lpips: LPIPS3D) -> None:
    """Nothing differs: 0 and a zero gradient, where features may be all zero too; a black reconstruction, at the start
    of training, is pulled by finite numbers."""
    volume = random_pair(SMALL)[1]
    for same in (volume, torch.zeros_like(volume), torch.ones_like(volume)):
        value, gradient = value_and_gradient(lpips, same, same)
        assert value == 0 and not gradient.any()
    value, gradient = value_and_gradient(lpips, torch.zeros_like(volume), volume)
    assert value > 0 and gradient.isfinite().all() and gradient.any()


def test_out_of_range_is_clamped_and_pulled_back(lpips: LPIPS3D) -> None:
    """Beyond [0, 1] the value is that of the clamped volume, and so is the gradient: it does not vanish there. The
    clamp works on copies."""
    input, target = random_pair(SMALL)
    beyond, brighter = 3 * input - 1, 2 * target
    before = beyond.clone(), brighter.clone()
    value, gradient = value_and_gradient(lpips, beyond, brighter)
    expected, expected_gradient = value_and_gradient(lpips, beyond.clamp(0, 1), brighter.clamp(0, 1))
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)
    assert gradient[beyond > 1].any() and gradient[beyond < 0].any()
    assert torch.equal(beyond, before[0]) and torch.equal(brighter, before[1])


def test_half_precision_is_computed_in_fp32(lpips: LPIPS3D) -> None:
    """Autocast changes nothing, bit for bit; a bfloat16 input is widened and gets a bfloat16 gradient."""
    input, target = random_pair(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = value_and_gradient(lpips, input, target)
    assert all(map(torch.equal, under, value_and_gradient(lpips, input, target)))
    value, gradient = value_and_gradient(lpips, input.bfloat16(), target)
    assert value.dtype == torch.float32 and torch.equal(value, lpips(input.bfloat16().float(), target))
    assert gradient.dtype == torch.bfloat16 and gradient.any()


def test_lost_gradients_are_refused(lpips: LPIPS3D) -> None:
    """The gradient can have no graph of its own, and the target none at all: an error, instead of leaving it out."""
    input, target = random_pair(SMALL)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(lpips(input.requires_grad_(), target), input, create_graph=True)
    with pytest.raises(ValueError, match="target requires a gradient"):
        lpips(input, target.requires_grad_())


@pytest.mark.parametrize("sides", [(30, 64, 64), (31, 30, 31), (64, 64, 16)])
def test_too_small(lpips: LPIPS3D, sides: tuple[int, ...]) -> None:
    """Below 31 voxels AlexNet has no output; the sentence says what is needed."""
    with pytest.raises(InputError, match="at least 31 voxels .* got " + " x ".join(map(str, sides))):
        lpips(torch.zeros(1, 1, *sides), torch.zeros(1, 1, *sides))


@pytest.mark.parametrize(("first", "second"), WRONG_SHAPES)
def test_wrong_shapes(lpips: LPIPS3D, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Nothing is broadcast or guessed."""
    with pytest.raises(ValueError, match="must both be"):
        lpips(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_wrong_settings(setting: dict[str, Any]) -> None:
    """A setting out of range is named."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        LPIPS3D(**setting)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "does not exist"),
        ("half", "cannot be read"),
        ("dropped", r"does not hold .*lin3\.weight"),
        ("reshaped", r"does not hold .*lin3\.weight"),
    ],
)
def test_other_weights_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    """The file is named: not there, half of it as an interrupted copy leaves it, a tensor missing or another shape."""
    path, tensors = tmp_path / f"{kind}.safetensors", load_file(DEFAULT_WEIGHTS)
    lin3 = tensors.pop("lin3.weight")
    if kind == "half":
        path.write_bytes(DEFAULT_WEIGHTS.read_bytes()[:5000])
    elif kind != "absent":
        save_file(tensors if kind == "dropped" else {**tensors, "lin3.weight": lin3[:, :5].contiguous()}, path)
    with pytest.raises(InputError, match=rf"{kind}\.safetensors {message}"):
        LPIPS3D(str(path))
