"""LPIPS3D against the published definition written out slice by slice, and its behaviour as a loss in training.

Gradients are compared in float64: in float32 a ReLU or a max-pooling that stands at a tie goes either way with the
order of summation, which moves the gradient of single pixels by far more than rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from scripts.metrics import LPIPS3D, MIN_SIDE
from scripts.metrics.lpips import DEFAULT_WEIGHTS
from scripts.run import InputError

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Stride 4, two poolings: every remainder of the sides matters.
SHAPES = [(1, 1, 31, 32, 33), (1, 1, 34, 35, 39), (2, 1, 33, 37, 31)]
# Published for the example pictures of the LPIPS repository, three digits.
EXAMPLES = [("ex_p0.png", 0.722), ("ex_p1.png", 0.138)]
# Printed once by `reference` below, in float64, for `random_pair((1, 1, *sides), seed)`: sides, seed, LPIPS.
REGRESSION = [((31, 36, 33), 0, 0.2152306498078034), ((40, 33, 35), 1, 0.2539191445642734)]


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


def reference_2d(input: Tensor, target: Tensor) -> Tensor:
    """LPIPS (AlexNet, v0.1) of two pictures (1, 3, H, W) in [-1, 1], as published: one number, with autograd."""
    weights = reference_weights(input.dtype)
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=input.dtype)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=input.dtype)[:, None, None]

    def convolve(hidden: Tensor, number: int, stride: int, padding: int) -> Tensor:
        kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
        return F.relu(F.conv2d(hidden, kernel, bias, stride=stride, padding=padding))

    def layers(picture: Tensor) -> list[Tensor]:
        relu1 = convolve((picture - shift) / scale, 0, 4, 2)
        relu2 = convolve(F.max_pool2d(relu1, 3, 2), 3, 1, 2)
        relu3 = convolve(F.max_pool2d(relu2, 3, 2), 6, 1, 1)
        relu4 = convolve(relu3, 8, 1, 1)
        return [relu1, relu2, relu3, relu4, convolve(relu4, 10, 1, 1)]

    def unit(feature: Tensor) -> Tensor:
        return feature / (torch.linalg.vector_norm(feature, dim=1, keepdim=True) + 1e-10)

    distance = input.new_zeros(())
    for number, (ours, theirs) in enumerate(zip(layers(input), layers(target), strict=True)):
        distance = distance + F.conv2d((unit(ours) - unit(theirs)) ** 2, weights[f"lin{number}.weight"]).mean()
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


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def lpips() -> LPIPS3D:
    """The loss as it is by default."""
    return LPIPS3D()


@pytest.fixture(scope="module")
def lpips_double() -> LPIPS3D:
    """The same in float64."""
    return LPIPS3D().double()


def value_and_gradient(loss: LPIPS3D, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Value, and its gradient for the input."""
    leaf = input.clone().requires_grad_()
    value = loss(leaf, target)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


def read_volume(path: Path, n_sides: tuple[int, int, int]) -> Tensor:
    """The central box of a scan, divided by its 99.5th percentile: (1, 1, *n_sides) in [0, 1]."""
    data = nib.Nifti1Image.from_filename(path).get_fdata(dtype=np.float32)
    corners = [(have - want) // 2 for have, want in zip(data.shape, n_sides, strict=True)]
    box = data[tuple(slice(corner, corner + want) for corner, want in zip(corners, n_sides, strict=True))]
    return torch.from_numpy(box / np.percentile(data, 99.5)).clamp(0, 1)[None, None]


# The definition


@pytest.mark.parametrize(("name", "published"), EXAMPLES)
def test_published_pictures(lpips: LPIPS3D, name: str, published: float) -> None:
    """The LPIPS repository's example pictures get the published values, to the published digits."""
    pictures = pytest.importorskip("PIL.Image")
    folder = SHARED / "lpips_example"
    if not folder.is_dir():
        pytest.skip("the example pictures are not here")
    arrays = [
        np.asarray(pictures.open(folder / file).convert("RGB"), dtype=np.float32) for file in ("ex_ref.png", name)
    ]
    first, second = (torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1)[None] for array in arrays)
    assert lpips.lpips_2d(first, second).item() == pytest.approx(published, abs=5e-4)
    torch.testing.assert_close(lpips.lpips_2d(first, second)[0], reference_2d(first, second), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("sides", "seed", "expected"), REGRESSION)
def test_regression(lpips: LPIPS3D, sides: tuple[int, ...], seed: int, expected: float) -> None:
    """Values stay what the reference once printed; float32 sums of a few thousand terms hold 1e-5."""
    assert lpips(*random_pair((1, 1, *sides), seed)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_slice_loop(lpips_double: LPIPS3D, shape: tuple[int, ...]) -> None:
    """Value and gradient are those that autograd gives the slice-by-slice definition; only rounding is left."""
    input, target = (volume.double() for volume in random_pair(shape))
    leaf = input.clone().requires_grad_()
    expected = reference(leaf, target).mean()
    expected.backward()
    value, gradient = value_and_gradient(lpips_double, input, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=0)
    assert relative(gradient, leaf.grad) < 1e-10


@pytest.mark.parametrize("pattern", ["ds002748/sub-01/anat/*_T1w.nii.gz", "ds000011/sub-01/anat/*_T1w.nii.gz"])
def test_equals_the_slice_loop_on_scans(lpips: LPIPS3D, lpips_double: LPIPS3D, pattern: str) -> None:
    """Real tissue and real background: the value to 1e-5 in float32, the gradient to 1e-5 in float64."""
    paths = sorted(SHARED.glob(pattern))
    if not paths:
        pytest.skip("the shared scans are not here")
    target = read_volume(paths[0], (36, 33, 37))
    input = F.interpolate(F.avg_pool3d(target, 2), size=target.shape[2:], mode="trilinear")
    leaf = input.double().requires_grad_()
    expected = reference(leaf, target.double()).mean()
    expected.backward()
    assert lpips(input, target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative(value_and_gradient(lpips_double, input.double(), target.double())[1], leaf.grad) < 1e-5


def test_gradient_predicts_the_change(lpips_double: LPIPS3D) -> None:
    """A small step changes the value by gradient times step, to the step's own order."""
    input, target = (volume.double() * 0.8 + 0.1 for volume in random_pair((1, 1, 31, 31, 31)))  # off the clamp
    value, gradient = value_and_gradient(lpips_double, input, target)
    step = -1e-7 * gradient / gradient.norm()
    change = lpips_double(input + step, target) - value
    assert change.item() == pytest.approx((gradient * step).sum().item(), rel=1e-3)


# Batches and chunks


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_chunk_size_changes_nothing(lpips_double: LPIPS3D, chunk_size: int) -> None:
    """How many slices go at once is a matter of memory only."""
    pair = [volume.double() for volume in random_pair((1, 1, 31, 33, 32))]
    expected, expected_gradient = value_and_gradient(lpips_double, *pair)
    value, gradient = value_and_gradient(LPIPS3D(chunk_size=chunk_size).double(), *pair)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    assert relative(gradient, expected_gradient) < 1e-10


def test_samples_are_independent(lpips: LPIPS3D) -> None:
    """A batch's values are those of its samples alone, and the mean is over the batch."""
    input, target = random_pair((3, 1, 31, 32, 33))
    values = LPIPS3D(reduction="none")(input, target)
    assert values.shape == (3,)
    alone = torch.stack([lpips(input[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(values, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(lpips(input, target), values.mean())


def test_each_sample_gets_its_own_share_of_the_gradient() -> None:
    """Weights on the samples' values weigh their gradients, as with any loss."""
    input, target = random_pair((2, 1, 31, 31, 31))
    loss = LPIPS3D(reduction="none")
    leaf = input.clone().requires_grad_()
    (loss(leaf, target) * torch.tensor([0.0, 3.0])).sum().backward()
    _, gradient = value_and_gradient(loss, input[1:], target[1:])
    assert leaf.grad is not None and not leaf.grad[0].any()
    torch.testing.assert_close(leaf.grad[1:], 3 * gradient, rtol=1e-3, atol=1e-3 * gradient.abs().max().item())


# A random share of slices


def test_fraction_is_reproducible() -> None:
    """The slices come from torch's global generator: the same seed, the same value; another draw, another one."""
    loss, pair = LPIPS3D(slice_fraction=0.2), random_pair((1, 1, 31, 32, 33))
    torch.manual_seed(3)
    first, second = loss(*pair), loss(*pair)
    torch.manual_seed(3)
    assert torch.equal(loss(*pair), first)
    assert not torch.equal(first, second)


def test_whole_volume_leaves_the_generator_alone(lpips: LPIPS3D) -> None:
    """Without a draw no random numbers are used."""
    state = torch.get_rng_state()
    lpips(*random_pair((1, 1, 31, 31, 31)))
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=15, deadline=None)
@given(
    sides=st.tuples(*[st.integers(MIN_SIDE, 60)] * 3),
    fraction=st.floats(0.001, 1.0),
    seed=st.integers(0, 1000),
)
def test_drawn_slices(lpips: LPIPS3D, sides: tuple[int, ...], fraction: float, seed: int) -> None:
    """Every axis has its share of slices, at least one and none twice; the weights add up to the mean's."""
    loss = LPIPS3D(slice_fraction=fraction)
    torch.manual_seed(seed)
    drawn = loss._draw(torch.Size(sides))
    for side, (indices, _) in zip(sides, drawn, strict=True):
        assert len(indices) == max(1, round(fraction * side)) == len(indices.unique())
        assert indices.min() >= 0 and indices.max() < side
    assert sum(weights.sum().item() for _, weights in drawn) == pytest.approx(1)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7])
def test_fraction_is_unbiased(fraction: float) -> None:
    """Over many draws a slice weighs 1 / (D + H + W) on average: so does the estimate equal the mean of all.

    4000 draws; a slice's weight has a standard deviation of at most its run's length times the mean, so 5 standard
    errors are 5 * sqrt(run / 4000) of the mean, 0.5 at a run of 35 slices.
    """
    sides = torch.Size((31, 35, 33))
    loss = LPIPS3D(slice_fraction=fraction)
    torch.manual_seed(0)
    sums = [torch.zeros(side, dtype=torch.float64) for side in sides]
    for _ in range(4000):
        for total, (indices, weights) in zip(sums, loss._draw(sides), strict=True):
            total[indices] += weights
    for side, total in zip(sides, sums, strict=True):
        longest_run = -(-side // max(1, round(fraction * side)))
        torch.testing.assert_close(
            total * sum(sides) / 4000, torch.ones(side).double(), rtol=0, atol=5 * (longest_run / 4000) ** 0.5
        )


def test_fraction_weighs_its_slices() -> None:
    """The estimate is the weighted sum of the drawn slices' LPIPS, its gradient zero where no drawn slice is."""
    input, target = random_pair((1, 1, 31, 34, 32))
    loss = LPIPS3D(slice_fraction=0.1)
    torch.manual_seed(5)
    drawn = loss._draw(input.shape[2:])
    torch.manual_seed(5)
    value, gradient = value_and_gradient(loss, input, target)
    expected = 0.0
    untouched = torch.ones(input.shape[2:], dtype=torch.bool)
    for axis, (indices, weights) in enumerate(drawn):
        slices = torch.stack(reference_slices(input[0, 0], target[0, 0], axis))
        expected += (slices[indices] * weights).sum().item()
        untouched.index_fill_(axis, indices, False)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert untouched.any() and not gradient[0, 0][untouched].any()


# As a loss in training


def test_identical_volumes(lpips: LPIPS3D) -> None:
    """Nothing differs: 0 and a zero gradient, on constant background too, where features may be all zero."""
    volume = random_pair((1, 1, 32, 32, 32))[1]
    for same in (volume, torch.zeros_like(volume), torch.ones_like(volume)):
        value, gradient = value_and_gradient(lpips, same, same)
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_constant_volumes_have_finite_gradients(lpips: LPIPS3D) -> None:
    """A black reconstruction, at the start of training, is pulled by finite numbers."""
    target = random_pair((1, 1, 31, 31, 31))[1]
    value, gradient = value_and_gradient(lpips, torch.zeros_like(target), target)
    assert value > 0 and gradient.isfinite().all() and gradient.any()


def test_silent_features(tmp_path: Path) -> None:
    """A layer without any activation adds 0 and no gradient, as published, rather than NaN."""
    tensors = load_file(DEFAULT_WEIGHTS)
    tensors["features.10.bias"] -= 1e6
    save_file(tensors, tmp_path / "silent.safetensors")
    pair = random_pair((1, 1, 31, 31, 31))
    value, gradient = value_and_gradient(LPIPS3D(tmp_path / "silent.safetensors"), *pair)
    assert 0 < value < LPIPS3D()(*pair)
    assert gradient.isfinite().all() and gradient.any()


def test_out_of_range_is_clamped_and_pulled_back(lpips: LPIPS3D) -> None:
    """Beyond [0, 1] the value is that of the clamped volume, and so is the gradient: it does not vanish there."""
    input, target = random_pair((1, 1, 31, 31, 31))
    beyond = 3 * input - 1
    value, gradient = value_and_gradient(lpips, beyond, 2 * target)
    expected, expected_gradient = value_and_gradient(lpips, beyond.clamp(0, 1), (2 * target).clamp(0, 1))
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert gradient[beyond > 1].any() and gradient[beyond < 0].any()


def test_inputs_are_left_alone(lpips: LPIPS3D) -> None:
    """The clamp works on copies."""
    input, target = (2 * volume - 0.5 for volume in random_pair((1, 1, 31, 31, 31)))
    before = input.clone(), target.clone()
    value_and_gradient(lpips, input, target)
    assert torch.equal(input, before[0]) and torch.equal(target, before[1])


def test_autocast_changes_nothing(lpips: LPIPS3D) -> None:
    """Under autocast the value is the same float32 value, bit for bit."""
    pair = random_pair((1, 1, 31, 32, 31))
    value, gradient = value_and_gradient(lpips, *pair)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_value, autocast_gradient = value_and_gradient(lpips, *pair)
    assert autocast_value.dtype == torch.float32
    assert torch.equal(autocast_value, value) and torch.equal(autocast_gradient, gradient)


def test_bfloat16_input(lpips: LPIPS3D) -> None:
    """A network's bfloat16 output is taken in float32 and gets a bfloat16 gradient."""
    input, target = random_pair((1, 1, 31, 31, 31))
    value, gradient = value_and_gradient(lpips, input.bfloat16(), target)
    assert value.dtype == torch.float32 and torch.equal(value, lpips(input.bfloat16().float(), target))
    assert gradient.dtype == torch.bfloat16 and gradient.any()


def test_meta_tensors(lpips: LPIPS3D) -> None:
    """MONAI's batches are MetaTensors: plain numbers come out, the gradient arrives."""
    input, target = random_pair((1, 1, 31, 31, 31))
    leaf = input.clone().requires_grad_()
    value = lpips(MetaTensor(leaf), MetaTensor(target))
    value.backward()
    assert type(value) is torch.Tensor and torch.equal(value, lpips(input, target))
    assert leaf.grad is not None and leaf.grad.any()


def test_trains_nothing_and_saves_nothing(lpips: LPIPS3D) -> None:
    """No parameters for an optimiser, no keys in a parent's state dict, all weights moved with the module."""
    assert not list(lpips.parameters())
    assert not torch.nn.Sequential(lpips).state_dict()
    assert all(buffer.dtype == torch.float64 for buffer in LPIPS3D().double().buffers())


def test_no_graph_without_need(lpips: LPIPS3D) -> None:
    """In validation nothing is differentiated, whatever the input says."""
    input, target = random_pair((1, 1, 31, 31, 31))
    with torch.no_grad():
        assert not lpips(input.requires_grad_(), target).requires_grad
    with torch.inference_mode():
        assert lpips(input.detach(), target) > 0


def test_double_backward_is_refused(lpips: LPIPS3D) -> None:
    """The gradient can have no graph of its own, and says so instead of leaving it out."""
    input, target = random_pair((1, 1, 31, 31, 31))
    value = lpips(input.requires_grad_(), target)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(value, input, create_graph=True)


# Mistakes


def test_target_with_gradient_is_refused(lpips: LPIPS3D) -> None:
    """A gradient that would silently be lost is an error."""
    input, target = random_pair((1, 1, 31, 31, 31))
    with pytest.raises(ValueError, match="target requires a gradient"):
        lpips(input, target.requires_grad_())


@pytest.mark.parametrize("sides", [(30, 64, 64), (31, 30, 31), (64, 64, 16)])
def test_too_small(lpips: LPIPS3D, sides: tuple[int, ...]) -> None:
    """Below 31 voxels AlexNet has no output; the sentence says what is needed."""
    with pytest.raises(InputError, match="at least 31 voxels .* got " + " x ".join(map(str, sides))):
        lpips(torch.zeros(1, 1, *sides), torch.zeros(1, 1, *sides))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 1, 32, 32), (1, 1, 32, 32)),
        ((1, 2, 32, 32, 32), (1, 2, 32, 32, 32)),
        ((1, 1, 32, 32, 32), (2, 1, 32, 32, 32)),
    ],
)
def test_wrong_shapes(lpips: LPIPS3D, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Nothing is broadcast or guessed."""
    with pytest.raises(ValueError, match="must both be"):
        lpips(torch.zeros(first), torch.zeros(second))


@pytest.mark.parametrize(
    "setting", [{"slice_fraction": 0.0}, {"slice_fraction": 1.5}, {"chunk_size": 0}, {"reduction": "sum"}]
)
def test_wrong_settings(setting: dict) -> None:
    """A setting out of range is named."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        LPIPS3D(**setting)


def test_absent_weights(tmp_path: Path) -> None:
    """The file is named."""
    with pytest.raises(InputError, match=r"absent\.safetensors does not exist"):
        LPIPS3D(tmp_path / "absent.safetensors")


def test_damaged_weights(tmp_path: Path) -> None:
    """Half a file, as an interrupted copy leaves it."""
    file = tmp_path / "half.safetensors"
    file.write_bytes(DEFAULT_WEIGHTS.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"half\.safetensors cannot be read"):
        LPIPS3D(file)


@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_foreign_weights(tmp_path: Path, change: str) -> None:
    """Tensors missing or of another shape are named."""
    tensors = load_file(DEFAULT_WEIGHTS)
    tensors["lin3.weight"] = tensors["lin3.weight"][:, :5].contiguous()
    if change == "drop":
        del tensors["lin3.weight"]
    save_file(tensors, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match=r"foreign\.safetensors does not hold .*lin3\.weight"):
        LPIPS3D(str(tmp_path / "foreign.safetensors"))
