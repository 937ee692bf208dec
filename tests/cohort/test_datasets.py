"""The cache: served while nothing changed, made again when scan, record, transforms or file did."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import Dataset
from monai.transforms import Compose, EnsureTyped, Lambdad, LoadImaged, RandGaussianNoised

from scripts.cohort import cached_dataset, datasets
from scripts.run import InputError
from scripts.transforms import ScaleByPercentiled

CHANGES = ("content", "time", "label", "percentile", "version", "source")


def transform(percentile: float = 99.5, noise: float = 0.0) -> Compose:
    """Load, scale, drop meta, then something random."""
    steps = [
        LoadImaged(keys="image", image_only=True, ensure_channel_first=True),
        ScaleByPercentiled(keys="image", percentile=percentile),
        EnsureTyped(keys="image", track_meta=False),
        RandGaussianNoised(keys="image", prob=1.0 if noise else 0.0, std=noise),
    ]
    return Compose(steps)


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, str]]:
    """Two small random scans with labels."""
    found = []
    for seed, name in enumerate("ab"):
        values = np.random.default_rng(seed).uniform(1, 100, (6, 7, 8)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii")
        found.append({"image": str(tmp_path / f"{name}.nii"), "name": name, "label": "control"})
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the cache goes."""
    return tmp_path / "cache"


def mark(folder: Path) -> None:
    """Overwrite the one cached volume so that serving it is seen."""
    (file,) = folder.glob("*.pt")
    item = torch.load(file, weights_only=True)
    item["image"].fill_(-7.0)
    torch.save(item, file)


def image_of(dataset: Dataset, index: int = 0) -> torch.Tensor:
    """The volume as a plain tensor."""
    return torch.as_tensor(dataset[index]["image"])


def test_memory_reads_a_scan_when_it_is_first_asked_for(records: list[dict[str, str]]) -> None:
    """The default needs no folder; the first epoch need not wait for all scans, and the second reads none."""
    other = image_of(cached_dataset(records, transform()), 1)
    dataset = cached_dataset(records, transform())
    os.replace(records[1]["image"], records[0]["image"])
    assert torch.equal(image_of(dataset), other)
    os.remove(records[0]["image"])
    assert torch.equal(image_of(dataset), other)


def test_second_visit_reads_the_file(records: list[dict[str, str]], folder: Path) -> None:
    """On disk lies what memory holds; computed once, it is read from then on, also by the next run."""
    first = cached_dataset(records, transform(), str(folder))
    fresh = image_of(first)
    assert torch.equal(fresh, image_of(cached_dataset(records, transform())))
    assert torch.equal(image_of(first), fresh) and first[0]["label"] == "control"
    mark(folder)
    assert (image_of(cached_dataset(records, transform(), str(folder))) == -7).all()


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_never_served_stale(
    records: list[dict[str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Scan, record, arguments, MONAI and our own code: each change makes the volume anew."""
    image_of(cached_dataset(records, transform(), str(folder)))
    mark(folder)
    scan = Path(records[0]["image"])
    state = scan.stat()
    if what == "content":
        scan.write_bytes(scan.read_bytes() + b"\0")  # another size, the same time
    if what in ("content", "time"):
        os.utime(scan, ns=(state.st_atime_ns, state.st_mtime_ns + (what == "time")))
    if what == "label":
        records[0]["label"] = "depr"
    if what == "version":
        monkeypatch.setattr(datasets.monai, "__version__", "0.0.0")
    if what == "source":
        monkeypatch.setattr(datasets.inspect, "getsource", lambda module: "edited")
    percentile = 98.0 if what == "percentile" else 99.5
    assert not (image_of(cached_dataset(records, transform(percentile), str(folder))) == -7).any()
    assert len(list(folder.glob("*.pt"))) == 2


def test_random_part_is_not_cached(records: list[dict[str, str]], folder: Path) -> None:
    """Noise differs from visit to visit, and its strength does not make a new cache."""
    dataset = cached_dataset(records, transform(noise=0.5), str(folder))
    assert not torch.equal(image_of(dataset), image_of(dataset))
    image_of(cached_dataset(records, transform(noise=0.1), str(folder)))
    assert len(list(folder.glob("*.pt"))) == 1


def test_first_and_later_visits_are_of_one_kind(records: list[dict[str, str]], folder: Path) -> None:
    """No meta on disk, so none on the first visit either."""
    steps = Compose([LoadImaged(keys="image", image_only=True, ensure_channel_first=True)])
    dataset = cached_dataset(records, steps, str(folder))
    assert [type(dataset[0]["image"]) for _ in range(2)] == [torch.Tensor] * 2


class Payload:
    """Makes a folder when unpickled without restriction."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("damage", ["empty", "cut", "code"])
def test_damaged_file_is_made_again(
    records: list[dict[str, str]], folder: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty or cut file costs one computation and a warning; a planted pickle is not run."""
    monkeypatch.chdir(tmp_path)
    dataset = cached_dataset(records, transform(), str(folder))
    fresh = image_of(dataset)
    (file,) = folder.iterdir()
    if damage == "code":
        torch.save({"image": Payload()}, file)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(image_of(dataset), fresh)
    assert torch.equal(torch.load(file, weights_only=True)["image"], fresh)
    assert list(folder.iterdir()) == [file] and not Path("harm").exists()


def test_what_cannot_be_cached_is_refused(records: list[dict[str, str]], folder: Path) -> None:
    """A lambda, which cannot be hashed, and a cache_dir that is a file; the message says what to do."""
    steps = Compose([LoadImaged(keys="image"), Lambdad(keys="image", func=lambda x: x * 2)])
    with pytest.raises(InputError, match="leave 'cache_dir' empty"):
        cached_dataset(records, steps, str(folder))
    with pytest.raises(InputError, match="is a file; give a folder"):
        cached_dataset(records, transform(), records[0]["image"])
