"""LPIPS over a volume, value and gradient: `LPIPS3D` against loops over slices, in one run.

    python benchmarks/bench_lpips.py [--volume scan.nii.gz] [--repeats 2] [--calls 3] [--threads 2]

Two loops: one in plain torch, and, where it is installed, one that calls the published `lpips` package a slice
(`pip install --no-deps lpips`; AlexNet's layers are built here, so that no torchvision is needed).

Prints the relative difference of value and gradient, the ratio of times, how much each adds to the process's peak
memory, and how near LPIPS3D is to its floor: the operations of its convolutions at the rate of this machine's matrix
product. Each method runs in fresh processes (see `fresh_process`). With `lpips`, MONAI's `PerceptualLoss` runs too.

In float32 the gradients differ at pixels where a ReLU or a max-pooling stands at a tie: rounding then decides which
way the gradient goes. The last line, with double precision on a smaller volume, has no such noise.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from fresh_process import arguments, measure, run_in_turns, time_key
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.metrics import LPIPS3D  # noqa: E402
from scripts.metrics.lpips import DEFAULT_WEIGHTS  # noqa: E402

MODEL_SPACE = (112, 136, 112)  # voxels
SMALL = (47, 56, 50)  # voxels, for double precision
Method = Callable[[Tensor, Tensor], Tensor]


def slice_loop(dtype: torch.dtype) -> Method:
    """Build the plain way: each slice selected from the volume, repeated to three channels, through the published 2D
    metric, all kept for one backward pass."""
    weights = {name: tensor.to(dtype) for name, tensor in load_file(DEFAULT_WEIGHTS).items()}
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=dtype).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=dtype).view(1, 3, 1, 1)

    def features(picture: Tensor) -> list[Tensor]:
        hidden = (2 * picture.expand(1, 3, -1, -1) - 1 - shift) / scale
        layers = []
        for number, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
            if number in (3, 6):
                hidden = F.max_pool2d(hidden, 3, 2)
            kernel, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            hidden = F.conv2d(hidden, kernel, bias, stride=stride, padding=padding).relu()
            layers.append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return layers

    def distance(input: Tensor, target: Tensor) -> Tensor:
        total = input.new_zeros(())
        for axis in (2, 3, 4):
            for index in range(input.shape[axis]):
                pairs = zip(features(input.select(axis, index)), features(target.select(axis, index)), strict=True)
                for layer, (ours, theirs) in enumerate(pairs):
                    total = total + F.conv2d((ours - theirs).square(), weights[f"lin{layer}.weight"]).mean()
        return total / sum(input.shape[2:])

    return distance


def stand_in_for_torchvision() -> None:
    """Let `lpips` find AlexNet with the bundle's weights where it asks torchvision for it."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True),
    )  # fmt: skip
    prefix = "features."
    trunk = {name: tensor for name, tensor in load_file(DEFAULT_WEIGHTS).items() if name.startswith(prefix)}
    layers.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in trunk.items()})
    models: Any = types.ModuleType("torchvision.models")
    models.alexnet = lambda pretrained: types.SimpleNamespace(features=layers)
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.models = models
    sys.modules |= {"torchvision": torchvision, "torchvision.models": models}


def package_loop(dtype: torch.dtype) -> Method:
    """Build the loop of most trainings: the `lpips` package, called a slice with three equal channels."""
    stand_in_for_torchvision()
    import lpips

    metric = lpips.LPIPS(net="alex", verbose=False).to(dtype)

    def distance(input: Tensor, target: Tensor) -> Tensor:
        total = input.new_zeros(())
        for axis in (2, 3, 4):
            for index in range(input.shape[axis]):
                pair = (volume.select(axis, index).expand(1, 3, -1, -1) for volume in (input, target))
                total = total + metric(*pair, normalize=True).mean()
        return total / sum(input.shape[2:])

    return distance


def perceptual_loss(dtype: torch.dtype) -> Method:
    """Build MONAI's: all slices of an axis in one batch through the same package. It adds the axes' means up and does
    not scale [0, 1] to [-1, 1], so its value is another one."""
    stand_in_for_torchvision()
    from monai.losses import PerceptualLoss

    return PerceptualLoss(spatial_dims=3, network_type="alex", is_fake_3d=True, fake_3d_ratio=1.0).to(dtype)


def chunked(dtype: torch.dtype) -> Method:
    """Build this bundle's way."""
    return LPIPS3D().to(dtype)


METHODS: dict[str, Callable[[torch.dtype], Method]] = {"LPIPS3D": chunked, "slice loop": slice_loop}
SAME_VALUE = list(METHODS)  # as LPIPS3D
if importlib.util.find_spec("lpips"):
    METHODS |= {"lpips package": package_loop, "MONAI PerceptualLoss": perceptual_loss}
    SAME_VALUE.append("lpips package")


def make_pair(volume: Path | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Make a volume (1, 1, D, H, W) in [0, 1], read or synthetic, and a blurred copy with a little noise."""
    torch.manual_seed(0)
    if volume is None:
        target = F.interpolate(torch.rand(1, 1, 28, 34, 28), size=shape, mode="trilinear")
    else:
        data = torch.from_numpy(nib.Nifti1Image.from_filename(volume).get_fdata(dtype=np.float32))[None, None]
        for axis, side in enumerate(shape, start=2):
            excess = data.shape[axis] - side
            data = data.narrow(axis, max(0, excess // 2), min(side, data.shape[axis]))
        missing = [side - have for side, have in zip(shape, data.shape[2:], strict=True)]
        data = F.pad(data, [pad for gap in reversed(missing) for pad in (gap // 2, gap - gap // 2)])
        target = (data / np.percentile(data.numpy(), 99.5)).clamp(0, 1)
    blurred = F.interpolate(F.avg_pool3d(target, 2), size=shape, mode="trilinear")
    return (blurred + 0.02 * torch.randn(target.shape)).clamp(0, 1), target


def value_and_gradient(method: Method, input: Tensor, target: Tensor) -> float:
    """The value; the gradient is in `input.grad`."""
    input.grad = None
    value = method(input.requires_grad_(), target)
    value.backward()
    return value.item()


def run(name: str, volume: Path | None, calls: int, gradient: Path) -> dict[str, float]:
    """One method, in this process; the gradient goes to a file."""
    method = METHODS[name](torch.float32)
    input, target = make_pair(volume, MODEL_SPACE)
    small = torch.rand(1, 1, 32, 32, 32)
    warm_up = partial(value_and_gradient, method, small, small.clone())
    figures = measure(partial(value_and_gradient, method, input, target), calls, warm_up)
    torch.save(input.grad, gradient)
    return figures | {"value": value_and_gradient(method, input, target)}


def floor(key: str) -> tuple[float, float]:
    """Operations of LPIPS3D's convolutions, forward and backward, and a large matrix product's a second of `key`."""
    input, target = make_pair(None, MODEL_SPACE)
    with FlopCounterMode(display=False) as counter:
        value_and_gradient(LPIPS3D(), input, target)
    matrix = torch.rand(2048, 2048)
    return counter.get_total_flops(), 2 * 2048**3 / measure(lambda: matrix @ matrix, calls=10)[key]


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    """Run each method in its own processes and print the comparison."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--volume", type=Path, help="NIfTI file; without it a synthetic volume")
    parser.add_argument("--gradient", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        print(json.dumps(run(given.run, given.volume, given.calls, given.gradient)))
        return

    ours = "LPIPS3D"
    with tempfile.TemporaryDirectory() as folder:

        def options(name: str) -> list[str]:
            volume = ["--volume", str(given.volume)] if given.volume else []
            gradient = ["--gradient", f"{folder}/{name}.pth"]
            return [*volume, *gradient, "--calls", str(given.calls), "--threads", str(given.threads)]

        figures = run_in_turns(__file__, METHODS, given.repeats, options)
        gradients = {name: torch.load(f"{folder}/{name}.pth", weights_only=True) for name in METHODS}

    key = time_key(given.threads)
    size = " x ".join(map(str, MODEL_SPACE))
    print(f"volume {size}, {given.threads} threads, {key}, best of {given.repeats} x {given.calls}")
    print("| way | its time : LPIPS3D's | memory added to the peak, GB | value | gradient, relative difference |")
    print("|---|---|---|---|---|")
    for name in METHODS:
        ratio = figures[name][key] / figures[ours][key]
        same = name in SAME_VALUE
        difference = f"{relative(gradients[ours], gradients[name]):.1e}" if same else ""
        cells = [f"{ratio:.1f} : 1", f"{figures[name]['gigabytes']:.2f}", f"{figures[name]['value']:.6f}", difference]
        print(f"| {name} | {' | '.join(cells)} |")
    operations, rate = floor(key)
    times = figures[ours][key] / (operations / rate)
    print(f"floor: {operations / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s; {ours} takes {times:.2f} times that")

    small = " x ".join(map(str, SMALL))
    values, small_gradients = {}, {}
    for name in SAME_VALUE:
        input, target = (volume.double() for volume in make_pair(None, SMALL))
        values[name] = value_and_gradient(METHODS[name](torch.float64), input, target)
        small_gradients[name] = input.grad
    for name in SAME_VALUE[1:]:
        value, gradient = abs(values[ours] / values[name] - 1), relative(small_gradients[ours], small_gradients[name])
        print(f"{name}, relative difference, float64, {small}: value {value:.1e}, gradient {gradient:.1e}")


if __name__ == "__main__":
    main()
