"""Latent files and folders: exact, whole, the same bytes for the same content, and refused where damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

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
from scripts.run import InputError

HEADER = {
    "name": "sub-01_T1w", "subject": "sub-01", "session": "", "label": "0", "split": "train", "dtype": "float32",
    "source_file": "sub-01_T1w.nii.gz", "source_sha256": "ab", "weights_sha256": "cd", "preprocessing_sha256": "ef",
    "bundle_version": "0.1.0", "source_shape": [3, 4, 5], "intensity_factor": 812.25,
}  # fmt: skip
MANIFEST_FAULTS = {
    "no JSON": ("nonsense\n", "line 1"),
    "outside": ('{"file": "../x_latent.safetensors"}\n', "outside the folder"),
    "absolute": ('{"file": "/x_latent.safetensors"}\n', "outside the folder"),
    "no file": ('{"name": "x"}\n', "line 1"),
}


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


@settings(max_examples=30, deadline=None)
@given(label=st.text(max_size=40), factor=st.floats(allow_nan=False, allow_infinity=False))
def test_any_header_comes_back(label: str, factor: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Quotes, unicode and any number; lone surrogates cannot be stored by any format and are left out."""
    label = label.encode("utf-8", "ignore").decode()
    path = tmp_path_factory.mktemp("header") / f"x{ENDING}"
    header = {**HEADER, "label": label, "intensity_factor": factor}
    write_latent(path, *some_latent(), header)
    assert read_header(path) == header


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """safetensors keeps its texts in a hash map, whose order changes from process to process."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from test_latents import HEADER, some_latent, write_latent\n"
        "write_latent(sys.argv[1], *some_latent(), HEADER)"
    )
    paths = [tmp_path / f"{number}{ENDING}" for number in range(3)]
    for path in paths:
        subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
    assert len({path.read_bytes() for path in paths}) == 1


def test_tensors_start_aligned(tmp_path: Path) -> None:
    """At a multiple of 8 bytes, as the format wants it for memory maps, whatever the header's length."""
    for length in range(8):
        path = tmp_path / f"{length}{ENDING}"
        write_latent(path, *some_latent(), {**HEADER, "label": "x" * length})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "text", "foreign"])
def test_a_damaged_file_is_named(fault: str, tmp_path: Path) -> None:
    """One sentence with the path."""
    path = tmp_path / f"x{ENDING}"
    write_latent(path, *some_latent(), HEADER)
    content = path.read_bytes()
    if fault == "missing":
        path.unlink()
    elif fault == "foreign":
        from safetensors.torch import save_file

        save_file({"mu": torch.zeros(1)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[:-9], "text": b"<html>" * 9}[fault])
    with pytest.raises(InputError, match=f"x{ENDING}"):
        read_latent(path)


@pytest.mark.parametrize(
    ("mu", "logvar"),
    [
        (torch.zeros(4, 2, 2, 2), torch.zeros(4, 2, 2, 1)),
        (torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2)),
        (torch.zeros(4, 2, 2, 2), torch.zeros(4, 2, 2, 2).half()),
        (torch.zeros(4, 2, 2, 2).double(), torch.zeros(4, 2, 2, 2).double()),
    ],
    ids=["shapes", "batch", "types", "double"],
)
def test_what_is_no_latent_is_not_written(mu: torch.Tensor, logvar: torch.Tensor, tmp_path: Path) -> None:
    """And no file is left."""
    with pytest.raises(ValueError, match="mu and logvar"):
        write_latent(tmp_path / f"x{ENDING}", mu, logvar, HEADER)
    assert not list(tmp_path.iterdir())


def test_shards_hold_a_name_for_good() -> None:
    """The same subfolder in every call, all of them used, and none for 0."""
    paths = [latent_path("out", f"sub-{number}", 4) for number in range(100)]
    assert paths == [latent_path("out", f"sub-{number}", 4) for number in range(100)]
    assert {path.parent.name for path in paths} == {"0000", "0001", "0002", "0003"}
    assert latent_path("out", "x").parent == Path("out")


@pytest.mark.parametrize("shards", [-1, 1.5, True, "2"])
def test_impossible_shards_are_refused(shards: object) -> None:
    """A number of subfolders is a whole number."""
    with pytest.raises(InputError, match="'shards'"):
        latent_path("out", "x", shards)  # type: ignore[arg-type]


def test_unfinished_files_are_no_latents(folder: Path) -> None:
    """What a killed process has left begins with a dot."""
    (folder / f".host-1.d{ENDING}").write_bytes(b"half")
    assert [path.name for path in latent_files(folder)] == [f"{name}{ENDING}" for name in "abc"]


def test_a_folder_is_read_by_split_and_label(folder: Path) -> None:
    """In the manifest's order."""
    assert [entry["name"] for entry in read_manifest(folder)] == ["a", "b", "c"]
    assert len(list(read_manifest_latents(folder))) == 3
    (latent,) = read_manifest_latents(folder, split="train", label="c")
    assert latent.header["name"] == "c" and torch.equal(latent.mu, some_latent(2)[0])


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_damaged_manifest_is_named(fault: str, tmp_path: Path) -> None:
    """With its line, and never followed out of the folder."""
    text, message = MANIFEST_FAULTS[fault]
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_manifest(tmp_path))


def test_an_unfinished_folder_says_so(tmp_path: Path) -> None:
    """No manifest, no statistics."""
    with pytest.raises(InputError, match="run encode.json"):
        list(read_manifest(tmp_path))
    with pytest.raises(InputError, match="run encode.json"):
        read_statistics(tmp_path)
