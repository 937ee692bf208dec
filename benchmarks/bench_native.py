"""The streamed network against the plain one: time, memory, difference, and the error at the slabs' borders.

    python benchmarks/bench_native.py [--size 112 136 112] [--scan scan.nii.gz] [--threads 1] [--double]

`held` is `scripts.streaming.stream` with its default `keep_bytes`. `recomputed` may hold only as much of this size as
the default lets it hold of 256 x 312 x 256 voxels, so that its ratio of times is that of 0.7 mm. Each runs in fresh
processes (see `fresh_process`); memory is what encoding and decoding add to the process's peak. With `--double` the
errors against double precision are printed too, and the mean error within two planes of a border over that elsewhere.
PyTorch's convolutions in double precision need more than ten times the memory: take a small size.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from fresh_process import arguments, measure, run_in_turns, time_key
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


def run(method: str, image: Tensor, size: list[int], calls: int) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """Encode and decode, after a small volume: the figures, then mu and reconstruction."""
    network = build(method, size)
    image = image.double() if method == "double" else image
    found: list[Tensor] = []

    def both() -> None:
        found[:] = [network.encode(image)[0]]
        found.append(network.decode(found[0]))

    with torch.no_grad():
        figures = measure(both, calls, lambda: network(image[:, :, :16, :16, :16]))
    return figures, (found[0], found[1])


def border_ratio(error: Tensor) -> float:
    """Mean error (D,) within two planes of the borders of slabs of 2 SLAB planes, over that of the other planes."""
    place = torch.arange(len(error)) % (2 * SLAB)
    near = (place < 2) | (place >= 2 * SLAB - 2)
    return (error[near].mean() / error[~near].mean()).item()


def main() -> None:
    """Run each method in its own processes and print the comparison."""
    parser = arguments(__doc__ or "", repeats=1, calls=1)
    parser.set_defaults(threads=1)
    parser.add_argument("--size", type=int, nargs=3, default=[112, 136, 112])
    parser.add_argument("--scan", type=Path, help="NIfTI file; without it noise")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        figures, tensors = run(given.run, make_image(given.scan, given.size), given.size, given.calls)
        torch.save(tensors, given.result)
        print(json.dumps(figures))
        return

    methods = METHODS if given.double else METHODS[:3]
    with tempfile.TemporaryDirectory() as folder:

        def options(method: str) -> list[str]:
            scan = ["--scan", str(given.scan)] if given.scan else []
            size = ["--size", *map(str, given.size)]
            kept = ["--threads", str(given.threads), "--calls", str(given.calls)]
            return [*kept, *scan, *size, "--result", f"{folder}/{method}.pth"]

        figures = run_in_turns(__file__, methods, given.repeats, options)
        results = {method: torch.load(f"{folder}/{method}.pth", weights_only=True) for method in methods}

    key = time_key(given.threads)
    print(f"{' x '.join(map(str, given.size))} voxels, {given.threads} threads")
    for method, values in figures.items():
        ratio = values[key] / figures["plain"][key]
        line = f"{method:>10}: time {ratio:.2f} : 1, peak memory +{values['gigabytes']:.2f} GB"
        differences = [(a - b).abs().max() for a, b in zip(results[method], results["plain"], strict=True)]
        line += "; largest difference from plain: mu {:.1e}, image {:.1e}".format(*differences)
        if given.double:
            errors = [(a - b).abs() for a, b in zip(results[method], results["double"], strict=True)]
            line += "; error: mu {:.1e}, image {:.1e}".format(*(error.max() for error in errors))
            if method != "double":
                line += f", at borders {border_ratio(errors[1].mean(dim=(0, 1, 3, 4))):.3f} of elsewhere"
        print(line)


if __name__ == "__main__":
    main()
