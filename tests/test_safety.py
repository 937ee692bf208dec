"""What docs/security.md promises: no file runs code, no job opens a connection, no output tells where a scan lay."""

from __future__ import annotations

import ast
import base64
import binascii
import gzip
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_JOB, head, make_weights
from PIL import Image
from torch import nn

from scripts.convert_latents import import_folder
from scripts.convert_weights import convert
from scripts.latents import read_latent, read_tensor
from scripts.metrics import LPIPS3D
from scripts.networks import load_weights
from scripts.run import InputError

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load",
    "dill.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "torch.hub.load",
    "os.system", "os.popen", "subprocess.run", "subprocess.Popen", "urllib.request.urlopen",
    "urllib.request.urlretrieve", "requests.get",
}  # fmt: skip
# What must be said to readers that could otherwise run code.
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
ALLOWED = {
    "fresh_process.py": ["subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)"],  # itself
    "encode.md": ["pickle.load(file)"],  # for who has written the pickles; the page says so
}
OPEN = ["torch.load(p)", "torch.load(p, weights_only=safe)", "np.load(p)", "eval(t)", "pickle.load(f)", "d.eval('a')"]


def python_sources() -> Iterator[tuple[str, str]]:
    """File and text of the bundle's Python: modules, examples, benchmarks, `$` of configs."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
            yield path.name, block
    for path in sorted(path for folder in ("scripts", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "configs").glob("*.json")):
        for text in re.findall(r'"\$((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8")):
            yield path.name, re.sub(r"[@%][\w:#]+", "reference", json.loads(f'"{text}"'))


def faults(source: str) -> list[str]:
    """Calls of a source that could run what stands in a file, or open a connection."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, arguments = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        key, wanted = REQUIRED.get(name, ("", None))
        given = arguments.get(key)
        is_open = key and not (isinstance(given, ast.Constant) and given.value is wanted)
        # network.eval() takes nothing; pandas' eval takes a program
        is_eval = isinstance(node.func, ast.Attribute) and node.func.attr == "eval" and bool(node.args)
        if name in FORBIDDEN or is_open or is_eval:
            found.append(ast.unparse(node))
    return found


def test_no_source_loads_what_could_run() -> None:
    """No eval of our own, and torch and NumPy read with their locks on; the search finds each kind of fault."""
    assert all(faults(line) for line in OPEN)
    assert not faults("torch.load(p, weights_only=True), np.load(p, allow_pickle=False), network.eval()")
    found: dict[str, list[str]] = {}
    for name, source in python_sources():
        found[name] = found.get(name, []) + faults(source)
    assert {name: calls for name, calls in found.items() if calls} == ALLOWED


class Poison:
    """Unpickled without a lock, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


def poisoned(path: Path, marker: Path) -> Path:
    """A file whose ending says how it is packed, and that makes `marker` where it is loaded carelessly."""
    if path.suffix == ".pt":
        torch.save({"model": {"weight": Poison(marker)}, "epoch": 1}, path)
    elif path.suffix == ".npz":
        np.savez(path, mu=np.array([Poison(marker)], dtype=object))
    else:
        path.write_bytes(pickle.dumps({"mu": Poison(marker), "logvar": 0}))
    return path


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("model.pt", lambda path: load_weights(nn.Linear(2, 2), path)),
    "foreign weights": ("foreign.pt", lambda path: convert(str(path), str(path.with_name("out.pt")))),
    "perceptual weights": ("lpips.safetensors", lambda path: LPIPS3D(weights=path)),
    "latent": ("a_latent.safetensors", read_latent),
    "latent to decode": ("a.pt", read_tensor),
    "latents to import": ("a.npz", lambda path: import_folder(str(path.parent), str(path.parent / "out"))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_malicious_pickle_is_refused(reader: str, tmp_path: Path) -> None:
    """One clear error, and what it wanted to run has not run."""
    name, read = READERS[reader]
    path, marker = poisoned(tmp_path / name, tmp_path / "marker"), tmp_path / "marker"
    with pytest.raises(InputError, match=re.escape(name)):
        read(path)
    assert not marker.exists()


# Python calls an audit hook before each of these, also in worker processes; an error could be caught and hidden. Left
# alone are sockets that are files, and the loopback port that urllib3 binds and closes to see whether IPv6 is there.
GUARD = """
import os, sys
def guard(event, arguments):
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.gethostname"):
        return
    is_file = bool(arguments) and getattr(arguments[0], "family", None) == 1  # AF_UNIX
    if is_file or event == "socket.bind" and arguments[1][0] == "::1":
        return
    os.write(2, f"a connection was tried: {event} {arguments}".encode())
    os._exit(97)
sys.addaudithook(guard)
"""


@pytest.fixture(scope="module")
def no_sockets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every Python that is started ends with 97 as soon as it connects, listens, sends or looks up a name."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "sitecustomize.py").write_text(GUARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield


def test_the_guard_ends_what_connects(no_sockets: None) -> None:
    """Also where the error would be caught."""
    code = "import socket\ntry:\n    socket.getaddrinfo('localhost', 1)\nexcept BaseException:\n    pass"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 97


NAME = "Krautwurst"


def unpacked(data: bytes) -> Iterator[bytes]:
    """The bytes of a file and of everything that is packed in them: gzip, zip, PNG texts, base64."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from unpacked(gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield member.encode()
                yield from unpacked(archive.read(member))
    if data[:4] in (b"\x89PNG", b"RIFF"):
        yield str(Image.open(io.BytesIO(data)).info).encode()
    for found in re.finditer(rb"[A-Za-z0-9+/]{24,}={0,2}", data):
        try:
            decoded = base64.b64decode(found[0], validate=True)
        except binascii.Error:
            continue
        yield decoded
        with suppress(OSError, EOFError, zlib.error):  # text that only looks like a packed file in base64
            yield from unpacked(decoded)


def leaks(folder: Path) -> list[str]:
    """Where the name stands: the file, and what is around it."""
    found = []
    for path in sorted(folder.rglob("*")):
        texts = [path.relative_to(folder).as_posix().encode(), *(unpacked(path.read_bytes()) if path.is_file() else ())]
        places = [(text, text.lower().find(NAME.lower().encode())) for text in texts]
        found += [f"{path.relative_to(folder)}: {text[max(0, at - 60) :][:120]!r}" for text, at in places if at >= 0]
    return found


def private_scan(path: Path, seed: int) -> None:
    """A scan that says a name wherever NIfTI and gzip have room for a text."""
    path.parent.mkdir(parents=True)
    image = nib.Nifti1Image(head(seed), np.diag([-4.0, 4.0, 4.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = f"{NAME} {field[:3]}".encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{NAME} extension".encode()))
    with path.open("wb") as file, gzip.GzipFile(f"{NAME}.nii", "wb", fileobj=file) as stream:
        stream.write(image.to_bytes())


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of that name: a BIDS cohort with tables and sidecars that tell it, and weights."""
    home = tmp_path_factory.mktemp("home") / f"{NAME},Otto"
    lines = ["participant_id\tsplit\tname"]
    for number, split in enumerate(("train", "train", "val"), 1):
        scan = home / NAME / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_T1w.nii.gz"
        private_scan(scan, number)
        scan.with_name(scan.name.replace(".nii.gz", ".json")).write_text(json.dumps({"PatientName": NAME}))
        lines.append(f"sub-{number:02d}\t{split}\t{NAME}")
    (home / NAME / "participants.tsv").write_text("\n".join(lines) + "\n")
    make_weights(home / "model.pt", 0)
    return home


# What each job is given beside cohort, output folder and weights.
JOBS = {
    "encode": "",
    "evaluate": "--split all",
    "inference": "--save_model_space True",
    "train": "--epochs 1 --perceptual_start 0 --num_workers 1 --cache_dir {home}/out/train/cache",
    "decode": "",
    "sample": f"--prior gaussian --n_samples 2 --compare_with {{home}}/{NAME}",
}


@pytest.fixture(scope="module")
def outputs(
    private: Path, no_sockets: None, run_bundle: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[[str], Path]:
    """Runs a job on the private cohort, once, in a private folder, without a network; gives what it left."""

    def run(job: str) -> Path:
        folder = private / "out" / job
        if not folder.exists():
            source = run("encode") if job in ("decode", "sample") else private / NAME
            given = ["--config_file", f"configs/{job}.json", "--dataset_dir", str(source), "--output_dir", str(folder)]
            more = JOBS[job].format(home=private).split()
            run_bundle(*given, "--weights", str(private / "model.pt"), *more, *TINY_JOB)
        return folder

    return run


@pytest.mark.parametrize("job", JOBS)
def test_a_job_opens_no_connection_and_tells_no_name(job: str, outputs: Callable[[str], Path]) -> None:
    """Not in a header, report, table, picture, latent, checkpoint, event file or disk cache, packed or not."""
    folder = outputs(job)
    kept = ("report.html", *(("cache/*.pt", "tensorboard/*", "checkpoints/*") if job == "train" else ()))
    assert all(list(folder.glob(pattern)) for pattern in kept)
    assert not leaks(folder)


def test_a_hidden_name_is_found(tmp_path: Path) -> None:
    """The search itself: in capitals, in a file's name, in a compressed header, and in that within a page."""
    private_scan(tmp_path / "scan" / "a.nii.gz", 0)
    packed = base64.b64encode((tmp_path / "scan" / "a.nii.gz").read_bytes()).decode()
    texts = {"a.txt": f"of {NAME.upper()}", f"{NAME}.txt": "", "a.html": f'"volume":"{packed}"'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert {Path(line.split(": b")[0]).name for line in leaks(tmp_path)} == {"a.nii.gz", *texts}
