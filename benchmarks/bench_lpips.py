"""LPIPS over a volume, value and gradient: `LPIPS3D` against loops over slices, in one run.

    python benchmarks/bench_lpips.py [--volume scan.nii.gz] [--repeats 2] [--calls 3] [--threads 2]

Two loops: one in plain torch, and, where it is installed, one that calls the published `lpips` package a slice
(`pip install --no-deps lpips`; AlexNet's layers are built here, so that no torchvision is needed).

Prints the relative difference of value and gradient, the ratio of times, and how much each adds to the process's peak
memory. Each method runs in fresh processes, in turns, and there several times over, as in a training: the best time
counts (the first call builds kernels and takes fresh memory), and the worst memory. Times of a shared machine mean
little, their ratio of one run is what to quote: beside heavy load, that of the processor's time with one thread
(threads that wait for others count as busy). Linux and macOS only (peak memory).

In float32 the gradients differ at pixels where a ReLU or a max-pooling stands at a tie: rounding then decides which
way the gradient goes. The last line, with double precision on a smaller volume, has no such noise.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.lpips import DEFAULT_WEIGHTS, LPIPS3D  # noqa: E402

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


def package_loop(dtype: torch.dtype) -> Method:
    """Build the loop of most trainings: the `lpips` package, called a slice with three equal channels."""
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


def chunked(dtype: torch.dtype) -> Method:
    """Build this bundle's way."""
    return LPIPS3D().to(dtype)


METHODS: dict[str, Callable[[torch.dtype], Method]] = {"LPIPS3D": chunked, "slice loop": slice_loop}
if importlib.util.find_spec("lpips"):
    METHODS["lpips package"] = package_loop


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


def measure(method: Method, input: Tensor, target: Tensor, calls: int) -> dict[str, float]:
    """Run `calls` times, after a small warm-up: value, best and first time, GB added to the peak memory."""
    small = torch.rand(1, 1, 32, 32, 32, dtype=input.dtype)
    method(small.clone().requires_grad_(), small).backward()
    unit = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss counts bytes there, kB on Linux
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, cpu_times = [], []
    for _ in range(calls):
        input.grad = None
        start, start_cpu = time.perf_counter(), time.process_time()
        value = method(input.requires_grad_(), target)
        value.backward()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - start_cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    figures = {"first": times[0], "seconds": min(times), "cpu_seconds": min(cpu_times), "gigabytes": peak / unit}
    return {"value": value.item(), **figures}


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    """Run each method in its own processes and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volume", type=Path, help="NIfTI file; without it a synthetic volume")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--calls", type=int, default=3, help="calls in each process, of which the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", choices=list(METHODS), help=argparse.SUPPRESS)  # the child process's part
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        input, target = make_pair(arguments.volume, MODEL_SPACE)
        print(json.dumps(measure(METHODS[arguments.run](torch.float32), input, target, arguments.calls)))
        torch.save(input.grad, arguments.gradient)
        return

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.pth" for number, name in enumerate(METHODS)}
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
        for _ in range(arguments.repeats):
            for name in METHODS:
                command = [sys.executable, __file__, "--run", name, "--gradient", str(files[name])]
                command += ["--threads", str(arguments.threads), "--calls", str(arguments.calls)]
                command += ["--volume", str(arguments.volume)] if arguments.volume else []
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[name].append(json.loads(printed.splitlines()[-1]))
        gradients = {name: torch.load(file) for name, file in files.items()}

    ours, *loops = METHODS
    print(f"volume {' x '.join(map(str, MODEL_SPACE))}, {arguments.threads} threads, {arguments.repeats} repeats")
    best = {
        name: {key: min(result[key] for result in results) for key in ("value", "first", "seconds", "cpu_seconds")}
        | {"gigabytes": max(result["gigabytes"] for result in results)}
        for name, results in runs.items()
    }
    for name, figures in best.items():
        print(
            f"{name:>13}: LPIPS {figures['value']:.6f}, {figures['seconds']:.2f} s (first {figures['first']:.2f} s; "
            f"{figures['cpu_seconds']:.2f} s of the processor), peak memory +{figures['gigabytes']:.2f} GB"
        )
    for loop in loops:
        ratios = (f"{best[loop][key] / best[ours][key]:.1f} : 1" for key in ("seconds", "first", "cpu_seconds"))
        print("{} against {}: time {}, first call {}, processor's time {}".format(loop, ours, *ratios))
        value = abs(best[ours]["value"] / best[loop]["value"] - 1)
        gradient = relative(gradients[ours], gradients[loop])
        print(f"  relative difference, float32: value {value:.1e}, gradient {gradient:.1e}")

    values, small_gradients = {}, {}
    for name, build in METHODS.items():
        input, target = (volume.double() for volume in make_pair(None, SMALL))
        values[name] = measure(build(torch.float64), input, target, calls=1)["value"]
        assert input.grad is not None
        small_gradients[name] = input.grad
    size = " x ".join(map(str, SMALL))
    for loop in loops:
        value, gradient = abs(values[ours] / values[loop] - 1), relative(small_gradients[ours], small_gradients[loop])
        print(f"{loop}, relative difference, float64, {size}: value {value:.1e}, gradient {gradient:.1e}")


if __name__ == "__main__":
    main()
