"""One job in several processes, started by torchrun: who does what, who says it, and how the shares become one.

`encode.json` and the overlays `multi_gpu_train.json` and `multi_gpu_evaluate.json` call these, and so do the handlers
that collect figures; in a plain start they do nothing. A process holds every n-th item, so putting the
shares together again is taking one from each in turn. Ignite holds the process group.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import ignite.distributed as idist
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scripts.run.errors import InputError, report_input_errors

__all__ = [
    "data_parallel",
    "gathered",
    "hold_others",
    "is_first",
    "joined_shares",
    "local_device",
    "mean_over_ranks",
    "n_processes",
    "release_others",
    "share_for_each",
    "share_of_rank",
    "start_processes",
    "stop_processes",
    "wait_for_all",
]

T = TypeVar("T")
LONGEST_WAIT = timedelta(days=7)  # for a rank whose scans are many or slow; torchrun itself ends all when one dies

# Freed by DDP, a gloo group waits for its threads without letting go of the interpreter's lock, which they may need to
# free a tensor (https://github.com/pytorch/pytorch/issues/56297); freed from here it lets go.
_left_groups: list[torch.distributed.ProcessGroup | None] = []


def local_device() -> torch.device:
    """This process's GPU, by torchrun's LOCAL_RANK; the CPU where there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_processes(device: torch.device | str) -> None:
    """Join the process group where torchrun has started more than one process: NCCL on GPUs, else gloo.

    From then on only the first process prints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and idist.get_world_size() == 1:
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        os.environ.pop("SLURM_JOB_ID", None)  # else Ignite takes ranks from Slurm, which knows one task a node
        idist.initialize(backend, timeout=LONGEST_WAIT)
        report_input_errors()  # again: torch has put a hook in front that swallows the text of one that exits
        if idist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends; stderr stays, for errors


def stop_processes() -> None:
    """Leave the process group, when every process has come here."""
    if idist.get_world_size() > 1:
        wait_for_all()
        _left_groups.append(torch.distributed.group.WORLD)
        idist.finalize()


def is_first() -> bool:
    """Whether this is the first process, which prints and writes what there is one of."""
    return idist.get_rank() == 0


def n_processes() -> int:
    """How many processes work on this job."""
    return idist.get_world_size()


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if idist.get_world_size() > 1:
        idist.barrier()


def hold_others() -> None:
    """Let the first process go ahead, which makes files that the others only read; `release_others` ends the wait.

    Raises:
        InputError: in the others, if the first has ended with an error.
    """
    if idist.get_rank() > 0:
        try:
            idist.barrier()
        except RuntimeError as error:  # gloo's "Connection closed by peer", in several wordings
            raise InputError("the first process has ended; its own message says why.") from error


def release_others() -> None:
    """In the first process: the others may go on after `hold_others`."""
    if idist.get_rank() == 0:
        wait_for_all()


def data_parallel(network: nn.Module, device: torch.device | str) -> nn.Module:
    """`DistributedDataParallel` around a network on its device; the network itself where there is one process.

    Args:
        network: every parameter takes part in every step, so none is searched for that does not.
        device: of this process.

    Returns:
        What the trainer calls. State dicts are taken from `network`, whose names have no prefix.
    """
    if idist.get_world_size() == 1:
        return network
    # channels_last gives the weights of 1x1x1 convolutions strides that DDP does not expect; they are few and small.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    device_ids = [torch.device(device)] if torch.device(device).type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids, find_unused_parameters=False)


def share_of_rank(items: Sequence[T]) -> list[T]:
    """Every n-th item, beginning with this process's rank: disjoint shares that together are all of them."""
    return list(items[idist.get_rank() :: idist.get_world_size()])


def share_for_each(items: Sequence[T]) -> list[T]:
    """`share_of_rank` where every process must have an item, because all of them take part in the figures.

    Raises:
        InputError: there are fewer items than processes.
    """
    if len(items) < idist.get_world_size():
        raise InputError(
            f"{idist.get_world_size()} processes cannot share {len(items)} scans; start fewer processes, or give the "
            "split more scans."
        )
    return share_of_rank(items)


def joined_shares(share: Sequence[T]) -> list[T]:
    """What `share_of_rank` has taken apart, in its order again, in every process."""
    shares = gathered(list(share))
    return [part[place] for place in range(len(shares[0])) for part in shares if place < len(part)]


def gathered(item: T) -> list[T]:
    """Every process's item, by rank, in every process; anything that can be pickled."""
    if idist.get_world_size() == 1:
        return [item]
    items: list[T | None] = [None] * idist.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items  # type: ignore[return-value]  # all are filled now


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each figure over the processes, which all give the same names in the same order."""
    if idist.get_world_size() == 1:
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=idist.device())
    torch.distributed.all_reduce(total)
    return dict(zip(values, (total / idist.get_world_size()).tolist(), strict=True))
