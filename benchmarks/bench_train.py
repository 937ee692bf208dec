"""A training step at full size, loss, backward pass and optimiser, in the ways that a user can choose, in one run.

    python benchmarks/bench_train.py [--ways "fp32,bf16"] [--coarse] [--repeats 1] [--calls 2] [--threads 2]

Each way runs in fresh processes (see `fresh_process`). Printed: the ratio of the time of the original's step (MONAI's
blocks, fp32, LPIPS by a loop over slices) for one volume to each way's for one volume, and the process's peak memory.
Every other way is `configs/train.json` with the bundle's loss over all slices and Adam. The last line tells which share
of a step it takes to load a volume, augmentation included, after the first epoch: two scans of the demo cohort.
`--coarse`: half the resolution, an eighth of the voxels, where time or memory is short.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_lpips import slice_loop
from fresh_process import COARSE, arguments, measure, peak_gigabytes, run_in_turns, time_key
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.losses import VAELoss  # noqa: E402

ORIGINAL = "original's step"
LOADING = "loading"
N_LOADED = 20  # volumes


class Way(NamedTuple):
    """What is told to the config, and what is done to its network."""

    keys: dict[str, Any] = {}
    overlay: str = ""
    batch_size: int = 1
    plain: bool = False  # MONAI's class and a loop over slices
    compiled: bool = False


HALF = {"amp": True}
CHECKPOINTED = {"network_def#use_checkpoint": True}
WAYS = {
    ORIGINAL: Way({"channels_last": False}, plain=True),
    "fp32 contiguous": Way({"channels_last": False}),
    "fp32": Way(),
    "bf16": Way(HALF),
    "bf16 contiguous": Way(HALF | {"channels_last": False}),  # the layers and what they keep are those of a GPU
    "bf16 contiguous + checkpoints": Way(HALF | CHECKPOINTED | {"channels_last": False}),
    "bf16 + a quarter of the slices": Way(HALF | {"slice_fraction": 0.25}),
    "bf16 + no LPIPS": Way(HALF | {"perceptual_weight": 0.0}),
    "bf16 + checkpoints": Way(HALF | CHECKPOINTED),
    "bf16 + batch of 2": Way(HALF, batch_size=2),
    "bf16 + checkpoints + batch of 2": Way(HALF | CHECKPOINTED, batch_size=2),
    "bf16 + compiled": Way(HALF, compiled=True),
    "MAISI size + bf16 + checkpoints": Way(HALF, overlay="maisi.json"),
}


def parser_of(way: Way, coarse: bool) -> ConfigParser:
    """The config of a way."""
    files = [str(ROOT / "configs" / name) for name in ("train.json", way.overlay) if name]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    for key, value in ({"bundle_root": str(ROOT), "amp": False} | way.keys | (COARSE if coarse else {})).items():
        parser[key] = value
    return parser


def loading(coarse: bool) -> Callable[[], list[Any]]:
    """A function that loads so many volumes that the luck of augmentation evens out; the first call fills the cache."""
    parser = parser_of(Way({"train#dataset#data": "$@cohort[:2]"}), coarse)
    dataset: Any = parser.get_parsed_content("train#dataset")
    return lambda: [dataset[index % len(dataset)] for index in range(N_LOADED)]


def step_of(way: Way, coarse: bool) -> Any:
    """A function that does one step on volumes of noise, the same ones each time."""
    parser = parser_of(way, coarse)
    torch.manual_seed(0)
    network: Any = parser.get_parsed_content("network")
    loss: Any = parser.get_parsed_content("loss")
    inferer: Any = parser.get_parsed_content("inferer")
    device = parser.get_parsed_content("device")
    if way.plain:
        plain = AutoencoderKL(**{k: v for k, v in parser["network_def"].items() if k != "_target_"})
        plain.load_state_dict(network.state_dict())
        network, loss = plain.to(device), VAELoss(slice_loop(torch.float32))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    network.train()
    forward = torch.compile(network) if way.compiled else network
    images = torch.rand(way.batch_size, 1, *parser["spatial_size"], device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with inferer.autocast():
            output = forward(images)
        loss(output, images).backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", repeats=1, calls=2)
    parser.add_argument("--ways", default=",".join(name for name in WAYS if "compiled" not in name))
    parser.add_argument("--coarse", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run == LOADING:
        read = loading(given.coarse)
        print(json.dumps(measure(read, given.calls, warm_up=read)))
        return
    if given.run:
        step = step_of(WAYS[given.run], given.coarse)
        figures = measure(step, given.calls, warm_up=step if WAYS[given.run].compiled else None)
        print(json.dumps(figures | {"process_gigabytes": peak_gigabytes()}))
        return

    names = list(dict.fromkeys([ORIGINAL, *given.ways.split(",")]))
    options = ["--calls", str(given.calls), "--threads", str(given.threads), *(["--coarse"] if given.coarse else [])]
    figures = run_in_turns(__file__, [*names, LOADING], given.repeats, options)
    key = time_key(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {key}, best of {given.repeats} x {given.calls}")
    print("| way | speed a volume | process's peak, GB |")
    print("|---|---|---|")
    for name in names:
        ratio = figures[ORIGINAL][key] / figures[name][key] * WAYS[name].batch_size
        print(f"| {name} | {ratio:.2f} | {figures[name]['process_gigabytes']:.2f} |")
    a_volume = figures[LOADING][key] / N_LOADED
    shares = {name: a_volume / (a_volume + figures[name][key] / WAYS[name].batch_size) for name in names}
    print("loading in a step:", ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items()))


if __name__ == "__main__":
    main()
