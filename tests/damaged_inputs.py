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
import socket
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import torch
from conftest import ROOT, TINY_VAE, head
from monai.bundle import ConfigParser, ConfigWorkflow
from safetensors.torch import save

from scripts.cohort import check_cohort, read_cohort
from scripts.latents import (
    LatentScaling,
    list_latents,
    read_header,
    read_manifest_latents,
    read_statistics,
    read_tensor,
    write_latent,
)
from scripts.networks import BrainVAE, load_weights
from scripts.run import InputError
from scripts.training import RunCheckpoint
from scripts.transforms import SourceGrid

Make = Callable[[Path], Any]
MOST_BYTES = 4 * 10**9  # that a reader may take on top of what the process holds already
MOST_SECONDS = 20  # for one case, on a busy machine
SIDES = (22, 24, 22)  # voxels of 4 mm: 88 x 96 x 88 mm
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
LATENT = (4, 6, 5, 3)
ENDINGS = (".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz")
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Case:
    """One damaged input: class, what was done, key of `READERS`, what writes the files and gives what the reader is
    called with, what is expected, and what the refusal has to name ("" for the name of the path that `make` gives)."""

    group: str
    name: str
    reader: str
    make: Make
    expected: str = "refused"
    named: str = ""


class Timeout(BaseException):
    """A reader took longer than `MOST_SECONDS`; no handler of `Exception` swallows it."""


# --- what is valid, and small changes --------------------------------------------------------------------------------


@cache
def nifti(kind: type = nib.Nifti1Image, dtype: str = "int16") -> bytes:
    """A valid scan, uncompressed."""
    image = kind(head(0, SIDES).astype(dtype), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    return image.to_bytes()


@cache
def latent_bytes(ending: str) -> bytes:
    """A latent in the format of an ending."""
    stream, z = io.BytesIO(), values()
    if ending == ".safetensors":
        return save({"z": z})
    if ending == ".npy":
        np.save(stream, z.numpy())
    elif ending == ".npz":
        np.savez_compressed(stream, z=z.numpy())
    elif ending == ".pt":
        torch.save(z, stream)
    else:
        raw = nib.Nifti1Image(np.moveaxis(z.numpy(), 0, -1), np.eye(4)).to_bytes()
        return raw if ending == ".nii" else gzip.compress(raw, mtime=0)
    return stream.getvalue()


@cache
def values() -> torch.Tensor:
    """A latent."""
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(0))


@cache
def state() -> dict[str, torch.Tensor]:
    """Weights of the tiny network."""
    torch.manual_seed(0)
    return BrainVAE(**TINY_VAE).state_dict()


def torch_bytes(content: Any) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def written(name: str, content: bytes | str) -> Make:
    """A case of one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def beside(name: str, content: bytes | str, scans: tuple[str, ...] = ("a.nii", "b.nii", "sub dir/c.nii")) -> Make:
    """A table or datalist beside three scans."""
    return lambda folder: [written(file, content if file == name else nifti())(folder) for file in (*scans, name)][-1]


def bids(folder: Path, table: bytes | str = "participant_id\tgroup\nsub-01\ta\nsub-02\tb\n") -> Path:
    """A BIDS root of two subjects."""
    return beside("participants.tsv", table, tuple(f"sub-0{n}/anat/sub-0{n}_T1w.nii" for n in (1, 2)))(folder).parent


def then(make: Make, *changes: Callable[[Path], Any]) -> Make:
    """A case with changes made in its folder afterwards."""
    return lambda folder: (make(folder), *(change(folder) for change in changes))[0]


def link(name: str, to: str, give: str = "") -> Make:
    """A link."""
    return lambda folder: ((folder / name).symlink_to(to), folder / (give or name))[1]


def pipe(name: str, give: str = "") -> Make:
    """A pipe that nobody writes into."""
    return lambda folder: (os.mkfifo(folder / name), folder / (give or name))[1]


def bound_socket(folder: Path) -> Path:
    """A socket called a.nii."""
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(folder):
        end.bind("a.nii")
    return folder / "a.nii"


def flipped(raw: bytes, place: int, bit: int = 7) -> bytes:
    """One bit changed."""
    content = bytearray(raw)
    content[place] ^= 1 << bit
    return bytes(content)


def header(raw: bytes | None = None, kind: type = nib.Nifti1Header, **fields: Any) -> bytes:
    """A NIfTI file with fields of its header changed, by value."""
    raw = nifti() if raw is None else raw
    block = np.frombuffer(raw[: kind.template_dtype.itemsize], kind.template_dtype).copy()
    for name, value in fields.items():
        block[name] = value
    return block.tobytes() + raw[kind.template_dtype.itemsize :]


def bomb(name: str, first: bytes) -> Make:
    """gzip: some bytes, then 20 GB of zeros; a member of 64 MB again and again."""
    return lambda folder: written(name, gzip.compress(first) + gzip.compress(bytes(1 << 26)) * 300)(folder)


def deflated(name: str, members: dict[str, tuple[bytes, int]]) -> Make:
    """An archive whose members go on with so many zeros; what unpacks a bomb first looks at its checksum last."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, (first, n_zeros) in members.items():
                packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
                blocks = packer.compress(first) + packer.flush(zlib.Z_FULL_FLUSH)
                if n_zeros:  # blocks of a deflate stream may follow each other any number of times
                    blocks += (packer.compress(bytes(1 << 26)) + packer.flush(zlib.Z_FULL_FLUSH)) * (n_zeros >> 26)
                archive.writestr(member, blocks + b"\x03\x00")
                entry = archive.getinfo(member)
                entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, len(first) + n_zeros
                entry.CRC = zlib.crc32(first) if not n_zeros else 0
        return folder / name

    return make


def torch_bomb(folder: Path, name: str) -> Path:
    """A `torch.save` file whose one storage is 5 GB of compressed zeros."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"z": torch.zeros(8)}))) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    n_bytes = 5 * 2**30
    # BININT 8 is the storage's length in the pickle; torch asks the archive for the bytes
    longer = b"\x8a\x05" + struct.pack("<q", n_bytes // 4)[:5]
    members = {m: raw.replace(b"K\x08", longer) if m.endswith("data.pkl") else raw for m, raw in members.items()}
    return deflated(name, {m: (raw, n_bytes * m.endswith("data/0")) for m, raw in members.items()})(folder)


def npy(shape: Any = LATENT, descr: Any = "<f4") -> bytes:
    """The header alone of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def safetensors(shape: list[int], end: int, dtype: str = "F32") -> bytes:
    """A safetensors file with a header of our own and 16 bytes of data."""
    text = json.dumps({"z": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}})
    return struct.pack("<Q", len(text)) + text.encode() + bytes(16)


class Trap:
    """An object whose pickle writes a file when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("open('sentinel', 'w')",)


RECORD = {"name": "x", "subject": "s", "session": "", "label": "", "split": "train"}
ENTRY = {"file": "x_latent.safetensors", "sha256": "0", "bytes": 1, **RECORD}
STATISTICS = {"scale_factor": {"channel": [1.0] * 4, "overall": 1.0}, "shift": {"channel": [0.0] * 4, "overall": 0.0}}
HEADER: dict[str, Any] = {
    **RECORD, "source_file": "x.nii", "source_sha256": "0", "weights_sha256": "0", "preprocessing_sha256": "0",
    "dtype": "float32", "source_shape": list(SIDES), "source_affine": AFFINE.tolist(), "source_codes": [1, 1],
    "source_units": ["mm", "sec"], "model_affine": np.diag([4.0, 4, 4, 1]).tolist(), "intensity_factor": 700.0,
}  # fmt: skip


def latent_file(**changes: Any) -> Make:
    """A latent of this bundle with fields of its header changed; None leaves one out."""

    def make(folder: Path) -> Path:
        fields = {key: value for key, value in (HEADER | changes).items() if value is not None}
        write_latent(folder / "x_latent.safetensors", values(), torch.zeros(LATENT), fields)
        return folder / "x_latent.safetensors"

    return make


def latent_folder(*entries: Any, **changes: Any) -> Make:
    """A folder of one latent whose manifest has these lines: objects as JSON, texts and bytes as they are."""
    lines = [e if isinstance(e, bytes) else (e if isinstance(e, str) else json.dumps(e)).encode() for e in entries]
    manifest = written("manifest.jsonl", b"\n".join(lines) + b"\n")
    return lambda folder: (latent_file(**changes)(folder), manifest(folder).parent)[1]


def a_job(config: str, **more: Any) -> Make:
    """A job on a valid scan, with keys changed."""
    scan = written("a.nii", nifti())
    return lambda folder: (config, {"dataset_dir": str(scan(folder)), "output_dir": str(folder / "out"), **more})


# --- the table -------------------------------------------------------------------------------------------------------
# fmt: off


def scans() -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Class, reader, file, what was done and how or with what content, and what is expected."""
    raw, packed, mgh = nifti(), gzip.compress(nifti(), mtime=0), nib.MGHImage(head(0, SIDES), AFFINE).to_bytes()
    yield "cut", "scan", "a.nii", {"in the header": raw[:200], "by one byte": raw[:-1],
                                   "NIfTI-2 header": nifti(nib.Nifti2Image)[:348]}, "refused"
    yield "cut", "scan", "a.nii.gz", {"in the middle": packed[: len(packed) // 2], "in the checksum": packed[:-5],
                                      "before it was compressed": gzip.compress(raw[:20000])}, "refused"
    yield "cut", "scan", "a.mgh", {"MGH header": mgh[:28], "MGH voxels": mgh[:20000]}, "refused"
    yield "cut", "scan", "a.mgh", {"MGH footer": mgh[: 284 + 2 * 22 * 24 * 22]}, "same"
    # The highest bit of a field's last byte is a number's sign, or the highest of a text; what is not named here is
    # the same. Without its code the sform is not looked at, and the scan lies elsewhere.
    fields = {"datatype": "refused", "vox_offset": "refused", "scl_slope": "refused", "magic": "refused",
              "sform_code": "other"}
    for name, (dtype, offset, *_) in nib.Nifti1Header.template_dtype.fields.items():
        yield "bit", "scan", "a.nii", {name: flipped(raw, offset + dtype.itemsize - 1)}, fields.get(name, "same")
    yield "bit", "scan", "a.nii", {"voxel, no checksum": flipped(raw, 9999)}, "other"
    yield "bit", "scan", "a.nii.gz", {"voxel, a checksum": flipped(gzip.compress(raw, 0), 9999)}, "refused"
    formats = {"nothing": b"", "zeros": bytes(40000), "HTML": b"<html>404</html>", "PNG": b"\x89PNG\r\n\x1a\n",
               "DICOM": bytes(128) + b"DICM" + bytes(300), "a pickle": pickle.dumps(Trap()), "MGH": mgh,
               "gzip twice": gzip.compress(packed), "no magic": header(magic=b"")}
    yield "format", "scan", "a.nii", {**formats, "gzip": packed}, "refused"
    yield "format", "scan", "a.nii.gz", {**formats, "not compressed": raw, "garbage": packed + b"garbage"}, "refused"
    yield "format", "scan", "A.NII.GZ", {"capitals": packed}, "same"
    yield "format", "scan", "a.nii.gz", {"two members": gzip.compress(raw[:999]) + gzip.compress(raw[999:])}, "same"
    yield "format", "scan", "a.nii", {"magic ni1": header(magic=b"ni1"), "zeros behind": raw + bytes(999)}, "same"
    dims = {"huge": [3, *[32767] * 3], "1000 cubed": [3, *[1000] * 3], "negative": [3, -22, 24, 22], "8 axes": [8],
            "zero": [3, 0, 24, 22], "2 axes": [2, *SIDES], "time": [4, 22, 24, 11, 2], "slice": [3, 22, 528, 1],
            "one more": [3, 22, 24, 23]}
    for what, dim in dims.items():
        content = header(dim=[*dim, *[1] * (8 - len(dim))])
        yield "sides", "scan", "a.nii", {what: content}, "refused"
        yield "sides", "scan", "a.nii.gz", {f"{what}, gzip": gzip.compress(content)}, "refused"
    vast = header(nifti(nib.Nifti2Image), nib.Nifti2Header, dim=[3, *[2**62] * 3, 1, 1, 1, 1])
    yield "sides", "scan", "a.nii", {"2^62 cubed": vast, "voxels in the header": header(vox_offset=300),
                                     "voxels at NaN": header(vox_offset=np.nan)}, "refused"
    yield "sides", "scan", "a.mgh", {"MGH": mgh[:4] + struct.pack(">3i", *[2**31 - 1] * 3) + mgh[16:]}, "refused"
    extension = header(vox_offset=2**31)[:348] + struct.pack("<4bii", 1, 0, 0, 0, 2**31 - 16, 6)
    large = header(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])
    yield "bomb", "scan", "", {"behind": bomb("a.nii.gz", raw), "extension of 2 GB": bomb("a.nii.gz", extension),
                               "1000 cubed": bomb("a.nii.gz", large)}, "refused"
    x, y, z = [-4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]
    sform = lambda *rows, **more: header(  # noqa: E731
        sform_code=1, **dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=False)), **more)
    qform = partial(header, sform_code=0, qform_code=1)
    yield "affine", "scan", "a.nii", {
        "NaN": sform(np.nan), "infinite origin": sform([-4.0, 0, 0, np.inf], y, z), "equal rows": sform(x, x, z),
        "almost singular": sform(x, [-4.0, 1e-7, 0, 0], z), "400 mm": sform([400, 0, 0, 0], y, z),
        "metres": sform([-0.004, 0, 0, 0], [0, 0.004, 0, 0], [0, 0, 0.004, 0]), "quaternion": qform(quatern_b=5.0),
        "zooms NaN": qform(pixdim=np.nan), "contradiction": sform(x, y, z, pixdim=[1, 3, 3, 3, 1, 1, 1, 1]),
        "no code, zooms 0": header(sform_code=0, qform_code=0, pixdim=0)}, "refused"
    yield "affine", "scan", "a.nii", {
        "zooms NaN beside a sform": sform(x, y, z, pixdim=np.nan), "rounded sform": sform([-3.9999, 0, 0, 0], y, z),
        "negative zooms": qform(pixdim=[-1, -4, 4, 4, 1, 1, 1, 1]), "units of 255": header(xyzt_units=255)}, "same"
    yield "affine", "scan", "a.nii", {
        "turned": sform([-4 * 0.75**0.5, -2, 0, 0], [-2, 4 * 0.75**0.5, 0, 0], z), "code -1": header(sform_code=-1),
        "no code": header(sform_code=0, qform_code=0, pixdim=[1.0, 4, 4, 4, 1, 1, 1, 1])}, "other"
    big = nib.Nifti1Image(head(0, SIDES), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes()
    yield "values", "scan", "a.nii", {
        "uint16": nifti(dtype="uint16"), "float64": nifti(dtype="float64"), "big-endian": big,
        "slope NaN": header(scl_slope=np.nan), "slope 0": header(scl_slope=0), "slope 1e-45": header(scl_slope=1e-45),
        "slope 1e30": header(scl_slope=1e30, scl_inter=0)}, "same"
    yield "values", "scan", "a.nii", {
        **{f"type {code}": header(datatype=code) for code in (0, 32, 128, 1536, 9999)},
        "slope 1e38": header(scl_slope=1e38, scl_inter=0), "slope -1": header(scl_slope=-1, scl_inter=0),
        "intercept NaN": header(scl_slope=1, scl_inter=np.nan)}, "refused"
    plain = ["with space", "'quotes\"", "$HOME$(id)", "@image", "%run", "#1", "[1]", "-dash", "~nobody", "Ju\u0308rgen",
             "🧠", "\u202egpj", "n" * 251, "é" * 125, "<script>", "2024", "None", "a.nii", "sub-", " "]
    yield "name", "scan", "", {name: written(f"{name}.nii", raw) for name in plain}, "same"
    yield "name", "latent", "", {f"latent {n}": written(f"{n}.npy", latent_bytes(".npy")) for n in plain}, "same"
    odd = {"line end": "a\nb", "escape": "\x1b[31mred", "backslash": "back\\slash", "latin-1": os.fsdecode(b"a\xe9")}
    yield "name", "scan", "", {what: written(f"{name}.nii", raw) for what, name in odd.items()}, "refused"


def cohorts() -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Tables, datalists, BIDS roots, and what stands where a file is expected."""
    image = "image\na.nii\nb.nii\nsub dir/c.nii\n"
    listed = {"quote that never ends": 'image\n"a.nii\n' + "x" * 3000, "field of 200 KB": "image\n" + "x" * 200_000,
              "path of 5000": "image\n" + "x" * 5000 + ".nii\n", "NUL": "image\na.nii\0\n", "binary": nifti(),
              "~nobody": "image\n~nobody/a.nii\n", "URL": "image\nhttps://example.org/a.nii\n", "deep": DEEP,
              "an empty path": "image,x\n,1\n", "itself": "image\n./t.csv\n", "slash": "image,subject\na.nii,a/b\n",
              "line end": 'image,subject\na.nii,"x\ny"\n', "tabs": "image\tsubject\na.nii\ts\n"}
    yield "table", "cohort", "", {what: beside("t.csv", text) for what, text in listed.items()}, "refused"
    read = {"spaces": " image \n a.nii \nb.nii\n  sub dir/c.nii\n", "quotes": image.replace("a.nii", '"a.nii"'),
            "up and down": "image\nsub dir/../a.nii\n./b.nii\nsub dir//c.nii\n", "old Mac": image.replace("\n", "\r"),
            "mark": f"\ufeff{image}"}
    yield "table", "cohort", "", {what: beside("t.csv", text) for what, text in read.items()}, "same"
    rest = ', "b.nii", "sub dir/c.nii"]'
    listed = {"deep": DEEP, "deep inside": f'[{{"image": "a.nii", "x": {DEEP}', "null": '["a.nii", null]',
              "surrogate": '["\\ud800.nii"]', "surrogate id": '[{"image": "a.nii", "subject": "\\ud800"}]',
              "NUL": '["a.nii\\u0000"]', "path of 5000": json.dumps(["x" * 5000]), "comma": '["a.nii",]',
              "empty": '[{"image": ""}]', "split 5": '[{"image": "a.nii", "split": 5}]', "two": '["a.nii"]["b.nii"]'}
    for number, text in enumerate(("../../x", "..", "a/b", "a\\b", "x\ny", "x\0y", "x\x7f")):
        listed[f"outward {number}"] = json.dumps([{"image": "a.nii", "subject": text}])
        listed[f"outward {number}, session"] = json.dumps([{"image": "a.nii", "session": text}])
    yield "datalist", "cohort", "", {what: beside("t.json", text) for what, text in listed.items()}, "refused"
    read = {"mark": '\ufeff["a.nii"' + rest, "escapes": '["\\u0061.nii"' + rest,
            "long": f'[{{"image": "a.nii", "age": {"9" * 5000}}}{rest}', "twice": '[{"image": 3, "image": "a.nii"}' + rest,
            "NaN": f'[{{"image": "a.nii", "age": NaN}}{rest}',
            "one object": '{"training": {"image": "a.nii"}, "test": ["b.nii", "sub dir/c.nii"], "x": 3}',
            **{f"subject {s}": json.dumps([{"image": "a.nii", "subject": s}])[:-1] + rest for s in ("-rf", "<b>", "脳")}}
    yield "datalist", "cohort", "", {what: beside("t.json", text) for what, text in read.items()}, "same"
    start, rows = "participant_id\tgroup\n", "sub-01\ta\nsub-02\tb\n"
    tables = {"binary": nifti(), "NUL": f"{start}sub-01\t\0\n", "commas": "participant_id,group\nsub-01,a\n",
              "two columns": "participant_id\tgroup\tgroup\nsub-01\ta\tb\n", "long row": f"{start}sub-01\ta\tb\n"}
    yield "BIDS participants.tsv", "label", "", {w: partial(bids, table=t) for w, t in tables.items()}, "refused"
    read = {"no scan": f"{start}{rows}sub-99\tc\n", "mark": f"\ufeff{start}{rows}", "no sub-": f"{start}01\ta\n02\tb\n"}
    yield "BIDS", "label", "", {what: partial(bids, table=text) for what, text in read.items()}, "same"
    yield "BIDS", "label", "", {
        "anat is a file": then(bids, lambda f: (f / "sub-03").mkdir(), lambda f: (f / "sub-03/anat").touch()),
        "a file as subject": then(bids, lambda f: (f / "sub-03").touch()),
        "hidden": then(bids, lambda f: (f / "sub-01/anat/._sub-01_T1w.nii").touch())}, "same"
    yield "BIDS listed twice", "label", "", {"linked": then(bids, link("sub-03", "sub-01"))}, "refused"
    table = written("t.csv", "image\na.nii\n")
    scan = {"link to itself": link("a.nii", "a.nii"), "pipe": pipe("a.nii"), "zeros": link("a.nii", "/dev/zero"),
            "null": link("a.nii", "/dev/null"), "memory": link("a.nii", "/proc/self/mem"), "socket": bound_socket}
    yield "special", "scan", "", scan, "refused"
    yield "special a.nii", "scan", "", {f"{what}, listed": then(table, make) for what, make in scan.items()}, "refused"
    for reader, name in (("cohort", "t.csv"), ("cohort", "t.json"), ("latent", "x.npy"), ("latent", "x.pt"),
                         ("latent", "x.safetensors"), ("latent", "x.nii"), ("statistics", "latent_stats.json"),
                         ("header", "x_latent.safetensors"), ("weights", "w.pt")):
        yield "special", reader, "", {f"pipe {name}": pipe(name), f"zeros {name}": link(name, "/dev/zero")}, "refused"
    yield "special manifest.jsonl", "folder", "", {"pipe": pipe("manifest.jsonl", ".")}, "refused"
    yield "special", "scan", "", {"loop": then(written("a.nii", nifti()), link("up", "."))}, "same"


def latents() -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Single latents in every format, and the folders that encoding leaves."""
    z, numbers = values(), npy() + values().numpy().tobytes()
    for ending in ENDINGS:
        raw = latent_bytes(ending)
        contents = {"half": raw[: len(raw) // 2], "by one": raw[:-1], "HTML": b"<html>404</html>", "zeros": bytes(5000),
                    "pickle": pickle.dumps(Trap()), "nothing": b""}
        yield "latent", "latent", f"x{ending}", {f"{ending} {what}": c for what, c in contents.items()}, "refused"
    tensors = {"NaN": z * np.nan, "complex": z.to(torch.complex64), "bool": z > 0, "overflow": z.double() * 1e300,
               "two": {"a": z, "b": z}, "list": [z], "number": 3.0, "sparse": z.to_sparse(), "meta": z.to("meta"),
               "network": {"mu": Trap()}, "expanded": torch.zeros(1).expand(10**12)}
    yield "latent", "latent", "x.pt", {what: torch_bytes(content) for what, content in tensors.items()}, "refused"
    tensors = {"float64": z.double(), "dict": {0: z}, "named": {"z": z, "x": 3}, "parameter": torch.nn.Parameter(z)}
    yield "latent", "latent", "x.pt", {what: torch_bytes(content) for what, content in tensors.items()}, "same"
    heads = {"10^12": npy((10**12,)), "2^65": npy((2**62, 8)), "negative": npy((-1, 3)), "objects": npy(descr="|O"),
             "texts": npy((1,), "<U500000000"), "records": npy(descr=[("a", "<f4")]), "dates": npy(descr="<M8[s]"),
             "code": npy().replace(b"False", b"print"), "brackets": b"\x93NUMPY\x01\x00\xf0\x20" + b"(" * 8432,
             "4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)}
    for what, content in heads.items():
        yield "latent declares", "latent", "x.npy", {what: content + bytes(1440)}, "refused"
        yield "latent", "latent", "", {f"npz {what}": deflated("x.npz", {"z.npy": (content + bytes(1440), 0)})}, "refused"
    yield "latent declares", "latent", "x.safetensors", {
        "2^63 bytes": struct.pack("<Q", 2**63), "no JSON": struct.pack("<Q", 4) + b"{]}{", "type": safetensors([4], 16, "F"),
        "past the end": safetensors([10**6], 4 * 10**6), "disagreeing": safetensors([3], 8),
        "10^18": safetensors([10**18], 16), "2^126": safetensors([2**63, 2**63], 16)}, "refused"
    image = nib.Nifti1Image(np.moveaxis(z.numpy(), 0, -1).astype(np.float64), np.eye(4)).to_bytes()
    large = header(image, dim=[4, 500, 500, 500, 4, 1, 1, 1])
    yield "bomb", "latent", "", {
        "NIfTI": bomb("x.nii.gz", large), "NIfTI goes on": bomb("x.nii.gz", image), "torch": partial(torch_bomb, name="x.pt"),
        "npz": deflated("x.npz", {"z.npy": (npy((9 * 10**8,), "<f8"), 7 * 2**30)}),
        "npz text": deflated("x.npz", {"z.npy": (npy((), "<U2000000000"), 0)})}, "refused"
    yield "bomb", "latent", "", {"npz goes on": deflated("x.npz", {"../z.npy": (numbers, 2**30)})}, "same"
    fields = {"shape": [[10**5] * 3, [1600] * 3, [-1, 2, 3], [22, 24], "22", [22.5, 24, 22]],
              "affine": [[[np.nan] * 4] * 4, [[0.0] * 4] * 4, np.eye(3).tolist(), "eye"], "codes": [["a", "b"], [1], [9, 9]],
              "units": [["parsec", "sec"]]}
    changes = [{f"source_{key}": option} for key, options in fields.items() for option in options]
    changes += [{"intensity_factor": v} for v in (float("nan"), "7")] + [{"model_affine": [[0.0] * 4] * 4}]
    yield "header", "header", "", {str(change): latent_file(**change) for change in changes}, "refused"
    yield "header", "header", "", {"no grid": latent_file(**dict.fromkeys(SourceGrid.__dataclass_fields__))}, "other"
    yield "header x_latent", "folder", "", {"no record": latent_folder(ENTRY, name=None)}, "refused"
    lines = ["{", "[]", "null", {"split": "train"}, {**ENTRY, "file": 3}, {**ENTRY, "file": "x\0"}, DEEP,
             b'{"file": "\xff"}', {**ENTRY, "file": "../x"}, {**ENTRY, "file": "/etc/passwd"}, {**ENTRY, "name": "../x"},
             {key: ENTRY[key] for key in ("file", "name", "split")}, {**ENTRY, "file": "\ud800"}]
    yield "manifest.jsonl", "folder", "", {str(n): latent_folder(line) for n, line in enumerate(lines)}, "refused"
    yield "manifest.jsonl", "folder", "", {"gone": latent_file()}, "refused"
    yield "y_latent", "folder", "", {"gone": latent_folder({**ENTRY, "file": "y_latent.safetensors"})}, "refused"
    scale = lambda channel, overall=1.0: json.dumps(  # noqa: E731
        {**STATISTICS, "scale_factor": {"channel": channel, "overall": overall}})
    yield "statistics", "statistics", "latent_stats.json", {
        "empty": "", "cut": json.dumps(STATISTICS)[:40], "list": "[]", "nothing": "{}", "NaN": scale([np.nan] * 4),
        "0": scale([0.0] * 4), "texts": scale(["a"] * 4), "null": scale(None), "none": scale([]), "deep": DEEP,
        "overall": scale([1.0] * 4, "x"), "digits": scale([1.0] * 4).replace("1.0]", "9" * 5000 + "]"),
        "shift": json.dumps({**STATISTICS, "shift": {"channel": [0.0] * 5, "overall": 0.0}})}, "refused"


def networks() -> Iterator[tuple[str, str, str, dict[str, Any], str]]:
    """Weights, checkpoints, and keys of the configs."""
    first = next(iter(state()))
    for ending, raw in ((".pt", torch_bytes(state())), (".safetensors", save(state()))):
        contents = {"nothing": b"", "half": raw[: len(raw) // 2], "by one": raw[:-1], "HTML": b"<!doctype html>",
                    "pickle": pickle.dumps(Trap())}
        yield "weights", "weights", f"w{ending}", {f"{ending} {what}": c for what, c in contents.items()}, "refused"
    contents = {"{}": {}, "list": [1], "None": None, "missing": {k: v for k, v in state().items() if k != first},
                "too many": {**state(), "x": values()}, "shape": {**state(), first: values()}, "trap": Trap(),
                "numbers": dict.fromkeys(state(), 1.0), "meta": {**state(), first: state()[first].to("meta")},
                "sparse": {**state(), first: state()[first].to_sparse()}, "optimizer": {"optimizer": {"state": {}}},
                "NaN": {k: v * np.nan for k, v in state().items()}, "infinite": {k: v / 0 for k, v in state().items()},
                "complex": {k: v.to(torch.complex64) for k, v in state().items()},
                "expanded": {**state(), "x": torch.zeros(1).expand(10**12)}}
    yield "weights", "weights", "w.pt", {what: torch_bytes(content) for what, content in contents.items()}, "refused"
    contents = {"float64": {k: v.double() for k, v in state().items()}, "under model": {"model": state(), "epoch": 3}}
    yield "weights", "weights", "w.pt", {what: torch_bytes(content) for what, content in contents.items()}, "same"
    yield "bomb", "weights", "", {"torch": partial(torch_bomb, name="w.pt")}, "refused"
    good = {"epoch": 3, "epoch_length": 5, "processes": 1, "objects": {"network": state()}, "best_metric": 0.5,
            "best_metric_epoch": 2, "early_stop": None}
    contents = {**{f"no {key}": {k: v for k, v in good.items() if k != key} for key in good if key != "processes"},
                "list": [], "state dict": state(), "trap": Trap(), "epoch": {**good, "epoch": "3"},
                "objects": {**good, "objects": {"network": {}}}, "length": {**good, "epoch_length": 7},
                "best": {**good, "best_metric": "x"}}
    saved = {what: torch_bytes(content) for what, content in contents.items()}
    yield "checkpoint", "checkpoint", "epoch_0003.pt", {**saved, "cut": torch_bytes(good)[:-1], "none": b""}, "refused"
    keys: dict[str, dict[str, list[Any]]] = {
        "inference": {"spatial_size": ["abc", None, [32, 32], [32, 32, 33], [0] * 3, [32.0, 32, 32], [40000] * 3],
                      "spacing": ["abc", 0, float("nan"), 1e-6, None, True], "device": ["gpu", "cuda:99", 3, "meta"],
                      "split": ["everything", 3], "checks": ["maybe", True], "weights": [None, []], "max_scans": ["x", -1],
                      "dataset_dir": [3, [None], "["], "output_dir": [3, ["x"]], "amp": ["maybe", 2],
                      "channels_last": ["maybe"], "save_model_space": ["maybe"], "num_workers": ["x", -1, 1.5]},
        "encode": {"dtype": ["float64", 16], "shards": ["x", -1], "overwrite": ["maybe"], "val_fraction": ["x", 2],
                   "test_fraction": ["1/3"], "label": ["group"]},
        "evaluate": {"baselines": [["nope"], "dct", 3], "peers": [3, [["x"]]]},
    }
    for config, entries in keys.items():
        for key, options in entries.items():
            yield key, "job", "", {f"{value!r}": a_job(config, **{key: value}) for value in options}, "refused"
    for key, value in (("weights", "gone.pt"), ("dataset_dir", "/gone"), ("output_dir", "/dev/null/out")):
        yield value, "job", "", {key: a_job("inference", **{key: value})}, "refused"
    given = {"amp": "no", "channels_last": 0, "max_scans": 3, "checks": "skip"}
    yield "keys", "job", "", {"given otherwise": a_job("inference", **given)}, "same"


# fmt: on
# The last word of a class is what the refusal names, where that is not the path; keys of configs are their own class.
NAMED = ("participants.tsv", "twice", "a.nii", "manifest.jsonl", "x_latent", "y_latent")


@cache
def corpus() -> tuple[Case, ...]:
    """Every case, in the order of the table."""
    cases: list[Case] = []
    for group, reader, name, contents, expected in (
        row for part in (scans, cohorts, latents, networks) for row in part()
    ):
        last = group.split()[-1]
        named = last if last in NAMED or reader == "job" else ""
        for what, content in contents.items():
            make = content if callable(content) else written(name, content)
            cases.append(Case(group, what, reader, make, expected, named))
    return tuple(cases)


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


def read_records(path: Path, output: Path, label: str = "") -> Any:
    """Which scans are listed; labels where they are asked for."""
    records = safely_named(read_cohort(str(path), label=label))
    return sorted((Path(record["image"]).name, record["label"]) for record in records)


def read_grid(path: Path, output: Path) -> Any:
    """A latent's header, and the way home that it tells."""
    grid = SourceGrid.of_header(read_header(path))
    return None if grid is None else (grid.bring_home(torch.zeros(32, 32, 32), preprocessing()), grid.image())


def read_folder(path: Path, output: Path) -> Any:
    """The latents of the training split with their names."""
    folder = path if path.is_dir() else path.parent
    return [
        (latent.header["name"], latent.header["source_sha256"]) for latent in read_manifest_latents(folder, "train")
    ]


def read_scaling(path: Path, output: Path) -> Any:
    """Statistics, used in both ways."""
    statistics = read_statistics(path)
    return [LatentScaling(kind, statistics).undo(values(), LATENT[1:]) for kind in ("channel", "overall")]


def read_checkpoint(path: Path, output: Path) -> Any:
    """Go on with a training of five steps an epoch."""
    engines = [SimpleNamespace(state=SimpleNamespace(epoch_length=5, epoch=0, iteration=0)) for _ in range(2)]
    network = BrainVAE(**TINY_VAE)
    checkpoint = RunCheckpoint(str(path.parent), {"network": network}, network, str(output))
    checkpoint.trainer, checkpoint.evaluator = engines  # type: ignore[assignment]
    return checkpoint.start(resume=True)


def read_job(given: tuple[str, dict[str, Any]], output: Path) -> Any:
    """A whole job in this process: what it makes of the scan."""
    name, more = given
    torch.save(state(), output / "tiny.pt")
    tiny = {"spatial_size": [32, 32, 32], "spacing": 4.0, "weights": str(output / "tiny.pt"), "device": "cpu"}
    workflow = ConfigWorkflow(
        config_file=str(ROOT / "configs" / f"{name}.json"), workflow_type="inference", logging_file=False,
        **{"bundle_root": str(ROOT), "network_def#channels": [4, 8], **tiny, **more},
    )  # fmt: skip
    hook = sys.excepthook
    try:
        workflow.initialize()
        workflow.run()
    finally:
        sys.excepthook = hook
    return torch.from_numpy(nib.load(Path(more["output_dir"], "a_recon.nii.gz")).get_fdata(dtype=np.float32))


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "scan": read_scan, "cohort": read_records, "label": partial(read_records, label="group"), "header": read_grid,
    "latent": lambda path, output: read_tensor(list_latents(path)[0]["latent"]), "folder": read_folder,
    "statistics": read_scaling, "weights": lambda path, output: load_weights(BrainVAE(**TINY_VAE), path).state_dict(),
    "checkpoint": read_checkpoint, "job": read_job,
}  # fmt: skip
VALID: dict[str, Callable[[], Make]] = {
    "scan": lambda: written("a.nii", nifti()), "label": lambda: bids, "job": lambda: a_job("inference"),
    "cohort": lambda: beside("t.csv", "image\na.nii\nb.nii\nsub dir/c.nii\n"), "header": latent_file,
    "latent": lambda: written("x.npy", latent_bytes(".npy")), "folder": lambda: latent_folder(ENTRY),
    "weights": lambda: written("w.pt", torch_bytes(state())),
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
    after = sorted(os.fsencode(path) for path in inputs.rglob("*") if "out" not in path.parts)
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
