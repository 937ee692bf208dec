"""One job in several processes, started by torchrun: who does what, and when all are done.

The configs of encoding and training call these; in a plain start they do nothing. Ignite holds the process group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import ignite.distributed as idist
import torch

__all__ = ["share_of_rank", "start_processes", "stop_processes", "wait_for_all"]

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)  # for a rank whose scans are many or slow; torchrun itself ends all when one dies


def start_processes(device: torch.device | str) -> None:
    """Join the process group where torchrun has started more than one process: NCCL on GPUs, else gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and idist.get_world_size() == 1:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        idist.initialize(backend, timeout=LONGEST_WAIT)


def stop_processes() -> None:
    """Leave the process group."""
    if idist.get_world_size() > 1:
        idist.finalize()


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if idist.get_world_size() > 1:
        idist.barrier()


def share_of_rank(items: Sequence[T]) -> list[T]:
    """Every n-th item, beginning with this process's rank: disjoint shares that together are all of them."""
    return list(items[idist.get_rank() :: idist.get_world_size()])
