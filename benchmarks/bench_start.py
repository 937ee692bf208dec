"""Start-up: from the command to the first volume that reaches the network, and to the first reconstruction.

    python benchmarks/bench_start.py [--dataset_dir cohort] [--names "reconstruct,train"] [--repeats 3] [--threads 1]

Each job runs in fresh processes (see `fresh_process`), as its config says. Without a cohort it takes the demo cohort,
reconstruction one brain of it, as the README's command does; one name also makes that brain, as the first run ever
does. Printed: the ratios of processor's time and of the clock to a process that does `import torch, monai` and
nothing else. The training step itself is measured by `bench_train.py`, the network by `bench_inference.py`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import monai  # noqa: F401  (what every way pays for)
import torch
from fresh_process import arguments, run_in_turns
from ignite.engine import Events
from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BARE = "import torch, monai"
NEW_DEMO = "reconstruct a demo brain that is not made yet"
ENGINES = {"reconstruct": "evaluator", NEW_DEMO: "evaluator", "train": "train#trainer"}  # name: key of its engine


def since(started: float) -> dict[str, float]:
    """Seconds since the command, of the clock and of this process's processor."""
    return {"clock": time.time() - started, "processor": time.process_time()}


def run(name: str, dataset_dir: str, folder: str, started: float) -> dict[str, dict[str, float]]:
    """One job in this process: what was reached, and when. A training run ends where its first step begins."""
    if name == BARE:
        return {"done": since(started)}
    if name == NEW_DEMO:
        os.environ["XDG_CACHE_HOME"] = folder
    kind, config = ("train", "train.json") if name == "train" else ("infer", "inference.json")
    keys = {"bundle_root": str(ROOT), "dataset_dir": dataset_dir, "output_dir": folder, "device": "cpu"}
    workflow = ConfigWorkflow(str(ROOT / "configs" / config), workflow_type=kind, logging_file=False, **keys)
    workflow.initialize()
    engine: Any = workflow.parser.get_parsed_content(ENGINES[name])
    reached: dict[str, dict[str, float]] = {}

    @engine.on(Events.ITERATION_STARTED(once=1))
    def note() -> None:
        reached["the first volume is at the network"] = since(started)
        if kind == "train":
            raise SystemExit  # what ignite and MONAI let through

    try:
        workflow.run()
        reached["files and report are written"] = since(started)
    except SystemExit:
        if not reached:
            raise
    return reached


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", repeats=3)
    parser.add_argument("--dataset_dir", default="")
    parser.add_argument("--names", default=",".join(ENGINES))
    parser.add_argument("--started", type=float)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        with tempfile.TemporaryDirectory() as folder:
            reached = run(given.run, given.dataset_dir, folder, given.started)
        print(json.dumps({f"{point}|{key}": value for point, times in reached.items() for key, value in times.items()}))
        return

    def options(_: str) -> list[str]:
        common = ["--dataset_dir", given.dataset_dir, "--threads", str(given.threads)]
        return [*common, "--started", str(time.time())]

    names = [BARE, *given.names.split(",")]
    if not given.dataset_dir:
        from scripts.cohort.demo import demo_cohort

        demo_cohort()
    figures = run_in_turns(__file__, names, given.repeats, options)
    bare = {key: figures[BARE][f"done|{key}"] for key in ("processor", "clock")}
    print(f"torch {torch.__version__}, {given.threads} threads, best of {given.repeats}")
    print("| job | until | processor's time | clock |")
    print("|---|---|---|---|")
    for name, result in figures.items():
        for point in dict.fromkeys(key.split("|")[0] for key in result):
            ratios = [result[f"{point}|{key}"] / bare[key] for key in bare]
            print(f"| {name} | {point} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
