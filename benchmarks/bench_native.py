"""The streamed network against the plain one: time, memory, difference, and the error at the slabs' borders.

    python benchmarks/bench_native.py [--size 112 136 112] [--scan scan.nii.gz] [--threads 1] [--double]

`held` is `scripts.streaming.stream` with its default `keep_bytes`. `recomputed` may hold only as much of this size as
the default lets it hold of 256 x 312 x 256 voxels, so that its ratio of times is that of 0.7 mm. Each runs in a process
of its own; memory is what encoding and decoding add to the process's peak. Times of a shared machine mean little: the
ratio of the processor's times, with one thread, is what to quote. With `--double` the errors against double precision
are printed too, and the mean error within two planes of a border over that elsewhere. PyTorch's convolutions in double
precision need more than ten times the memory: take a small size. Linux and macOS only (peak memory).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.networks import BrainVAE, load_weights  # noqa: E402
from scripts.streaming import KEEP_BYTES, stream  # noqa: E402

SLAB = 4  # planes of what is read; the decoder's last stage gives twice as many of the image
LARGE = 256 * 312 * 256  # voxels
METHODS = ("plain", "held", "recomputed", "double")


def make_image(scan: Path | None, size: list[int]) -> Tensor:
    """(1, 1, D, H, W): the middle of a scan divided by its 99.5th percentile, padded with zeros, or noise."""
    if scan is None:
        return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    ras = nib.as_closest_canonical(nib.Nifti1Image.from_filename(scan))
    data = torch.from_numpy(ras.get_fdata(dtype=np.float32) / np.percentile(ras.dataobj, 99.5))
    image = torch.zeros(1, 1, *size)
    inner, target = data, image[0, 0]
    for axis, (have, side) in enumerate(zip(data.shape, size, strict=True)):
        both = min(have, side)
        inner = inner.narrow(axis, (have - both) // 2, both)
        target = target.narrow(axis, (side - both) // 2, both)
    target.copy_(inner)
    return image


def build(method: str, size: list[int]) -> Any:
    """The shipped network."""
    definition = json.loads((ROOT / "configs" / "inference.json").read_text(encoding="utf-8"))["network_def"]
    plain = BrainVAE(**{key: value for key, value in definition.items() if key != "_target_"}).eval()
    network = load_weights(plain, ROOT / "models" / "model.pt").to(memory_format=torch.channels_last_3d)
    if method == "double":
        return network.double().to(memory_format=torch.contiguous_format)  # channels-last norms compute in float32
    keep_bytes = {"held": KEEP_BYTES, "recomputed": KEEP_BYTES * math.prod(size) / LARGE}
    return stream(network, SLAB, keep_bytes[method]) if method in keep_bytes else network


def measure(method: str, image: Tensor, size: list[int]) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """Encode and decode once: processor's seconds and GB added to the peak, then mu and reconstruction."""
    network = build(method, size)
    image = image.double() if method == "double" else image
    unit = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss counts bytes there, kB on Linux
    with torch.no_grad():
        network(image[:, :, :16, :16, :16])
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        mu, _ = network.encode(image)
        recon = network.decode(mu)
        seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "gigabytes": (peak - before) / unit}, (mu, recon)


def border_ratio(error: Tensor) -> float:
    """Mean error (D,) within two planes of the borders of slabs of 2 SLAB planes, over that of the other planes."""
    place = torch.arange(len(error)) % (2 * SLAB)
    near = (place < 2) | (place >= 2 * SLAB - 2)
    return (error[near].mean() / error[~near].mean()).item()


def main() -> None:
    """Run each method in its own process and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=[112, 136, 112])
    parser.add_argument("--scan", type=Path, help="NIfTI file; without it noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--run", choices=METHODS, help=argparse.SUPPRESS)  # the child process's part
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.run:
        image = make_image(arguments.scan, arguments.size)
        figures, tensors = measure(arguments.run, image, arguments.size)
        torch.save(tensors, arguments.result)
        print(json.dumps(figures))
        return

    figures, results = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS if arguments.double else METHODS[:3]:
            file = Path(folder, f"{method}.pth")
            command = [sys.executable, __file__, "--run", method, "--result", str(file)]
            command += ["--threads", str(arguments.threads), "--size", *map(str, arguments.size)]
            command += ["--scan", str(arguments.scan)] if arguments.scan else []
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[method], results[method] = json.loads(printed.splitlines()[-1]), torch.load(file)

    print(f"{' x '.join(map(str, arguments.size))} voxels, {arguments.threads} threads")
    for method, values in figures.items():
        ratio = values["seconds"] / figures["plain"]["seconds"]
        line = f"{method:>10}: processor's time {ratio:.2f} : 1, peak memory +{values['gigabytes']:.2f} GB"
        differences = [(a - b).abs().max() for a, b in zip(results[method], results["plain"], strict=True)]
        line += "; largest difference from plain: mu {:.1e}, image {:.1e}".format(*differences)
        if arguments.double:
            errors = [(a - b).abs() for a, b in zip(results[method], results["double"], strict=True)]
            line += "; error: mu {:.1e}, image {:.1e}".format(*(error.max() for error in errors))
            if method != "double":
                line += f", at borders {border_ratio(errors[1].mean(dim=(0, 1, 3, 4))):.3f} of elsewhere"
        print(line)


if __name__ == "__main__":
    main()
