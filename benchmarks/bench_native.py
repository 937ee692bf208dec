"""Volumes in slabs against the plain network: time a voxel, memory, and the largest difference.

    python benchmarks/bench_native.py [--slab 2] [--sizes 184x220x184 256x312x256] [--threads 1]

The plain network computes the volume of model space, 112 x 136 x 112 voxels; the others would be large for it. Volumes
are noise and weights random: neither time nor memory depends on them. Each runs in fresh processes (see
`fresh_process`); memory is that of the whole process at its peak, with Python, PyTorch and the volume.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from fresh_process import arguments, measure, run_in_turns, time_key

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.networks import BrainVAE, in_slabs  # noqa: E402

CONFIG = json.loads((ROOT / "configs" / "inference.json").read_text(encoding="utf-8"))
MODEL_SPACE = "x".join(map(str, CONFIG["spatial_size"]))
PLAIN, SAME_SIZE = f"plain {MODEL_SPACE}", f"slabs {MODEL_SPACE}"


def voxels(name: str) -> list[int]:
    """Sides of "slabs 184x220x184"."""
    return [int(side) for side in name.split()[-1].split("x")]


def build() -> BrainVAE:
    """The config's network with the same random weights in every process."""
    torch.manual_seed(0)
    definition = {key: value for key, value in CONFIG["network_def"].items() if key != "_target_"}
    return BrainVAE(**definition).eval().to(memory_format=torch.channels_last_3d)


def run(name: str, slab: int, calls: int) -> dict[str, float]:
    """Encode and decode, after a small volume: the figures, and in slabs of model space the difference from plain."""
    plain = build()
    network = plain if name == PLAIN else in_slabs(plain, slab, 0)
    image = torch.rand(1, 1, *voxels(name), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        figures = measure(lambda: network(image), calls, lambda: network(image[:, :, :32, :32, :32]))
        if name == SAME_SIZE:
            whole, difference = plain(image), network(image)
            difference -= whole
            figures["difference"] = float(difference.abs().max() / (whole.max() - whole.min()))
    return figures


def main() -> None:
    """Run each in its own processes and print the comparison."""
    parser = arguments(__doc__ or "", repeats=1, calls=1)
    parser.set_defaults(threads=1)
    parser.add_argument("--slab", type=int, default=CONFIG["slab"], help="planes of the latent at a time")
    parser.add_argument("--sizes", nargs="+", default=["184x220x184", "256x312x256"], help="volumes for the slabs")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        print(json.dumps(run(given.run, given.slab, given.calls)))
        return

    names = [PLAIN, SAME_SIZE, *(f"slabs {size}" for size in given.sizes)]
    options = ["--slab", str(given.slab), "--calls", str(given.calls), "--threads", str(given.threads)]
    figures = run_in_turns(__file__, names, given.repeats, options)
    key = time_key(given.threads)
    of_plain = figures[PLAIN][key] / math.prod(voxels(PLAIN))
    print(f"slabs of {given.slab} planes of the latent, {given.threads} threads")
    for name, values in figures.items():
        ratio = values[key] / math.prod(voxels(name)) / of_plain
        line = f"{name}: time a voxel {ratio:.2f} : 1, peak memory {values['process_gigabytes']:.2f} GB"
        line += f" (+{values['gigabytes']:.2f} GB)"
        if "difference" in values:
            line += f", largest difference from plain {values['difference']:.1e} of its range"
        print(line)


if __name__ == "__main__":
    main()
