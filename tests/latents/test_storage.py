"""Latent files and folders: exact, whole, the same bytes for the same content, and refused where damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from scripts.latents import (
    ENDING,
    latent_files,
    latent_path,
    manifest_entry,
    read_header,
    read_latent,
    read_manifest,
    read_manifest_latents,
    read_statistics,
    write_latent,
)
from scripts.run import InputError, file_sha256

HEADER = {
    "name": "sub-01_T1w", "subject": "sub-01", "session": "", "label": "0", "split": "train", "dtype": "float32",
    "source_file": "sub-01_T1w.nii.gz", "source_sha256": "ab", "weights_sha256": "cd", "preprocessing_sha256": "ef",
    "bundle_version": "0.1.0", "source_shape": [3, 4, 5], "intensity_factor": 812.25,
}  # fmt: skip
NO_GRID: dict[str, Any] = {  # what no scan has, and would else become the shape, place or unit of a volume
    "source_shape": [3, 4],
    "source_affine": [[0.0] * 4] * 4,
    "source_codes": [1, 9],
    "source_units": ["mm", "ell"],
    "model_affine": [[1, 0], [0, 1]],
    "intensity_factor": float("nan"),
}
LINE = {"file": "x_latent.safetensors", "name": "x", "subject": "", "session": "", "label": "", "split": ""}
MANIFESTS = {
    "no JSON": ("nonsense\n", "line 1"),
    "outside": (json.dumps({**LINE, "file": "../x_latent.safetensors"}), "outside the folder"),
    "name with a folder": (json.dumps({**LINE, "name": "../x"}), "outside the folder"),
    "no label": (f'{json.dumps(LINE)}\n{{"file": "x", "name": "x"}}\n', "line 2"),
    "none": (None, "run encode.json"),
}
STATISTICS = '{"scale_factor": {"channel": [%s], "overall": 1}, "shift": {"channel": [0], "overall": 0}}'


def some_latent(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar, (4, 2, 3, 2)."""
    mu, logvar = torch.randn(2, 4, 2, 3, 2, generator=torch.Generator().manual_seed(seed))
    return mu.to(dtype), logvar.to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three latents in two splits, with a manifest."""
    entries = []
    for seed, (name, split) in enumerate([("a", "train"), ("b", "val"), ("c", "train")]):
        path = latent_path(tmp_path, name)
        write_latent(path, *some_latent(seed), {**HEADER, "name": name, "split": split, "label": name})
        entries.append(manifest_entry(tmp_path, path, read_header(path)))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors bit by bit, the header with its types: a label '0' stays text, a shape stays numbers."""
    mu, logvar = some_latent(dtype=dtype)
    write_latent(tmp_path / f"x{ENDING}", mu, logvar, HEADER)
    latent = read_latent(tmp_path / f"x{ENDING}")
    assert torch.equal(latent.mu, mu) and torch.equal(latent.logvar, logvar)
    assert latent.header == read_header(tmp_path / f"x{ENDING}") == HEADER
    assert torch.equal(latent.posterior.logvar, logvar.float())
    with pytest.raises(ValueError, match="mu and logvar"):
        write_latent(tmp_path / f"x{ENDING}", mu, logvar.double(), HEADER)


def test_the_same_content_gives_the_same_aligned_bytes(tmp_path: Path) -> None:
    """safetensors keeps texts in a hash map of another order each time; memory maps want multiples of 8 bytes."""
    path = tmp_path / f"x{ENDING}"
    for length in range(8):
        found = set()
        for _ in range(3):
            write_latent(path, *some_latent(), {**HEADER, "label": 'é"' * length})
            found.add(path.read_bytes())
        assert len(found) == 1 and int.from_bytes(found.pop()[:8], "little") % 8 == 0
        assert read_header(path)["label"] == 'é"' * length


@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "text", "foreign"])
def test_a_damaged_file_is_named(fault: str, tmp_path: Path) -> None:
    """One sentence with the path, and no traceback of the reader's."""
    path = tmp_path / f"x{ENDING}"
    write_latent(path, *some_latent(), HEADER)
    foreign = save({"mu": torch.zeros(1)})
    content = {"empty": b"", "cut": path.read_bytes()[:-9], "text": b"<html>" * 9, "foreign": foreign}
    path.unlink()
    if fault in content:
        path.write_bytes(content[fault])
    with pytest.raises(InputError, match=f"x{ENDING}"):
        read_latent(path)


@pytest.mark.parametrize("key", [*NO_GRID, "split"])
def test_a_header_that_no_scan_has_is_refused(key: str, tmp_path: Path) -> None:
    """The key is named, also where it is missing."""
    header = {name: value for name, value in HEADER.items() if name != key}
    write_latent(tmp_path / f"x{ENDING}", *some_latent(), {**header, key: NO_GRID[key]} if key in NO_GRID else header)
    with pytest.raises(InputError, match=key):
        read_header(tmp_path / f"x{ENDING}")


def test_shards_hold_a_name_for_good() -> None:
    """By the name's sha256, so in every process; all subfolders are used, and none for 0."""
    paths = [latent_path("out", f"sub-{number}", 4) for number in range(100)]
    assert {path.parent.name for path in paths} == {"0000", "0001", "0002", "0003"}
    assert latent_path("out", "sub-01", 4) == Path("out/0003") / f"sub-01{ENDING}"  # as files on disks have it
    assert latent_path("out", "x") == Path("out") / f"x{ENDING}"
    with pytest.raises(InputError, match="'shards'"):
        latent_path("out", "x", -1)


def test_a_folder_is_read_by_split_and_label(folder: Path) -> None:
    """In the manifest's order, which has each file's sha256; a half file of a killed process is none of them."""
    (folder / f".host-1.d{ENDING}").write_bytes(b"half")
    assert [path.name for path in latent_files(folder)] == [f"{name}{ENDING}" for name in "abc"]
    entries = list(read_manifest(folder))
    assert [entry["name"] for entry in entries] == ["a", "b", "c"]
    assert [entry["sha256"] for entry in entries] == [file_sha256(path) for path in latent_files(folder)]
    assert len(list(read_manifest_latents(folder))) == 3
    (latent,) = read_manifest_latents(folder, split="train", label="c")
    assert latent.header["name"] == "c" and torch.equal(latent.mu, some_latent(2)[0])


@pytest.mark.parametrize("fault", MANIFESTS)
def test_a_damaged_manifest_is_named(fault: str, tmp_path: Path) -> None:
    """With its line, and never followed out of the folder; without one the folder is not finished."""
    text, message = MANIFESTS[fault]
    if text is not None:
        (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_manifest(tmp_path))


@pytest.mark.parametrize("content", [None, "nonsense", STATISTICS % "0", STATISTICS % "NaN", STATISTICS % "1, 1"])
def test_damaged_statistics_are_named(content: str | None, tmp_path: Path) -> None:
    """A scale of 0 or NaN would make every latent that is scaled by it useless without a word."""
    if content is not None:
        (tmp_path / "latent_stats.json").write_text(content)
    with pytest.raises(InputError, match=r"latent_stats\.json .*run encode\.json"):
        read_statistics(tmp_path)
