"""Encoding a cohort by `configs/encode.json` against its encoder alone, in one run.

    python benchmarks/bench_encode.py --dataset_dir cohort [--weights models/model.pt] [--threads 2]

Prints the throughput of the whole job (reading, preprocessing, encoding, hashing, writing; from the first volume to the
last, without start-up) and that of the encoder alone on a volume held in memory, and their ratio. The two take
turns, so that a machine whose speed drifts favours neither.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def parser_of(dataset_dir: str, output_dir: str, weights: str) -> ConfigParser:
    """The config of the job."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "encode.json"))
    parser["bundle_root"], parser["dataset_dir"], parser["output_dir"] = str(ROOT), dataset_dir, output_dir
    if weights:
        parser["weights"] = weights
    return parser


def whole_job(parser: ConfigParser) -> tuple[int, float]:
    """Run the evaluator once over the cohort: volumes and seconds."""
    evaluator: Any = parser.get_parsed_content("evaluator")
    n_volumes = len(parser.get_parsed_content("remaining"))
    start = time.perf_counter()
    evaluator.run()
    return n_volumes, time.perf_counter() - start


def encoder_alone(parser: ConfigParser, n_volumes: int) -> float:
    """Seconds that the network takes for one volume in memory, as many times."""
    network: Any = parser.get_parsed_content("network").eval()
    inferer: Any = parser.get_parsed_content("inferer")
    image = parser.get_parsed_content("dataset")[0]["image"].as_tensor()[None]
    image = image.to(parser.get_parsed_content("device"))
    with torch.no_grad(), inferer.autocast():
        network.encode(image)
        start = time.perf_counter()
        for _ in range(n_volumes):
            mu, _ = network.encode(image)
        mu.sum().item()  # waits for a GPU
    return time.perf_counter() - start


def main() -> None:
    """Measure both, twice, in turns, and print the better of each."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--dataset_dir", default="", help="cohort; without it the demo cohort")
    arguments.add_argument("--weights", default="")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--repeats", type=int, default=2)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    jobs, alone, n_volumes = [], [], 0
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as folder:
            parser = parser_of(given.dataset_dir, folder, given.weights)
            n_volumes, seconds = whole_job(parser)
            jobs.append(seconds)
            alone.append(encoder_alone(parser, n_volumes))
    ratio = min(alone) / min(jobs)
    print(f"{n_volumes} volumes, {given.threads} threads, best of {given.repeats}")
    print(f"whole job {n_volumes / min(jobs):.3f} volumes a second, encoder alone {n_volumes / min(alone):.3f}")
    print(f"throughput of the job over that of the encoder alone: {100 * ratio:.0f} %")


if __name__ == "__main__":
    main()
