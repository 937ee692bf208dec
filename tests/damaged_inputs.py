"""Damaged inputs, a case a kind, each made from a valid one; `test_damaged_inputs.py` goes through them.

The one idea: a case is a function that writes files into an empty folder, the reader that they go to, and what is
expected: `refused` (one sentence that names the file), `same` (what the undamaged input gives) or `other` (the file is
valid and says something else, which nobody can tell). Nothing is drawn by chance but what comes from a seed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gzip
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
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
from conftest import ROOT, TINY_VAE, head
from monai.bundle import ConfigParser
from safetensors.torch import save

from scripts import latents
from scripts.cohort import check_cohort, read_cohort
from scripts.networks import BrainVAE, load_weights
from scripts.run import InputError

Make = Callable[[Path], Any]
Rows = Iterator[tuple[str, str, str, dict[str, Any]]]
MOST_BYTES = 4 * 10**9  # that a reader may take on top of what the process holds already
MOST_SECONDS = 20  # for one case, on a busy machine
SIDES = (22, 24, 22)  # voxels of 4 mm: 88 x 96 x 88 mm
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
LATENT = (4, 6, 5, 3)
ENDINGS = (".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz")
DEEP = "[" * 100_000
TABLE = "image\na.nii\nb.nii\nsub dir/c.nii\n"
RECORD = {"name": "x", "subject": "s", "session": "", "label": "", "split": "train"}
ENTRY = {"file": "x_latent.safetensors", "sha256": "0", "bytes": 1, **RECORD}


@dataclass(frozen=True)
class Case:
    """What was done, key of `READERS`, what writes the files and gives what the reader is called with, what is
    expected, and what the refusal has to name ("" for the name of the path that `make` gives)."""

    name: str
    reader: str
    make: Make
    expected: str = "refused"
    named: str = ""


class Timeout(BaseException):
    """A reader took longer than `MOST_SECONDS`; no handler of `Exception` swallows it."""


# --- what is valid, and small changes --------------------------------------------------------------------------------


@cache
def nifti() -> bytes:
    """A valid scan, uncompressed."""
    image = nib.Nifti1Image(head(0, SIDES), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    return image.to_bytes()


@cache
def values() -> torch.Tensor:
    """A latent."""
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(0))


@cache
def latent_bytes(ending: str) -> bytes:
    """The latent in the format of an ending."""
    z = values().numpy()
    image = nib.Nifti1Image(np.moveaxis(z, 0, -1), np.eye(4)).to_bytes()
    whole = {
        ".safetensors": save({"z": values()}), ".npz": packed({"z.npy": npy() + z.tobytes()}), ".nii": image,
        ".nii.gz": gzip.compress(image), ".pt": torch_bytes(values()), ".npy": npy() + z.tobytes(),
    }  # fmt: skip
    return whole[ending]


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
    return lambda folder: [written(file, content if file == name else nifti())(folder) for file in (*scans, name)][-1]


def link(name: str, to: str) -> Make:
    """A link."""
    return lambda folder: ((folder / name).symlink_to(to), folder / name)[1]


def pipe(name: str) -> Make:
    """A pipe that nobody writes into."""
    return lambda folder: (os.mkfifo(folder / name), folder / name)[1]


def flipped(raw: bytes, place: int, bit: int = 7) -> bytes:
    """One bit changed."""
    return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


def header(raw: bytes | None = None, **fields: Any) -> bytes:
    """A NIfTI file with fields of its header changed, by value."""
    raw, kind = nifti() if raw is None else raw, nib.Nifti1Header.template_dtype
    block = np.frombuffer(raw[: kind.itemsize], kind).copy()
    for name, value in fields.items():
        block[name] = value
    return block.tobytes() + raw[kind.itemsize :]


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


def latent_file(**changes: Any) -> Make:
    """A latent of this bundle with fields in its header."""

    def make(folder: Path) -> Path:
        path = folder / "x_latent.safetensors"
        latents.write_latent(path, values(), torch.zeros(LATENT), RECORD | changes)
        return path

    return make


def latent_folder(entry: Any) -> Make:
    """A folder of one latent whose manifest has one line: an object as JSON, texts and bytes as they are."""
    line = entry if isinstance(entry, (bytes, str)) else json.dumps(entry)
    return lambda folder: (latent_file()(folder), written("manifest.jsonl", line)(folder).parent)[1]


# --- the table: reader, file or what a refusal names, what is expected, what was done and content or builder ---------
# fmt: off


def scans() -> Rows:
    """Scans cut off, with bits flipped, of another format, absurd, compressed without end, misplaced."""
    raw, zipped, mgh = nifti(), gzip.compress(nifti(), mtime=0), nib.MGHImage(head(0, SIDES), AFFINE).to_bytes()
    # The highest bit of a field's last byte is a number's sign, or the highest of a text; what is not named here is
    # the same. Without its code the sform is not looked at, and the scan lies elsewhere.
    fields = {**dict.fromkeys(("datatype", "vox_offset", "scl_slope", "magic"), "refused"), "sform_code": "other"}
    for name, (dtype, offset, *_) in nib.Nifti1Header.template_dtype.fields.items():
        yield "scan", "a.nii", fields.get(name, "same"), {name: flipped(raw, offset + dtype.itemsize - 1)}
    sform = {"sform_code": 1, "srow_x": [-4.0, 0, 0, 0], "srow_y": [0, 4.0, 0, 0], "srow_z": [0, 0, 4.0, 0]}
    qform = {"sform_code": 0, "qform_code": 1}
    yield "scan", "a.nii", "refused", {
        "huge": header(dim=[3, *[32767] * 3, *[1] * 4]), "one more": header(dim=[3, 22, 24, 23, *[1] * 4]),
        "voxels in the header": header(vox_offset=300), "DICOM": bytes(128) + b"DICM" + bytes(300), "MGH": mgh,
        "pickle": pickle.dumps(Trap()), "quaternion": header(**qform, quatern_b=5.0),
        "zooms NaN": header(**qform, pixdim=np.nan), "intercept NaN": header(scl_slope=1, scl_inter=np.nan)}
    extension = header(vox_offset=2**31)[:348] + struct.pack("<4bii", 1, 0, 0, 0, 2**30, 6)
    yield "scan", "a.nii.gz", "refused", {
        "middle": zipped[: len(zipped) // 2], "twice": gzip.compress(zipped), "garbage": zipped + b"garbage",
        "bit": flipped(gzip.compress(raw, 0), 9999), "bomb": bomb("a.nii.gz", raw),
        "extension of 2 GB": bomb("a.nii.gz", extension)}
    yield "scan", "a.mgh", "refused", {"cubed": mgh[:4] + b"\x7f\xff\xff\xff" * 3 + mgh[16:]}
    yield "scan", "a.mgh", "same", {"no footer": mgh[: 284 + 2 * 22 * 24 * 22]}
    yield "scan", "a.nii", "same", {
        "big-endian": nib.Nifti1Image(head(0, SIDES), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes(),
        "slope NaN": header(scl_slope=np.nan), "zooms NaN beside a sform": header(**sform, pixdim=np.nan)}
    yield "scan", "A.NII.GZ", "same", {"two members": gzip.compress(raw[:999]) + gzip.compress(raw[999:])}
    turned = {"srow_x": [-4 * 0.75**0.5, -2, 0, 0], "srow_y": [-2, 4 * 0.75**0.5, 0, 0]}
    yield "scan", "a.nii", "other", {"turned": header(**{**sform, **turned}), "bit": flipped(raw, 9999)}
    names = ["with space", "$HOME$(id)", "@image", "-dash", "Ju\u0308rgen", "🧠", "\u202egpj", "n" * 251, "None"]
    yield "scan", "", "same", {f"name {name}": written(f"{name}.nii", raw) for name in names}
    yield "latent", "", "same", {f"name {name}": written(f"{name}.npy", latent_bytes(".npy")) for name in names[:3]}
    for name in ("a\nb", os.fsdecode(b"a\xe9")):
        yield "scan", ascii(name)[-4:-1], "refused", {"name": written(f"{name}.nii", raw)}


def cohorts() -> Rows:
    """Tables and datalists, and what stands where a file is expected."""
    yield "cohort", "t.csv", "refused", {
        "quote": 'image\n"a.nii\n' + "x" * 3000, "field": "image\n" + "x" * 200_000, "binary": nifti(),
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
    yield "scan", "", "refused", {"link to itself": link("a.nii", "a.nii")}
    for reader, name in (("scan", "a.nii"), ("cohort", "t.csv"), ("latent", "x.npy"), ("latent", "x.safetensors"),
                         ("statistics", "latent_stats.json"), ("header", "x_latent.safetensors"), ("weights", "w.pt")):
        yield reader, "", "refused", {f"pipe {name}": pipe(name), f"zeros {name}": link(name, "/dev/zero")}


def latent_files() -> Rows:
    """Single latents in every format, the folders that encoding leaves, and weights."""
    z, image = values(), latent_bytes(".nii")
    for ending in ENDINGS:
        yield "latent", f"x{ending}", "refused", {
            "by one": latent_bytes(ending)[:-1], "zeros": bytes(5000), "pickle": pickle.dumps(Trap())}
    with zipfile.ZipFile(io.BytesIO(torch_bytes(z))) as archive:
        compressed = packed({name: archive.read(name) for name in archive.namelist()})
    yield "latent", "x.pt", "refused", {
        "NaN": z * np.nan, "overflow": z.double() * 1e300, "two": {"a": z, "b": z}, "meta": z.to("meta"),
        "trap": {"z": Trap()}, "compressed": compressed}
    yield "latent", "x.pt", "same", {"dict": {0: z}, "parameter": torch.nn.Parameter(z)}
    heads = {"10^12": npy((10**12,)), "texts": npy((1,), "<U500000000"), "objects": npy(descr="|O"),
             "4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)}
    heads = {what: content + bytes(1440) for what, content in heads.items()}
    yield "latent", "x.npy", "refused", heads
    yield "latent", "x.npz", "refused", {what: packed({"z.npy": content}) for what, content in heads.items()}
    yield "latent", "x.safetensors", "refused", {
        "2^63 bytes": struct.pack("<Q", 2**63), "no JSON": struct.pack("<Q", 4) + b"{]}{"}
    yield "latent", "x.nii.gz", "refused", {"bomb": bomb("x.nii.gz", image)}
    yield "header", "", "refused", {
        f"{key} {option}": latent_file(**{key: option}) for key, option in (
            ("source_shape", [1600] * 3), ("source_shape", "22"), ("source_affine", [[np.nan] * 4] * 4),
            ("source_codes", ["a", "b"]), ("intensity_factor", "7"))}
    yield "folder", "y_latent", "refused", {"gone": latent_folder({**ENTRY, "file": "y_latent.safetensors"})}
    lines = ["null", DEEP, b'{"file": "\xff"}', *({**ENTRY, "file": file} for file in (3, "\ud800", "/etc/passwd"))]
    yield "folder", "manifest.jsonl", "refused", {str(n): latent_folder(line) for n, line in enumerate(lines)}
    scales = '{"scale_factor": {"channel": [%s], "overall": 1}, "shift": {"channel": [0], "overall": 0}}'
    yield "statistics", "latent_stats.json", "refused", {
        "deep": DEEP, "text": scales % '"a"', "digits": scales % ("9" * 5000)}
    yield "weights", "w.pt", "refused", {"expanded": {"x": torch.zeros(1).expand(10**12)}}


# fmt: on


@cache
def corpus() -> tuple[Case, ...]:
    """Every case, in the order of the table."""

    def make_of(reader: str, name: str, content: Any) -> Make:
        if callable(content):
            return content
        if not isinstance(content, (bytes, str)):
            content = torch_bytes(content)
        return (beside if reader == "cohort" else written)(name, content)

    return tuple(
        Case(f"{reader} {name}: {what}", reader, make_of(reader, name, content), expected, name)
        for part in (scans, cohorts, latent_files)
        for reader, name, expected, contents in part()
        for what, content in contents.items()
    )


# --- readers ---------------------------------------------------------------------------------------------------------


@cache
def preprocessing() -> Any:
    """The way into model space, as the jobs have it."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "encode.json"))
    parser["spacing"], parser["spatial_size"] = 4.0, [32, 32, 32]
    return parser.get_parsed_content("preprocessing")


def safely_named(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The records, whose names become files of the output folder."""
    for record in records:
        assert re.fullmatch(r"[\w+][\w.+-]*", record["name"]), record["name"]
        assert len(os.fsencode(record["name"])) <= 220, record["name"]
    return records


def read_scan(path: Path, output: Path) -> Any:
    """List, check and preprocess."""
    records = check_cohort(safely_named(read_cohort(str(path))), report_dir=output)
    image = preprocessing()(dict(records[0]))["image"]
    return {"voxels": image.as_tensor(), "affine": image.affine}


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "scan": read_scan,
    "cohort": lambda path, output: sorted(Path(r["image"]).name for r in safely_named(read_cohort(str(path)))),
    "header": lambda path, output: latents.read_header(path),
    "latent": lambda path, output: latents.read_tensor(latents.list_latents(path)[0]["latent"]),
    "folder": lambda path, output: list(latents.read_manifest_latents(path, "train")),
    "statistics": lambda path, output: latents.read_statistics(path),
    "weights": lambda path, output: load_weights(BrainVAE(**TINY_VAE), path),
}
VALID: dict[str, Callable[[], Make]] = {
    "scan": lambda: written("a.nii", nifti()), "cohort": lambda: beside("t.csv", TABLE),
    "latent": lambda: written("x.npy", latent_bytes(".npy")),
}  # fmt: skip


@cache
def undamaged(reader: str) -> Any:
    """What a reader gives of valid input."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "undamaged"
        output.mkdir()
        return READERS[reader](VALID[reader]()(Path(folder)), output)


# --- the judge -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Memory and time for one case; what does not keep to them raises MemoryError or Timeout."""

    def stop(*_: Any) -> None:
        raise Timeout

    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, previous = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, before[1]))
    signal.alarm(MOST_SECONDS)
    faulthandler.dump_traceback_later(3 * MOST_SECONDS, exit=True, file=sys.__stderr__)  # code that no signal wakes
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_equal(found: Any, expected: Any) -> bool:
    """Equality of tensors, dicts of them, or anything else."""
    if torch.is_tensor(expected):
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(is_equal(found[key], expected[key]) for key in expected)
    return found == expected


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Run one case in an empty folder.

    Returns:
        `refused`, `same` or `other`, or what must not be (`unclear`, `traceback`, `memory`, `hang`, `outside`); and
        the sentence.
    """
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
        outcome_, said = ("same" if expected is not None and is_equal(found, expected) else "other"), ""
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
    first, *table = message.splitlines()
    is_clear = (
        named in message
        and len(first) <= 1000 and all(len(line) <= 1500 for line in table)
        and (not table or "criterion" in table[0])
        and not re.search(r"allocat|out of memory|MemoryError|Traceback| object at 0x", message, re.I)
        and message.rstrip()[-1:] in (".", "?")
    )  # fmt: skip
    return "refused" if is_clear else "unclear", f"names {named!r}: {message}"
