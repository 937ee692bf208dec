"""Measure each way of doing something in processes of its own, in turns: what the benchmarks share.

A script names its ways, and calls itself with `--run NAME` for each. Fresh processes keep one way's memory and warm
caches from the next; turns keep a machine whose speed drifts from favouring one. Of several calls and processes the
best time counts and the worst memory. Times of a shared machine mean little: quote ratios of one run, and beside other
load those of the processor's time with one thread (threads that wait for others count as busy).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

__all__ = ["COARSE", "arguments", "best_of", "measure", "peak_gigabytes", "run_in_turns", "time_key"]

Figures = dict[str, float]
COARSE = {"spacing": 3.0, "spatial_size": [56, 68, 56]}  # keys of a config: half the resolution


def arguments(description: str, repeats: int = 2, calls: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="processes of each way")
    parser.add_argument("--calls", type=int, default=calls, help="calls in each process, of which the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--run", help=argparse.SUPPRESS)  # the child process's part
    return parser


def peak_gigabytes() -> float:
    """Peak resident memory of this process so far; on a GPU, what PyTorch had allocated there at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss counts bytes there, kB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(call: Callable[[], Any], calls: int, warm_up: Callable[[], Any] | None = None) -> Figures:
    """Call `calls` times, after a warm-up: best and first time, best processor's time, GB added to the peak."""
    if warm_up is not None:
        warm_up()
    before = peak_gigabytes()
    seconds, cpu_seconds = [], []
    for _ in range(calls):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - start_cpu)
    return {
        "first": seconds[0],
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),
        "gigabytes": peak_gigabytes() - before,
        "process_gigabytes": peak_gigabytes(),
    }


def run_in_turns(
    script: str, names: Iterable[str], repeats: int, options: Sequence[str] | Callable[[str], Sequence[str]] = ()
) -> dict[str, Figures]:
    """Run `script --run NAME` for each name, `repeats` times over, and keep the best.

    Args:
        script: the benchmark's own file; its child part prints its figures as JSON in the last line.
        names: of the ways.
        repeats: processes of each.
        options: further arguments, the same for all or a function of the name.

    Returns:
        Name to figures, from `best_of`.
    """
    runs: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, results in runs.items():
            extra = options(name) if callable(options) else options
            command = [sys.executable, script, "--run", name, *extra]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(printed.splitlines()[-1]))
            print(f"{name}: {results[-1]}", file=sys.stderr, flush=True)  # a run that breaks off has said something
    return {name: best_of(results) for name, results in runs.items()}


def time_key(threads: int) -> str:
    """Which time to compare: the processor's where one thread computes, else that of the clock."""
    return "cpu_seconds" if threads == 1 and not torch.cuda.is_available() else "seconds"


def best_of(results: Sequence[Figures]) -> Figures:
    """The smallest of each figure over processes; the largest of memory."""
    return {key: (max if key.endswith("gigabytes") else min)(result[key] for result in results) for key in results[0]}
