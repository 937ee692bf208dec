"""Which scans stand together in a training batch, the same for every run with the same seed.

A config's training DataLoader takes one of these as its `batch_sampler`, made by the function `batch_sampler` from the
datalist. An epoch's batches are a function of (seed, epoch) alone, so that a resumed run goes on with
the batches it would have had, and each process of a multi-GPU run works out its own share without talking to others.
Somebody has to say which epoch it is: call `set_epoch` when an epoch starts, or every epoch is the first one (MONAI's
and Ignite's engines do it for `loader.sampler` only).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, Sampler

from scripts.run import InputError, as_flag

__all__ = ["BalancedBatchSampler", "ShuffledBatchSampler", "batch_sampler"]


def batch_sampler(
    records_or_labels: Sequence[Mapping[str, Any]] | Sequence[str],
    batch_size: int,
    balanced: bool | str,
    seed: int = 0,
) -> BalancedBatchSampler | ShuffledBatchSampler:
    """The batch sampler that a config asks for with its key `balanced`.

    Args:
        records_or_labels: the cohort's records, of which `label` is taken, or the labels themselves.
        batch_size: scans a batch and process.
        balanced: whether each batch holds as many scans of every group; text as from the command line is understood.
        seed: any integer from 0 on.

    Returns:
        A sampler with `set_epoch`, to be given to a DataLoader as `batch_sampler`.

    Raises:
        InputError: no scans, or balance is asked for and labels or batch size do not allow it.
    """
    rank, world_size = idist.get_rank(), idist.get_world_size()
    if as_flag(balanced, "balanced"):
        labels = [item if isinstance(item, str) else str(item.get("label", "")) for item in records_or_labels]
        return BalancedBatchSampler(labels, batch_size, seed=seed, rank=rank, world_size=world_size)
    return ShuffledBatchSampler(len(records_or_labels), batch_size, seed=seed, rank=rank, world_size=world_size)


class BalancedBatchSampler(Sampler[list[int]]):
    """Batches with as many scans of each of k groups, whatever the groups' sizes.

    One epoch visits every scan of the largest group exactly once. The other groups are gone through in random order,
    and again in a new order once exhausted, so that no scan is used twice before all others of its group were used
    once. Where the largest group is no multiple of batch_size / k, the last batch is smaller, and balanced too.

    With several processes, process r takes batches r, r + world_size, ... of the one-process epoch. All must take
    equally many, or DistributedDataParallel waits forever. So where their number is no multiple of `world_size`, up
    to world_size - 1 full batches are added, the largest group too starting a second round: then, and only then, a few
    of its scans are visited twice. With `drop_last` the surplus batches are left out instead.

    Args:
        labels: the group of each scan, in the dataset's order.
        batch_size: scans a batch, a multiple of k.
        seed: any integer from 0 on.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.
        drop_last: leave out the smaller last batch, and the batches that not every process can have; an epoch then
            visits every scan of the largest group at most once.

    Raises:
        InputError: a scan without a label, fewer than two groups, a batch size that is no multiple of k, or nothing
            left by `drop_last`.
        ValueError: seed, rank or world_size out of range.
    """

    def __init__(
        self,
        labels: Sequence[str],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
    ) -> None:
        _check_numbers(seed, rank, world_size)
        members: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            members.setdefault(label, []).append(index)
        _check_groups(members, len(labels), batch_size)
        self.groups: dict[str, list[int]] = {label: members[label] for label in sorted(members)}
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        largest, share = max(map(len, self.groups.values())), batch_size // len(self.groups)
        full, rest = divmod(largest, share)
        # Scans a group in each batch of the whole epoch, all processes together.
        self._shares = [share] * full + ([rest] if rest and not drop_last else [])
        surplus = len(self._shares) % world_size
        if surplus and drop_last:
            self._shares = self._shares[:-surplus]
        elif surplus:
            self._shares += [share] * (world_size - surplus)
        if not self._shares:
            raise InputError(
                f"drop_last leaves no batch of {batch_size} for each of {world_size} processes "
                f"({_counts(self.groups)}); use a smaller batch_size."
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on, whose batches come next; call it before the epoch is iterated."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}.")
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches an epoch for this process."""
        return len(self._shares) // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        # One stream of random numbers a group: what is in one group does not change the order of another.
        streams = [
            _rounds(indices, np.random.default_rng([self.seed, self.epoch, number]))
            for number, indices in enumerate(self.groups.values())
        ]
        for number, share in enumerate(self._shares):
            # All processes draw all batches, so that they agree on where each group stands.
            batch = [next(stream) for stream in streams for _ in range(share)]
            if number % self.world_size == self.rank:
                yield batch


class ShuffledBatchSampler(BatchSampler):
    """Plain shuffled batches with the interface of `BalancedBatchSampler`: every scan once an epoch.

    With several processes torch's DistributedSampler shares out the scans; it repeats up to world_size - 1 of them, so
    that all processes have equally many batches. The last batch may be smaller.

    Args:
        n: number of scans.
        batch_size: scans a batch and process.
        seed: any integer from 0 on.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes.

    Raises:
        InputError: no scans, or a batch size below 1.
        ValueError: seed, rank or world_size out of range.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        _check_numbers(seed, rank, world_size)
        if n < 1:
            raise InputError("The datalist has no scans to make batches of; check dataset_dir and split.")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; give 1 or more.")
        # Only the length of the data set is used, and a range has one.
        order: DistributedSampler[int] = DistributedSampler(
            cast("Dataset[int]", range(n)), num_replicas=world_size, rank=rank, shuffle=True, seed=seed
        )
        super().__init__(order, batch_size, drop_last=False)
        self._order = order

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 on, whose batches come next; call it before the epoch is iterated."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}.")
        self._order.set_epoch(epoch)


def _rounds(indices: list[int], generator: np.random.Generator) -> Iterator[int]:
    """Endless rounds through `indices`, each in a new random order."""
    while True:
        yield from generator.permutation(indices).tolist()


def _check_numbers(seed: int, rank: int, world_size: int) -> None:
    if seed < 0:
        raise InputError(f"seed is {seed}; give 0 or more.")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1, got rank {rank} of {world_size}.")


def _check_groups(members: Mapping[str, Sequence[int]], n: int, batch_size: int) -> None:
    if not n:
        raise InputError("The datalist has no scans to make batches of; check dataset_dir and split.")
    if "" in members:
        raise InputError(
            f"{len(members[''])} of {n} scans have no label (the first is number {members[''][0]} of the datalist); "
            "balanced batches need one for each. Complete the labels or set balanced to False."
        )
    k = len(members)
    if k < 2:
        raise InputError(
            f"Balanced batches need two groups or more; all {n} scans are '{next(iter(members))}'. "
            "Choose another label column or set balanced to False."
        )
    if batch_size < k or batch_size % k:
        raise InputError(
            f"batch_size is {batch_size}, but balanced batches of {k} groups ({_counts(members)}) need a multiple of "
            f"{k}; give for example {max(1, round(batch_size / k)) * k}."
        )


def _counts(members: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{label}: {len(members[label])} scans" for label in sorted(members))
