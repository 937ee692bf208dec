"""Datasets that keep what preprocessing made, in memory or on disk, so that an epoch costs the random part alone.

The training config calls `cached_dataset`. On disk a scan's file name is the hash of its record, of the scan file's
size and time of change, and of the transforms: whatever changes, a stale volume is never served. Cache files hold
plain tensors, numbers and text and are read with `weights_only=True`, so that a foreign file in a shared cache folder
cannot run code; the price is that meta and MONAI's trace are not kept. Evaluation and inference need both, and read
their scans through MONAI's plain `Dataset`.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import monai
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset, ThreadDataLoader
from monai.data.thread_buffer import ThreadBuffer
from monai.transforms import Compose, Transform
from monai.utils import convert_to_tensor

from scripts.run import InputError, is_first, replacing

__all__ = ["AheadLoader", "DiskCacheDataset", "cached_dataset", "record_hash", "transforms_hash"]


def cached_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Compose,
    cache_dir: str = "",
    num_workers: int = 0,
) -> Dataset:
    """Dataset over `data` that runs the transforms before the first random one only once a scan.

    Args:
        data: cohort records.
        transform: preprocessing, then augmentation.
        cache_dir: folder for a cache that outlives the run, filled on first use and shared by workers and ranks;
            empty: in memory.
        num_workers: the data loader's. Its workers would each fill a cache of their own, so with them the one in memory
            is filled here, by as many threads; without them it fills while the first epoch reads, and the first step
            need not wait for all scans.

    Raises:
        InputError: `cache_dir` is no folder, or a deterministic transform cannot be hashed for it.
    """
    if cache_dir:
        return DiskCacheDataset(data, transform, cache_dir)
    return CacheDataset(data, transform, num_workers=num_workers, progress=is_first(), runtime_cache=num_workers == 0)


class DiskCacheDataset(PersistentDataset):
    """MONAI's `PersistentDataset` with names that change with scan and code, and files that are whole or absent.

    MONAI's own moves a finished file from the system's temporary folder, which on another disk is a copy that a kill
    cuts short, and hands out meta on the first visit that later visits lack. Here first and later visits are equal.

    Args:
        data: cohort records.
        transform: preprocessing, then augmentation.
        cache_dir: folder, made where it is missing.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], transform: Compose, cache_dir: str) -> None:
        if Path(cache_dir).exists() and not Path(cache_dir).is_dir():
            raise InputError(f"'cache_dir' {cache_dir} is a file; give a folder, or nothing for a cache in memory.")
        super().__init__(data, transform, cache_dir, hash_func=record_hash, hash_transform=transforms_hash)
        self.folder = Path(cache_dir)

    def _cachecheck(self, item_transformed: Mapping[str, Any]) -> Any:
        """The record after the deterministic transforms: from its file, or computed and written to it."""
        file = self.folder / f"{self.hash_func(item_transformed).decode()}{self.transform_hash[:16]}.pt"
        if file.is_file():
            try:
                return torch.load(file, weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError):
                warnings.warn(f"{file} is damaged and is made again.", stacklevel=2)
        prepared = convert_to_tensor(
            self._pre_transform(deepcopy(dict(item_transformed))), convert_numeric=False, track_meta=False
        )
        with replacing(file) as temporary:
            torch.save(prepared, temporary)
        return prepared


class AheadLoader(ThreadDataLoader):
    """MONAI's `ThreadDataLoader`, whose thread loads ahead, but with errors: MONAI's ends quietly at the first."""

    def __iter__(self) -> Any:
        """Batches; the error of one that cannot be loaded is raised when its turn comes."""
        for item in ThreadBuffer(_with_error(DataLoader.__iter__(self)), self.buffer_size, self.buffer_timeout):
            if isinstance(item, Exception):
                raise item
            yield item


def record_hash(record: Mapping[str, Any]) -> bytes:
    """Hash of a record and of the size and time of change of every file that it names (32 hex digits)."""
    state = {
        key: [stat.st_size, stat.st_mtime_ns]
        for key, value in record.items()
        if isinstance(value, (str, os.PathLike)) and (stat := _stat(value)) is not None
    }
    text = json.dumps([dict(record), state], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32].encode()


def transforms_hash(transforms: Sequence[Transform]) -> bytes:
    """Hash of transforms: their arguments, MONAI's version, and the source of those that are not MONAI's.

    Raises:
        InputError: one of them cannot be pickled (a `$lambda` in the config).
    """
    modules = {type(transform).__module__: type(transform) for transform in transforms}
    sources = [
        inspect.getsource(inspect.getmodule(kind) or kind)
        for name, kind in sorted(modules.items())
        if not name.startswith("monai.")
    ]
    try:
        arguments = pickle.dumps(list(transforms), protocol=4)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"'cache_dir' cannot be used with these transforms, because one of them cannot be hashed ({error}); "
            "leave 'cache_dir' empty, or move what is written as lambda into scripts/."
        ) from error
    digest = hashlib.sha256(arguments)
    for text in [monai.__version__, *sources]:
        digest.update(text.encode())
    return digest.hexdigest().encode()


def _with_error(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except Exception as error:
        yield error


def _stat(path: str | os.PathLike) -> os.stat_result | None:
    """What the file system knows of `path`; None where that is no file."""
    try:
        return os.stat(path) if os.path.isfile(path) else None
    except (OSError, ValueError):
        return None
