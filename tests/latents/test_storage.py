"""Latent files and folders: exact, whole, the same bytes for the same content, and refused where damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from scripts import latents
from scripts.latents import ENDING, latent_path, read_header, read_latent, write_latent
from scripts.run import InputError, file_sha256

HEADER = {
    "name": "sub-01_T1w", "subject": "sub-01", "session": "", "label": "0", "split": "train", "dtype": "float32",
    "source_file": "sub-01_T1w.nii.gz", "source_sha256": "ab", "weights_sha256": "cd", "preprocessing_sha256": "ef",
    "bundle_version": "0.1.0", "source_shape": [3, 4, 5], "intensity_factor": 812.25,
}  # fmt: skip
NO_GRID: dict[str, Any] = {  # what no scan has, and would else become the shape, place or unit of a volume
    "source_shape": [3, 4],
    "source_affine": [[0.0] * 4] * 4,
    "intensity_factor": float("nan"),
}
LINE = {"file": "x_latent.safetensors", "name": "x", "subject": "", "session": "", "label": "", "split": ""}
STATISTICS = '{"scale_factor": {"channel": [%s], "overall": 1}, "shift": {"channel": [0], "overall": 0}}'
FOLDERS = [  # file, content, the error
    ("manifest.jsonl", json.dumps({**LINE, "file": "../x_latent.safetensors"}), "outside the folder"),
    ("manifest.jsonl", json.dumps({**LINE, "name": "../x"}), "outside the folder"),  # exports are named by it
    ("manifest.jsonl", f'{json.dumps(LINE)}\n{{"file": "x", "name": "x"}}\n', "line 2"),
    ("other", "", "run encode.json"),
    # 0 or NaN would make every latent that is scaled by it useless without a word
    ("latent_stats.json", STATISTICS % "0", r"latent_stats\.json .*run encode\.json"),
    ("latent_stats.json", STATISTICS % "NaN", r"latent_stats\.json .*run encode\.json"),
]


def some_latent(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and logvar, (4, 2, 3, 2)."""
    mu, logvar = torch.randn(2, 4, 2, 3, 2, generator=torch.Generator().manual_seed(seed))
    return mu.to(dtype), logvar.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_written_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors bit by bit, the header with its types: a label '0' stays text, a shape stays numbers; damage is named."""
    path, (mu, logvar) = tmp_path / f"x{ENDING}", some_latent(dtype=dtype)
    write_latent(path, mu, logvar, HEADER)
    latent = read_latent(path)
    assert torch.equal(latent.mu, mu) and torch.equal(latent.logvar, logvar)
    assert latent.header == read_header(path) == HEADER
    assert torch.equal(latent.posterior.logvar, logvar.float())
    content = path.read_bytes()
    path.unlink()
    for damaged in (content[:-9], save({"mu": torch.zeros(1)})):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"x{ENDING}"):
            read_latent(path)


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


@pytest.mark.parametrize("key", [*NO_GRID, "split"])
def test_a_header_that_no_scan_has_is_refused(key: str, tmp_path: Path) -> None:
    """The key is named, also where it is missing."""
    header = {name: value for name, value in HEADER.items() if name != key}
    write_latent(tmp_path / f"x{ENDING}", *some_latent(), {**header, key: NO_GRID[key]} if key in NO_GRID else header)
    with pytest.raises(InputError, match=key):
        read_header(tmp_path / f"x{ENDING}")


def test_shards_hold_a_name_for_good() -> None:
    """By the name's sha256, so in every process; none for 0."""
    assert latent_path("out", "sub-01", 4) == Path("out/0003") / f"sub-01{ENDING}"  # as files on disks have it
    assert latent_path("out", "x") == Path("out") / f"x{ENDING}"
    with pytest.raises(InputError, match="'shards'"):
        latent_path("out", "x", -1)


def test_a_folder_is_read_by_split_and_label(tmp_path: Path) -> None:
    """In the manifest's order, which has each file's sha256; a half file of a killed process is none of them."""
    entries = []
    for seed, (name, split) in enumerate([("a", "train"), ("b", "val"), ("c", "train")]):
        path = latent_path(tmp_path, name)
        write_latent(path, *some_latent(seed), {**HEADER, "name": name, "split": split, "label": name})
        entries.append(latents.manifest_entry(tmp_path, path, read_header(path)))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / f".host-1.d{ENDING}").write_bytes(b"half")
    files = latents.latent_files(tmp_path)
    assert [path.name for path in files] == [f"{name}{ENDING}" for name in "abc"]
    assert list(latents.read_manifest(tmp_path)) == entries
    assert [entry["sha256"] for entry in entries] == [file_sha256(path) for path in files]
    (latent,) = latents.read_manifest_latents(tmp_path, split="train", label="c")
    assert latent.header["name"] == "c" and torch.equal(latent.mu, some_latent(2)[0])


@pytest.mark.parametrize(("file", "content", "message"), FOLDERS)
def test_a_damaged_folder_is_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    """With the manifest's line, which is never followed out of the folder."""
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=message):
        latents.read_statistics(tmp_path) if file == "latent_stats.json" else list(latents.read_manifest(tmp_path))
