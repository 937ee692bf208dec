"""Damaged inputs, a case a kind, each made from a valid one; `test_damaged_inputs.py` goes through them.

The one idea: a case is a function that writes files into an empty folder, the reader that they go to, and what is
expected: `refused` (one sentence that names the file), `same` (what the undamaged input gives) or `other` (the file is
valid and says something else, which nobody can tell). Nothing is drawn by chance but what comes from a seed.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from conftest import head
from phantoms import preprocessing
from safetensors.torch import save

from scripts import latents
from scripts.cohort import check_cohort, read_cohort
from scripts.run import InputError

Make = Callable[[Path], Any]
Rows = Iterator[tuple[str, str, str, dict[str, Any]]]
MOST_BYTES = 4 * 10**9  # that a reader may take on top of what the process holds already
MOST_SECONDS = 20  # for one case, on a busy machine
SIDES = (22, 24, 22)  # voxels of 4 mm: 88 x 96 x 88 mm
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
LATENT = (4, 6, 5, 3)
DEEP = "[" * 100_000
PREPROCESSING = preprocessing({"spatial_size": [32, 32, 32]})
TABLE = "image\na.nii\nb.nii\nsub dir/c.nii\n"
RECORD = {"name": "x", "subject": "s", "session": "", "label": "", "split": "train"}


@dataclass(frozen=True)
class Case:
    """What was done, key of `READERS`, what writes the files, what is expected and what the refusal has to name."""

    name: str
    reader: str
    make: Make
    expected: str
    named: str = ""  # for the name of the path that `make` gives


class Timeout(BaseException):
    """A reader took longer than `MOST_SECONDS`; no handler of `Exception` swallows it."""


IMAGE = nib.Nifti1Image(head(0, SIDES), AFFINE)
IMAGE.header.set_xyzt_units("mm", "sec")
SCAN = IMAGE.to_bytes()
Z = torch.randn(LATENT, generator=torch.Generator().manual_seed(0))


def torch_bytes(content: Any) -> bytes:
    """What `torch.save` writes."""
    torch.save(content, stream := io.BytesIO())
    return stream.getvalue()


def written(name: str, content: bytes | str) -> Make:
    """A case of one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def beside(name: str, content: bytes | str) -> Make:
    """A table or datalist beside scans."""
    scans = ("a.nii", "b.nii", "sub dir/c.nii")
    return lambda folder: [written(file, content if file == name else SCAN)(folder) for file in (*scans, name)][-1]


def special(name: str, to: str = "") -> Make:
    """A link, or a pipe that nobody writes into."""
    return lambda folder: ((folder / name).symlink_to(to) if to else os.mkfifo(folder / name), folder / name)[1]


def flipped(raw: bytes, place: int, bit: int = 7) -> bytes:
    """One bit changed."""
    return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


def header(**fields: Any) -> bytes:
    """The scan with fields of its header changed, by value."""
    block = np.frombuffer(SCAN[:348], nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        block[name] = value
    return block.tobytes() + SCAN[348:]


def bomb(name: str, first: bytes) -> Make:
    """gzip: some bytes, then 20 GB of zeros; a member of 64 MB again and again."""
    return lambda folder: written(name, gzip.compress(first) + gzip.compress(bytes(1 << 26)) * 300)(folder)


def packed(members: dict[str, bytes]) -> bytes:
    """A compressed archive."""
    with zipfile.ZipFile(stream := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy(shape: Any = LATENT, descr: Any = "<f4") -> bytes:
    """The header alone of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


class Trap:
    """An object whose pickle writes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('sentinel', 'w')",)


def latent_folder(entry: Any) -> Make:
    """A folder of one latent whose manifest has one line: an object as JSON, texts and bytes as they are."""

    def make(folder: Path) -> Path:
        latents.write_latent(folder / "x_latent.safetensors", Z, torch.zeros(LATENT), RECORD)
        return written("manifest.jsonl", entry if isinstance(entry, (bytes, str)) else json.dumps(entry))(folder).parent

    return make


# The latent in every format.
LATENTS = {
    ".safetensors": save({"z": Z}), ".npy": npy() + Z.numpy().tobytes(), ".pt": torch_bytes(Z),
    ".nii": nib.Nifti1Image(np.moveaxis(Z.numpy(), 0, -1), np.eye(4)).to_bytes(),
}  # fmt: skip
LATENTS |= {".npz": packed({"z.npy": LATENTS[".npy"]}), ".nii.gz": gzip.compress(LATENTS[".nii"])}


# --- the table: reader, file or what a refusal names, what is expected, what was done and content or builder ---------
# fmt: off


def scans() -> Rows:
    """Scans cut off, with bits flipped, of another format, absurd, compressed without end, misplaced."""
    raw, zipped, mgh = SCAN, gzip.compress(SCAN, mtime=0), nib.MGHImage(head(0, SIDES), AFFINE).to_bytes()
    # The highest bit of a field's last byte is a number's sign, or the highest of a text; what is not named here is
    # the same. Without its code the sform is not looked at, and the scan lies elsewhere.
    fields = {**dict.fromkeys(("datatype", "vox_offset", "scl_slope", "magic"), "refused"), "sform_code": "other"}
    for name, (dtype, offset, *_) in nib.Nifti1Header.template_dtype.fields.items():
        yield "scan", "a.nii", fields.get(name, "same"), {name: flipped(raw, offset + dtype.itemsize - 1)}
    yield "scan", "a.nii", "refused", {
        "huge": header(dim=[3, *[32767] * 3, *[1] * 4]), "one more": header(dim=[3, 22, 24, 23, *[1] * 4]),
        "voxels in the header": header(vox_offset=300), "DICOM": bytes(128) + b"DICM" + bytes(300), "MGH": mgh,
        "pickle": pickle.dumps(Trap()), "zooms NaN": header(sform_code=0, qform_code=1, pixdim=np.nan)}
    yield "scan", "a.nii.gz", "refused", {
        "middle": zipped[: len(zipped) // 2], "twice": gzip.compress(zipped), "garbage": zipped + b"garbage",
        "bit": flipped(gzip.compress(raw, 0), 9999), "bomb": bomb("a.nii.gz", raw)}
    yield "scan", "a.nii", "same", {
        "big-endian": nib.Nifti1Image(head(0, SIDES), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes(),
        "slope NaN": header(scl_slope=np.nan)}
    yield "scan", "A.NII.GZ", "same", {"two members": gzip.compress(raw[:999]) + gzip.compress(raw[999:])}
    yield "scan", "a.nii", "other", {"bit": flipped(raw, 9999)}
    names = ["with space", "$HOME$(id)", "@image", "-dash", "Ju\u0308rgen", "🧠", "\u202egpj", "n" * 251, "None"]
    yield "scan", "", "same", {f"name {name}": written(f"{name}.nii", raw) for name in names}
    for name in ("a\nb", os.fsdecode(b"a\xe9")):
        yield "scan", ascii(name)[-4:-1], "refused", {"name": written(f"{name}.nii", raw)}


def cohorts() -> Rows:
    """Tables and datalists, and what stands where a file is expected."""
    yield "cohort", "t.csv", "refused", {
        "quote": 'image\n"a.nii\n' + "x" * 3000, "field": "image\n" + "x" * 200_000, "binary": SCAN,
        "path": "image\n" + "x" * 5000 + ".nii\n", "line": 'image,subject\na.nii,"x\ny"\n'}
    yield "cohort", "t.csv", "same", {
        "up and down": "image\nsub dir/../a.nii\n./b.nii\nsub dir//c.nii\n", "old Mac": TABLE.replace("\n", "\r")}
    yield "cohort", "t.json", "refused", {
        "deep": DEEP, "null": '["a.nii", null]', "surrogate": '["\\ud800.nii"]', "NUL": '["a.nii\\u0000"]',
        **{ascii(text): json.dumps([{"image": "a.nii", "subject": text}]) for text in ("a\\b", "x\0y", "\ud800")}}
    rest = ', "b.nii", "sub dir/c.nii"]'
    yield "cohort", "t.json", "same", {
        "mark": '\ufeff["a.nii"' + rest, "long": f'[{{"image": "a.nii", "age": {"9" * 5000}}}{rest}',
        **{text: f'[{{"image": "a.nii", "subject": "{text}"}}{rest}' for text in ("-rf", "<b>", "脳")}}
    yield "scan", "", "refused", {"link to itself": special("a.nii", "a.nii")}
    for reader, name in (("scan", "a.nii"), ("cohort", "t.csv"), ("latent", "x.npy"), ("latent", "x.safetensors"),
                         ("statistics", "latent_stats.json"), ("header", "x_latent.safetensors")):
        yield reader, "", "refused", {f"pipe {name}": special(name), f"zeros {name}": special(name, "/dev/zero")}


def latent_files() -> Rows:
    """Single latents in every format, and the folders that encoding leaves."""
    for ending, raw in LATENTS.items():
        yield "latent", f"x{ending}", "refused", {
            "by one": raw[:-1], "zeros": bytes(5000), "pickle": pickle.dumps(Trap())}
    with zipfile.ZipFile(io.BytesIO(LATENTS[".pt"])) as archive:
        compressed = packed({name: archive.read(name) for name in archive.namelist()})
    yield "latent", "x.pt", "refused", {
        "overflow": torch_bytes(Z.double() * 1e300), "two": torch_bytes({"a": Z, "b": Z}), "compressed": compressed,
        "meta": torch_bytes(Z.to("meta")), "trap": torch_bytes({"z": Trap()})}
    yield "latent", "x.pt", "same", {"dict": torch_bytes({0: Z}), "parameter": torch_bytes(torch.nn.Parameter(Z))}
    heads = {"10^12": npy((10**12,)), "texts": npy((1,), "<U500000000"), "objects": npy(descr="|O")}
    heads = {what: content + bytes(1440) for what, content in heads.items()}
    yield "latent", "x.npy", "refused", heads
    yield "latent", "x.npz", "refused", {what: packed({"z.npy": content}) for what, content in heads.items()}
    yield "latent", "x.safetensors", "refused", {"2^63 bytes": struct.pack("<Q", 2**63)}
    yield "latent", "x.nii.gz", "refused", {"bomb": bomb("x.nii.gz", LATENTS[".nii"])}
    lines = ["null", DEEP, b'{"file": "\xff"}', *({**RECORD, "file": file} for file in (3, "\ud800"))]
    yield "folder", "manifest.jsonl", "refused", {str(n): latent_folder(line) for n, line in enumerate(lines)}
    yield "statistics", "latent_stats.json", "refused", {"deep": DEEP}


# fmt: on


CORPUS = [
    Case(f"{reader} {name}: {what}", reader, make, expected, name)
    for reader, name, expected, contents in (*scans(), *cohorts(), *latent_files())
    for what, content in contents.items()
    for make in [content if callable(content) else (beside if reader == "cohort" else written)(name, content)]
]


def safely_named(path: Path) -> list[dict[str, str]]:
    """The records, whose names become files of the output folder."""
    records = read_cohort(str(path))
    for record in records:
        assert re.fullmatch(r"[\w+][\w.+-]*", record["name"]) and len(record["name"].encode()) <= 220, record
    return records


def read_scan(path: Path, output: Path) -> Any:
    """List, check and preprocess."""
    image = PREPROCESSING(dict(check_cohort(safely_named(path), report_dir=output)[0]))["image"]
    return torch.cat([image.as_tensor().double().flatten(), image.affine.double().flatten()])


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "scan": read_scan,
    "cohort": lambda path, output: sorted(Path(r["image"]).name for r in safely_named(path)),
    "header": lambda path, output: latents.read_header(path),
    "latent": lambda path, output: latents.read_tensor(latents.list_latents(path)[0]["latent"]),
    "folder": lambda path, output: list(latents.read_manifest_latents(path, "train")),
    "statistics": lambda path, output: latents.read_statistics(path),
}
VALID = {
    "scan": written("a.nii", SCAN), "cohort": beside("t.csv", TABLE), "latent": written("x.npy", LATENTS[".npy"])
}  # fmt: skip


@cache
def undamaged(reader: str) -> Any:
    """What a reader gives of valid input."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "undamaged"
        output.mkdir()
        return READERS[reader](VALID[reader](Path(folder)), output)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Memory and time for one case; what does not keep to them raises MemoryError or Timeout."""

    def stop(*_: Any) -> None:
        raise Timeout

    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, previous = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, before[1]))
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Run one case in an empty folder; `refused`, `same` or `other`, or what must not be (`unclear`, `traceback`,
    `memory`, `hang`, `outside`), and the sentence."""
    inputs, output, here = folder / "in", folder / "out", folder / "here"
    for place in (inputs, output, here):
        place.mkdir()
    given = case.make(inputs)
    before = sorted(os.fsencode(path) for path in inputs.rglob("*"))
    expected = undamaged(case.reader) if case.reader in VALID and case.expected != "refused" else None
    silent = io.StringIO()
    try:
        with contextlib.chdir(here), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), limits():
            found = READERS[case.reader](given, output)
    except Timeout:
        return "hang", f"more than {MOST_SECONDS} s"
    except Exception as error:
        outcome_, said = judged(error, case.named or (given.name if isinstance(given, Path) else ""))
    else:
        if torch.is_tensor(expected):
            is_same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        else:
            is_same = expected is not None and found == expected
        outcome_, said = "same" if is_same else "other", ""
    after = sorted(os.fsencode(path) for path in inputs.rglob("*"))
    return ("outside", f"wrote a file; {said}") if any(here.iterdir()) or before != after else (outcome_, said)


def judged(error: BaseException, named: str) -> tuple[str, str]:
    """The outcome of an exception, by the first `InputError` in its chain, as the jobs show it."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    text = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    if any(isinstance(e, MemoryError) or re.search(r"can't allocate|Unable to allocate", str(e)) for e in chain):
        return "memory", text
    message = next((str(e) for e in chain if isinstance(e, InputError)), "")
    if not message:
        return "traceback", text
    is_clear = named in message and message.rstrip()[-1] in ".?" and max(map(len, message.splitlines())) <= 1500
    is_clear &= not re.search(r"allocat|out of memory|MemoryError|Traceback| object at 0x", message, re.I)
    return "refused" if is_clear else "unclear", f"names {named!r}: {message}"
