"""A training step, loss, backward pass and optimizer, in the ways that a user can choose, in one run.

    python benchmarks/bench_train.py [--ways "fp32,bf16"] [--repeats 1] [--calls 2] [--threads 2]

Each way runs in fresh processes (see `fresh_process`). Printed: the ratio of the time of the original's step (MONAI's
blocks, fp32, whole volumes, LPIPS by a loop over slices, Adam) for a voxel to each way's for a voxel, and the process's
peak memory. Every other way is `configs/train.json`, with overlays. The last line tells which share of a step it takes
to load a crop, augmentation included, after the first epoch: two scans of the demo cohort.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_lpips import slice_loop
from fresh_process import arguments, measure, peak_gigabytes, run_in_turns, time_key
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.training import VAELoss  # noqa: E402

ORIGINAL = "original's step"
LOADING = "loading"
N_LOADED = 20  # crops


class Way(NamedTuple):
    """What is told to the config, and what is done to its network."""

    keys: dict[str, Any] = {}
    overlay: str = ""
    plain: bool = False  # MONAI's class and a loop over slices


BF16 = {"amp": True}
NO_LPIPS = {"perceptual_weight": 0.0}
WAYS = {
    ORIGINAL: Way({"channels_last": False, "batch_size": 1}, "lite.json", plain=True),
    "Lite": Way({"batch_size": 1}, "lite.json"),
    "Lite + bf16": Way(BF16 | {"batch_size": 1}, "lite.json"),
    "fp32": Way(),
    "fp32 contiguous": Way({"channels_last": False}),
    "fp32 + no LPIPS": Way(NO_LPIPS),
    "bf16": Way(BF16),
    "bf16 + no LPIPS": Way(BF16 | NO_LPIPS),
    "bf16 + no LPIPS + no equivariance": Way(BF16 | NO_LPIPS | {"equivariance_weight": 0.0}),
    "bf16 + batch of 4": Way(BF16 | {"batch_size": 4}),
    "bf16 contiguous + batch of 8": Way(BF16 | {"channels_last": False, "batch_size": 8}),  # the layers of a GPU
    "bf16 + whole volumes": Way(BF16 | {"crop_size": None}),
}


def parser_of(way: Way) -> ConfigParser:
    """The config of a way."""
    files = [str(ROOT / "configs" / name) for name in ("train.json", way.overlay) if name]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    for key, value in ({"bundle_root": str(ROOT), "device": "cpu", "amp": False} | way.keys).items():
        parser[key] = value
    return parser


def n_voxels(way: Way) -> int:
    """Of a step's images."""
    parser = parser_of(way)
    side = parser.get_parsed_content("crop_size")
    return int(parser.get_parsed_content("batch_size")) * math.prod([side] * 3 if side else parser["spatial_size"])


def loading() -> Callable[[], list[Any]]:
    """A function that loads so many crops that the luck of augmentation evens out; the first call fills the cache."""
    parser = parser_of(Way({"train#dataset#data": "$@cohort[:2]"}))
    dataset: Any = parser.get_parsed_content("train#dataset")
    return lambda: [dataset[index % len(dataset)] for index in range(N_LOADED)]


def step_of(way: Way) -> Any:
    """A function that does one step on noise, the same each time."""
    parser = parser_of(way)
    torch.manual_seed(0)
    network: Any = parser.get_parsed_content("network")
    loss: Any = parser.get_parsed_content("loss")
    inferer: Any = parser.get_parsed_content("inferer")
    if way.plain:
        ours = ("_target_", "wavelet", "norm")
        plain = AutoencoderKL(**{k: v for k, v in parser["network_def"].items() if k not in ours})
        plain.load_state_dict(network.state_dict())
        network, loss = plain, VAELoss(slice_loop(torch.float32), kl_weight=0.107, perceptual_weight=0.6)
        optimizer: Any = torch.optim.Adam(network.parameters(), lr=1e-4)
    else:
        optimizer = parser.get_parsed_content("optimizer")
    network.train()
    side: Any = parser.get_parsed_content("crop_size")
    size = [side] * 3 if side else parser["spatial_size"]
    images = torch.rand(parser.get_parsed_content("batch_size"), 1, *size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with inferer.autocast():
            output = network(images)
        loss(output, images).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", repeats=1, calls=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run == LOADING:
        read = loading()
        print(json.dumps(measure(read, given.calls, warm_up=read)))
        return
    if given.run:
        step = step_of(WAYS[given.run])
        print(json.dumps(measure(step, given.calls, warm_up=step) | {"process_gigabytes": peak_gigabytes()}))
        return

    names = list(dict.fromkeys([ORIGINAL, *given.ways.split(",")]))
    options = ["--calls", str(given.calls), "--threads", str(given.threads)]
    figures = run_in_turns(__file__, [*names, LOADING], given.repeats, options)
    key = time_key(given.threads)
    a_voxel = {name: figures[name][key] / n_voxels(WAYS[name]) for name in names}
    print(f"torch {torch.__version__}, {given.threads} threads, {key}, best of {given.repeats} x {given.calls}")
    print("| way | speed a voxel | process's peak, GB |")
    print("|---|---|---|")
    for name in names:
        print(f"| {name} | {a_voxel[ORIGINAL] / a_voxel[name]:.2f} | {figures[name]['process_gigabytes']:.2f} |")
    a_crop = figures[LOADING][key] / N_LOADED
    shares = {name: a_crop / (a_crop + figures[name][key]) for name in ("fp32", "bf16") if name in figures}
    print("loading in a step:", ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))


if __name__ == "__main__":
    main()
