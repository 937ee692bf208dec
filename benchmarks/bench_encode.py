"""Encoding a cohort by `configs/encode.json`: share of the network, growth with the cohort, two processes against one.

    python benchmarks/bench_encode.py [--dataset_dir cohort] [--volumes 4,8,16] [--coarse] [--threads 1]

Each way runs in fresh processes (see `fresh_process`). From a cohort, else from the demo cohort, the first so many
scans are encoded, checked, hashed, written, counted and reported; start-up is left out (`bench_start.py`). The encoder
alone encodes a volume in memory. Two processes share the largest number of scans as torchrun starts them
(docs/multi_gpu.md): their processor's time, added up, says what sharing costs, the clock what it gains where there are
as many free cores. `--coarse`: 3 mm instead of 1.5, an eighth of the voxels, for a machine with little time.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from fresh_process import COARSE, arguments, measure, run_in_turns
from monai.bundle import ConfigWorkflow
from torch.distributed.run import main as torchrun

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.cohort import read_cohort  # noqa: E402


def encode(name: str, scans: list[str], output_dir: str, coarse: bool, calls: int) -> dict[str, float]:
    """The job and its encoder alone, in this process: seconds of each, a volume."""
    keys: dict[str, Any] = {"bundle_root": str(ROOT), "dataset_dir": scans, "output_dir": output_dir}
    keys |= {"device": "cpu"} | (COARSE if coarse else {})
    workflow = ConfigWorkflow(str(ROOT / "configs" / "encode.json"), workflow_type="infer", logging_file=False, **keys)
    workflow.initialize()
    parser = workflow.parser
    network: Any = parser.get_parsed_content("network").eval()
    inferer: Any = parser.get_parsed_content("inferer")
    start, start_cpu = time.perf_counter(), time.process_time()
    workflow.run()
    job = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    if name == "share":
        return job
    image = parser.get_parsed_content("preprocessing")({"image": scans[0]})["image"].as_tensor()[None]
    with torch.no_grad(), inferer.autocast():
        alone = measure(lambda: network.encode(image), calls)
    return job | {"network_cpu_seconds": alone["cpu_seconds"] * len(scans)}


def encode_in_two_processes(arguments: list[str], folder: str) -> dict[str, float]:
    """The job under torchrun: processor's time of both together, clock of the slower."""
    torchrun(["--standalone", "--nproc_per_node=2", __file__, *arguments, "--output_dir", folder])
    shares = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("share_*.json"))]
    return {"cpu_seconds": sum(s["cpu_seconds"] for s in shares), "seconds": max(s["seconds"] for s in shares)}


def main() -> None:
    """Measure and print the tables."""
    parser = arguments(__doc__ or "", repeats=1, calls=2)
    parser.add_argument("--dataset_dir", default="", help="cohort; without it the demo cohort")
    parser.add_argument("--volumes", default="4,8,16")
    parser.add_argument("--coarse", action="store_true")
    parser.add_argument("--output_dir", default="", help="of the two processes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    counts = sorted(int(count) for count in given.volumes.split(","))
    common = ["--dataset_dir", given.dataset_dir, "--volumes", given.volumes, "--calls", str(given.calls)]
    common += ["--threads", str(given.threads), *(["--coarse"] if given.coarse else [])]
    if "RANK" in os.environ:
        given.run = "share"
    if given.run:
        count = int(given.run) if given.run.isdigit() else counts[-1]
        scans = [record["image"] for record in read_cohort(given.dataset_dir)][:count]
        with tempfile.TemporaryDirectory() as folder:
            if given.run == "two processes":
                figures = encode_in_two_processes(common, folder)
            else:
                figures = encode(given.run, scans, given.output_dir or folder, given.coarse, given.calls)
        if given.run == "share":
            Path(given.output_dir, f"share_{os.environ['RANK']}.json").write_text(json.dumps(figures))
        print(json.dumps(figures))
        return

    figures = run_in_turns(__file__, [*map(str, counts), "two processes"], given.repeats, common)
    few, most = figures[str(counts[0])], figures[str(counts[-1])]
    print(f"torch {torch.__version__}, {given.threads} threads, processor's time, best of {given.repeats}")
    print("| volumes | time a volume | of it the network |")
    print("|---|---|---|")
    for count in counts:
        job = figures[str(count)]
        ratio = job["cpu_seconds"] / count / (few["cpu_seconds"] / counts[0])
        print(f"| {count} | {ratio:.2f} | {100 * job['network_cpu_seconds'] / job['cpu_seconds']:.0f} % |")
    two = figures["two processes"]
    ratios = {label: two[key] / most[key] for label, key in (("processor's time", "cpu_seconds"), ("clock", "seconds"))}
    print(f"two processes : one, {counts[-1]} volumes, on {len(os.sched_getaffinity(0))} cores:")
    print(", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items()))


if __name__ == "__main__":
    main()
