"""The cache: served while nothing changed, made again when scan, record, transforms or file did."""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor
from monai.transforms import Compose, EnsureTyped, Lambdad, LoadImaged, RandGaussianNoised, ScaleIntensityd

from scripts.cohort import cached_dataset, datasets, record_hash, transforms_hash
from scripts.run import InputError
from scripts.transforms import ScaleByPercentiled


def transform(percentile: float = 99.5, noise: float = 0.0) -> Compose:
    """Load, scale, drop meta, then something random."""
    return Compose(
        [
            LoadImaged(keys="image", image_only=True, ensure_channel_first=True),
            ScaleByPercentiled(keys="image", percentile=percentile),
            EnsureTyped(keys="image", track_meta=False),
            RandGaussianNoised(keys="image", prob=1.0 if noise else 0.0, std=noise),
        ]
    )


def write_scan(path: Path, seed: int = 0) -> Path:
    """A small random scan."""
    values = np.random.default_rng(seed).uniform(1, 100, (6, 7, 8)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    return path


@pytest.fixture
def records(tmp_path) -> list[dict[str, str]]:
    """Two scans with labels."""
    return [
        {"image": str(write_scan(tmp_path / f"{name}.nii", seed)), "name": name, "label": "control"}
        for seed, name in enumerate(["a", "b"])
    ]


def cache_files(folder: Path) -> list[Path]:
    """What the cache holds."""
    return sorted(folder.glob("*.pt"))


def mark(file: Path) -> None:
    """Overwrite a cached volume so that serving it is seen."""
    item = torch.load(file, weights_only=True)
    item["image"].fill_(-7.0)
    torch.save(item, file)


def image_of(dataset, index: int = 0) -> torch.Tensor:
    """The volume as a plain tensor."""
    return torch.as_tensor(dataset[index]["image"])


def test_empty_cache_dir_caches_in_memory(records):
    """The default needs no folder, and reads a scan when it is first asked for."""
    other = image_of(cached_dataset(records, transform(), progress=False), 1)
    dataset = cached_dataset(records, transform(), progress=False)
    assert isinstance(dataset, CacheDataset)
    os.replace(records[1]["image"], records[0]["image"])
    assert torch.equal(image_of(dataset), other)
    os.remove(records[0]["image"])
    assert torch.equal(image_of(dataset), other)


def test_workers_find_the_cache_in_memory_filled(records):
    """Each would fill one of its own, every epoch anew."""
    dataset = cached_dataset(records, transform(), num_workers=1, progress=False)
    for record in records:
        os.remove(record["image"])
    loader = DataLoader(dataset, batch_size=1, num_workers=1)
    assert [batch["image"].shape for batch in loader] == [(1, 1, 6, 7, 8)] * 2


def test_second_visit_reads_the_file(records, tmp_path):
    """What was computed once is read from then on, also by the next run."""
    first = cached_dataset(records, transform(), str(tmp_path / "cache"))
    fresh = image_of(first)
    assert len(cache_files(tmp_path / "cache")) == 1
    assert torch.equal(image_of(first), fresh)
    mark(cache_files(tmp_path / "cache")[0])
    assert (image_of(cached_dataset(records, transform(), str(tmp_path / "cache"))) == -7).all()


def test_disk_and_memory_hold_the_same(records, tmp_path):
    """The two caches differ in place only."""
    on_disk = cached_dataset(records, transform(), str(tmp_path / "cache"))
    in_memory = cached_dataset(records, transform(), progress=False)
    for index in range(2):
        assert torch.equal(image_of(on_disk, index), image_of(in_memory, index))
        assert on_disk[index]["label"] == in_memory[index]["label"]


@pytest.mark.parametrize("what", ["content", "time", "label", "percentile", "version", "source"])
def test_a_change_is_never_served_stale(records, tmp_path, monkeypatch, what):
    """Scan, record, arguments, MONAI and our own code: each change makes the volume anew."""
    folder = tmp_path / "cache"
    image_of(cached_dataset(records, transform(), str(folder)))
    mark(cache_files(folder)[0])
    percentile = 99.5
    if what == "content":
        write_scan(Path(records[0]["image"]), seed=5)
    elif what == "time":
        state = os.stat(records[0]["image"])
        os.utime(records[0]["image"], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif what == "label":
        records[0]["label"] = "depr"
    elif what == "percentile":
        percentile = 98.0
    elif what == "version":
        monkeypatch.setattr(datasets.monai, "__version__", "0.0.0")
    else:
        monkeypatch.setattr(datasets.inspect, "getsource", lambda module: "edited")
    assert not (image_of(cached_dataset(records, transform(percentile), str(folder))) == -7).any()
    assert len(cache_files(folder)) == 2


def test_random_part_is_not_cached(records, tmp_path):
    """Noise differs from visit to visit, and its strength does not make a new cache."""
    folder = tmp_path / "cache"
    dataset = cached_dataset(records, transform(noise=0.5), str(folder))
    assert not torch.equal(image_of(dataset), image_of(dataset))
    image_of(cached_dataset(records, transform(noise=0.1), str(folder)))
    assert len(cache_files(folder)) == 1


def test_first_and_later_visits_are_of_one_kind(records, tmp_path):
    """No meta on disk, so none on the first visit either."""
    steps = Compose([LoadImaged(keys="image", image_only=True, ensure_channel_first=True)])
    dataset = cached_dataset(records, steps, str(tmp_path / "cache"))
    for _ in range(2):
        assert type(dataset[0]["image"]) is torch.Tensor
    assert isinstance(cached_dataset(records, steps, progress=False)[0]["image"], MetaTensor)


@pytest.mark.parametrize("content", [b"", b"not a tensor", None], ids=["empty", "text", "cut"])
def test_damaged_file_is_made_again(records, tmp_path, content):
    """An empty, foreign or cut file costs one computation and a warning."""
    folder = tmp_path / "cache"
    dataset = cached_dataset(records, transform(), str(folder))
    fresh = image_of(dataset)
    file = cache_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(image_of(dataset), fresh)
    assert torch.equal(torch.load(file, weights_only=True)["image"], fresh)
    assert list(folder.iterdir()) == [file]


class Payload:
    """Runs code when unpickled without restriction."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_foreign_code_in_the_cache_is_not_run(records, tmp_path):
    """A planted pickle is refused and replaced."""
    folder = tmp_path / "cache"
    dataset = cached_dataset(records, transform(), str(folder))
    fresh = image_of(dataset)
    torch.save({"image": Payload(tmp_path / "harm")}, cache_files(folder)[0])
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(image_of(dataset), fresh)
    assert not (tmp_path / "harm").exists()


def test_lambda_on_disk_is_refused(records, tmp_path):
    """What cannot be hashed cannot be cached on disk; the message says what to do."""
    steps = Compose([LoadImaged(keys="image"), Lambdad(keys="image", func=lambda x: x * 2)])
    with pytest.raises(InputError, match="cache_dir"):
        cached_dataset(records, steps, str(tmp_path / "cache"))


def test_file_as_folder_is_refused(records):
    """A cache_dir that is a file."""
    with pytest.raises(InputError, match="is a file"):
        cached_dataset(records, transform(), records[0]["image"])


def test_hashes_do_not_depend_on_order_or_object():
    """Equal records and equal transforms have equal names."""
    assert record_hash({"a": "1", "b": "2"}) == record_hash({"b": "2", "a": "1"})
    assert record_hash({"a": "1"}) != record_hash({"a": "2"})
    assert transforms_hash(transform().transforms[:3]) == transforms_hash(transform().transforms[:3])
    assert transforms_hash([ScaleIntensityd(keys="image")]) != transforms_hash([ScaleIntensityd(keys="pred")])
