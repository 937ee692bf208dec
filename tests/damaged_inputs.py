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

from scripts import latents
from scripts.cohort import check_cohort, read_cohort
from scripts.networks import BrainVAE, load_weights
from scripts.run import InputError
from scripts.training import RunCheckpoint
from scripts.transforms import SourceGrid

Make = Callable[[Path], Any]
Rows = Iterator[tuple[str, str, str, dict[str, Any]]]
MOST_BYTES = 4 * 10**9  # that a reader may take on top of what the process holds already
MOST_SECONDS = 20  # for one case, on a busy machine
SIDES = (22, 24, 22)  # voxels of 4 mm: 88 x 96 x 88 mm
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
LATENT = (4, 6, 5, 3)
ENDINGS = (".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz")
DEEP = "[" * 100_000


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
def nifti(kind: type = nib.Nifti1Image, dtype: str = "int16") -> bytes:
    """A valid scan, uncompressed."""
    image = kind(head(0, SIDES).astype(dtype), AFFINE)
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


@cache
def state() -> dict[str, torch.Tensor]:
    """Weights of the tiny network."""
    torch.manual_seed(0)
    return BrainVAE(**TINY_VAE).state_dict()


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


def beside(name: str, content: bytes | str, scans: tuple[str, ...] = ("a.nii", "b.nii", "sub dir/c.nii")) -> Make:
    """A table or datalist beside scans."""
    return lambda folder: [written(file, content if file == name else nifti())(folder) for file in (*scans, name)][-1]


def bids(folder: Path, table: bytes | str = "participant_id\tgroup\nsub-01\ta\nsub-02\tb\n") -> Path:
    """A BIDS root of two subjects."""
    return beside("participants.tsv", table, tuple(f"sub-0{n}/anat/sub-0{n}_T1w.nii" for n in (1, 2)))(folder).parent


def then(make: Make, *changes: Callable[[Path], Any]) -> Make:
    """A case with changes made in its folder afterwards."""
    return lambda folder: (make(folder), *(change(folder) for change in changes))[0]


def link(name: str, to: str) -> Make:
    """A link."""
    return lambda folder: ((folder / name).symlink_to(to), folder / name)[1]


def pipe(name: str, give: str = "") -> Make:
    """A pipe that nobody writes into."""
    return lambda folder: (os.mkfifo(folder / name), folder / (give or name))[1]


def flipped(raw: bytes, place: int, bit: int = 7) -> bytes:
    """One bit changed."""
    return raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]


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


def safetensors(shape: list[int], end: int) -> bytes:
    """A safetensors file with a header of our own and 16 bytes of data."""
    text = json.dumps({"z": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})
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
        latents.write_latent(folder / "x_latent.safetensors", values(), torch.zeros(LATENT), fields)
        return folder / "x_latent.safetensors"

    return make


def latent_folder(entry: Any, **changes: Any) -> Make:
    """A folder of one latent whose manifest has one line: an object as JSON, texts and bytes as they are."""
    line = entry if isinstance(entry, (bytes, str)) else json.dumps(entry)
    return lambda folder: (latent_file(**changes)(folder), written("manifest.jsonl", line)(folder).parent)[1]


def a_job(config: str, **more: Any) -> Make:
    """A job on a valid scan, with keys changed."""
    scan = written("a.nii", nifti())
    return lambda folder: (config, {"dataset_dir": str(scan(folder)), "output_dir": str(folder / "out"), **more})


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
    dims = {"huge": [3, *[32767] * 3], "1000 cubed": [3, *[1000] * 3], "8 axes": [8], "one more": [3, 22, 24, 23]}
    x, y, z = [-4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]
    sform, qform = partial(header, sform_code=1), partial(header, sform_code=0, qform_code=1)
    yield "scan", "a.nii", "refused", {
        **{what: header(dim=[*dim, *[1] * (8 - len(dim))]) for what, dim in dims.items()},
        "NIfTI-2 header": nifti(nib.Nifti2Image)[:348], "voxels in the header": header(vox_offset=300),
        "voxels at NaN": header(vox_offset=np.nan), "DICOM": bytes(128) + b"DICM" + bytes(300), "MGH": mgh,
        "pickle": pickle.dumps(Trap()), "no magic": header(magic=b""), "gzip": zipped, "infinite": sform(srow_x=np.inf),
        "almost singular": sform(srow_x=x, srow_y=[-4.0, 1e-7, 0, 0], srow_z=z), "quaternion": qform(quatern_b=5.0),
        "contradiction": sform(srow_x=x, srow_y=y, srow_z=z, pixdim=[1, 3, 3, 3, 1, 1, 1, 1]),
        "zooms NaN": qform(pixdim=np.nan), "intercept NaN": header(scl_slope=1, scl_inter=np.nan),
        "slope 1e38": header(scl_slope=1e38, scl_inter=0), "code 9999": header(datatype=9999)}
    extension = header(vox_offset=2**31)[:348] + struct.pack("<4bii", 1, 0, 0, 0, 2**30, 6)
    yield "scan", "a.nii.gz", "refused", {
        "middle": zipped[: len(zipped) // 2], "cut before": gzip.compress(raw[:20000]), "twice": gzip.compress(zipped),
        "garbage": zipped + b"garbage", "bit": flipped(gzip.compress(raw, 0), 9999), "bomb": bomb("a.nii.gz", raw),
        "extension of 2 GB": bomb("a.nii.gz", extension),
        "1000 cubed bomb": bomb("a.nii.gz", header(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1]))}
    yield "scan", "a.mgh", "refused", {"header": mgh[:28], "cubed": mgh[:4] + b"\x7f\xff\xff\xff" * 3 + mgh[16:]}
    yield "scan", "a.mgh", "same", {"no footer": mgh[: 284 + 2 * 22 * 24 * 22]}
    yield "scan", "a.nii", "same", {
        "magic ni1": header(magic=b"ni1"), "zeros behind": raw + bytes(999), "float64": nifti(dtype="float64"),
        "big-endian": nib.Nifti1Image(head(0, SIDES), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes(),
        "slope NaN": header(scl_slope=np.nan), "slope 0": header(scl_slope=0), "slope tiny": header(scl_slope=1e-45),
        "zooms NaN beside a sform": sform(srow_x=x, srow_y=y, srow_z=z, pixdim=np.nan),
        "rounded sform": sform(srow_x=[-3.9999, 0, 0, 0], srow_y=y, srow_z=z)}
    yield "scan", "A.NII.GZ", "same", {"two members": gzip.compress(raw[:999]) + gzip.compress(raw[999:])}
    turned = sform(srow_x=[-4 * 0.75**0.5, -2, 0, 0], srow_y=[-2, 4 * 0.75**0.5, 0, 0], srow_z=z)
    yield "scan", "a.nii", "other", {"turned": turned, "code -1": header(sform_code=-1), "bit": flipped(raw, 9999)}
    names = ["with space", "'q\"", "$HOME$(id)", "@image", "%run", "#1", "[1]", "-dash", "~nobody", "Ju\u0308rgen",
             "🧠", "\u202egpj", "n" * 251, "é" * 125, "<script>", "2024", "None", "a.nii", "sub-", " "]
    yield "scan", "", "same", {f"name {name}": written(f"{name}.nii", raw) for name in names}
    yield "latent", "", "same", {f"name {name}": written(f"{name}.npy", latent_bytes(".npy")) for name in names}
    for name in ("a\nb", "\x1bred", "back\\slash", os.fsdecode(b"a\xe9")):
        yield "scan", ascii(name)[-4:-1], "refused", {"name": written(f"{name}.nii", raw)}


def cohorts() -> Rows:
    """Tables, datalists, BIDS roots, and what stands where a file is expected."""
    image, rest = "image\na.nii\nb.nii\nsub dir/c.nii\n", ', "b.nii", "sub dir/c.nii"]'
    refused = {"quote": 'image\n"a.nii\n' + "x" * 3000, "field": "image\n" + "x" * 200_000, "deep": DEEP,
               "binary": nifti(), "path": "image\n" + "x" * 5000 + ".nii\n", "NUL": "image\na.nii\0\n",
               "user": "image\n~nobody/a.nii\n", "itself": "image\n./t.csv\n", "line": 'image,subject\na.nii,"x\ny"\n'}
    same = {"spaces": " image \n a.nii \nb.nii\n  sub dir/c.nii\n", "quotes": image.replace("a.nii", '"a.nii"'),
            "up and down": "image\nsub dir/../a.nii\n./b.nii\nsub dir//c.nii\n", "old Mac": image.replace("\n", "\r")}
    yield "cohort", "t.csv", "refused", refused
    yield "cohort", "t.csv", "same", same
    refused = {"deep": DEEP, "null": '["a.nii", null]', "surrogate": '["\\ud800.nii"]', "NUL": '["a.nii\\u0000"]',
               "surrogate id": '[{"image": "a.nii", "subject": "\\ud800"}]', "path": json.dumps(["x" * 5000]),
               "two documents": '["a.nii"]["b.nii"]', "split 5": '[{"image": "a.nii", "split": 5}]'}
    outward = ("../../x", "..", "a/b", "a\\b", "x\ny", "x\0y", "x\x7f")
    refused |= {f"{key} {ascii(text)}": json.dumps([{"image": "a.nii", key: text}])
                for text in outward for key in ("subject", "session")}
    same = {"mark": '\ufeff["a.nii"' + rest, "long": f'[{{"image": "a.nii", "age": {"9" * 5000}}}{rest}',
            "twice": '[{"image": 3, "image": "a.nii"}' + rest, "NaN": '[{"image": "a.nii", "age": NaN}' + rest,
            **{f"subject {s}": f'[{{"image": "a.nii", "subject": "{s}"}}{rest}' for s in ("-rf", "<b>", "脳")}}
    yield "cohort", "t.json", "refused", refused
    yield "cohort", "t.json", "same", same
    start = "participant_id\tgroup\n"
    yield "label", "participants.tsv", "refused", {
        "NUL": f"{start}sub-01\t\0\n", "two columns": "participant_id\tgroup\tgroup\nsub-01\ta\tb\n"}
    yield "label", "listed twice", "refused", {"a subject linked": then(bids, link("sub-03", "sub-01"))}
    yield "label", "", "same", {
        "no scan": f"{start}sub-01\ta\nsub-02\tb\nsub-99\tc\n",
        "anat is a file": then(bids, lambda f: (f / "sub-03").mkdir(), lambda f: (f / "sub-03/anat").touch())}
    scan = {"link to itself": link("a.nii", "a.nii"), "pipe": pipe("a.nii"), "zeros": link("a.nii", "/dev/zero"),
            "null": link("a.nii", "/dev/null"), "memory": link("a.nii", "/proc/self/mem")}
    yield "scan", "", "refused", scan
    table = written("t.csv", "image\na.nii\n")
    yield "scan", "a.nii", "refused", {f"listed: {what}": then(table, make) for what, make in scan.items()}
    for reader, name in (("cohort", "t.csv"), ("cohort", "t.json"), ("latent", "x.npy"), ("latent", "x.pt"),
                         ("latent", "x.safetensors"), ("latent", "x.nii"), ("statistics", "latent_stats.json"),
                         ("header", "x_latent.safetensors"), ("weights", "w.pt")):
        yield reader, "", "refused", {f"pipe {name}": pipe(name), f"zeros {name}": link(name, "/dev/zero")}
    yield "folder", "manifest.jsonl", "refused", {"pipe": pipe("manifest.jsonl", ".")}
    yield "scan", "", "same", {"loop": then(lambda f: written("x/a.nii", nifti())(f).parent, link("x/up", ".."))}


def latent_files() -> Rows:
    """Single latents in every format, and the folders that encoding leaves."""
    z, image = values(), nib.Nifti1Image(np.moveaxis(values().double().numpy(), 0, -1), np.eye(4)).to_bytes()
    for ending in ENDINGS:
        raw = latent_bytes(ending)
        yield "latent", f"x{ending}", "refused", {"half": raw[: len(raw) // 2], "by one": raw[:-1], "nothing": b"",
                                                  "zeros": bytes(5000), "pickle": pickle.dumps(Trap())}
    yield "latent", "x.pt", "refused", {
        "NaN": z * np.nan, "complex": z.to(torch.complex64), "bool": z > 0, "overflow": z.double() * 1e300,
        "two": {"a": z, "b": z}, "list": [z], "sparse": z.to_sparse(), "meta": z.to("meta"),
        "trap": {"z": Trap()}, "expanded": torch.zeros(1).expand(10**12)}
    yield "latent", "x.pt", "same", {
        "float64": z.double(), "dict": {0: z}, "named": {"z": z, "x": 3}, "parameter": torch.nn.Parameter(z)}
    heads = {"10^12": npy((10**12,)), "7 GB": npy((9 * 10**8,), "<f8"), "negative": npy((-1, 3)),
             "objects": npy(descr="|O"), "texts": npy((1,), "<U500000000"), "code": npy().replace(b"False", b"print"),
             "4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)}
    yield "latent", "x.npy", "refused", {what: content + bytes(1440) for what, content in heads.items()}
    heads["7 GB"] += bytes(1 << 27)
    yield "latent", "x.npz", "refused", {w: packed({"z.npy": content + bytes(1440)}) for w, content in heads.items()}
    yield "latent", "x.npz", "same", {"path": packed({"../z.npy": npy() + z.numpy().tobytes() + bytes(1 << 27)})}
    yield "latent", "x.safetensors", "refused", {
        "2^63 bytes": struct.pack("<Q", 2**63), "no JSON": struct.pack("<Q", 4) + b"{]}{",
        "10^18": safetensors([10**18], 16), "past the end": safetensors([10**6], 4 * 10**6),
        "disagreeing": safetensors([3], 8)}
    yield "latent", "x.nii.gz", "refused", {
        "4 GB": bomb("x.nii.gz", header(image, dim=[4, 500, 500, 500, 4, 1, 1, 1])), "bomb": bomb("x.nii.gz", image)}
    fields: dict[str, list[Any]] = {
        "source_shape": [[10**5] * 3, [1600] * 3, [-1, 2, 3], [22, 24], "22", [22.5, 24, 22]],
        "source_affine": [[[np.nan] * 4] * 4, [[0.0] * 4] * 4, np.eye(3).tolist(), "eye"],
        "source_codes": [["a", "b"], [1], [9, 9]], "source_units": [["parsec", "sec"]],
        "intensity_factor": [float("nan"), "7"], "model_affine": [[[0.0] * 4] * 4]}
    yield "header", "", "refused", {f"{key} {option}": latent_file(**{key: option})
                                    for key, options in fields.items() for option in options}
    yield "header", "", "other", {"no grid": latent_file(**dict.fromkeys(SourceGrid.__dataclass_fields__))}
    yield "folder", "x_latent", "refused", {"no record": latent_folder(ENTRY, name=None)}
    yield "folder", "y_latent", "refused", {"gone": latent_folder({**ENTRY, "file": "y_latent.safetensors"})}
    lines = ["{", "[]", "null", DEEP, b'{"file": "\xff"}', {"split": "train"}, {**ENTRY, "name": "../x"},
             *({**ENTRY, "file": file} for file in (3, "x\0", "\ud800", "../x", "/etc/passwd"))]
    yield "folder", "manifest.jsonl", "refused", {str(n): latent_folder(line) for n, line in enumerate(lines)}

    def scale(channel: Any, overall: Any = 1.0) -> str:
        return json.dumps({**STATISTICS, "scale_factor": {"channel": channel, "overall": overall}})

    yield "statistics", "latent_stats.json", "refused", {
        "empty": "", "cut": json.dumps(STATISTICS)[:40], "list": "[]", "nothing": "{}", "NaN": scale([np.nan] * 4),
        "0": scale([0.0] * 4), "texts": scale(["a"] * 4), "none": scale([]), "deep": DEEP,
        "overall": scale([1.0] * 4, "x"), "digits": scale([1.0] * 4).replace("1.0]", "9" * 5000 + "]"),
        "shift": json.dumps({**STATISTICS, "shift": {"channel": [0.0] * 5, "overall": 0.0}})}


def networks() -> Rows:
    """Weights, checkpoints, and keys of the configs."""
    good, first = state(), next(iter(state()))
    for name, raw in (("w.pt", torch_bytes(good)), ("w.safetensors", save(good))):
        yield "weights", name, "refused", {"nothing": b"", "half": raw[: len(raw) // 2], "by one": raw[:-1],
                                           "HTML": b"<!doctype html>", "pickle": pickle.dumps(Trap())}
    with zipfile.ZipFile(io.BytesIO(torch_bytes(good))) as archive:
        compressed = packed({name: archive.read(name) for name in archive.namelist()})
    yield "weights", "w.pt", "refused", {"compressed": compressed}
    yield "latent", "x.pt", "refused", {"compressed": compressed}
    yield "weights", "w.pt", "refused", {
        "{}": {}, "list": [1], "None": None, "missing": {k: v for k, v in good.items() if k != first},
        "too many": {**good, "x": values()}, "shape": {**good, first: values()}, "trap": Trap(),
        "numbers": dict.fromkeys(good, 1.0), "meta": {**good, first: good[first].to("meta")},
        "sparse": {**good, first: good[first].to_sparse()}, "NaN": {k: v * np.nan for k, v in good.items()},
        "complex": {**good, first: good[first].to(torch.complex64)},
        "expanded": {**good, "x": torch.zeros(1).expand(10**12)}}
    yield "weights", "w.pt", "same", {
        "float64": {k: v.double() for k, v in good.items()}, "under model": {"model": good, "epoch": 3}}
    whole = {"epoch": 3, "epoch_length": 5, "objects": {"network": good}, "best_metric": 0.5, "best_metric_epoch": 2,
             "early_stop": None}
    yield "checkpoint", "epoch_0003.pt", "refused", {
        "cut": torch_bytes(whole)[:-1], "nothing": b"",
        **{f"no {key}": {k: v for k, v in whole.items() if k != key} for key in whole}, "list": [],
        "trap": Trap(), "state dict": good, "epoch": {**whole, "epoch": "3"}, "best": {**whole, "best_metric": "x"},
        "objects": {**whole, "objects": {"network": {}}}, "length": {**whole, "epoch_length": 7}}
    keys: dict[str, dict[str, list[Any]]] = {
        "inference": {
            "spatial_size": ["abc", None, [32, 32], [32, 32, 33], [0] * 3, [40000] * 3], "device": ["gpu", 3, "meta"],
            "spacing": ["abc", 0, float("nan"), 1e-6, True], "split": ["everything"], "checks": ["maybe"],
            "weights": [None, []], "max_scans": [-1], "dataset_dir": [3, "["], "output_dir": [3], "amp": ["maybe"],
            "channels_last": ["maybe"], "save_model_space": ["maybe"], "num_workers": ["x", -1]},
        "encode": {"dtype": ["float64"], "shards": ["x", -1], "overwrite": ["maybe"], "test_fraction": ["1/3"],
                   "label": ["group"]},
        "evaluate": {"baselines": [["nope"], 3], "peers": [3, [["x"]]]}}
    for config, entries in keys.items():
        for key, options in entries.items():
            yield "job", key, "refused", {f"{key} {value!r}": a_job(config, **{key: value}) for value in options}
    for key, value in (("weights", "gone.pt"), ("dataset_dir", "/gone"), ("output_dir", "/dev/null/out")):
        yield "job", value, "refused", {key: a_job("inference", **{key: value})}
    yield "job", "", "same", {"otherwise": a_job("inference", amp="no", channels_last=0, max_scans=3, checks="skip")}


# fmt: on


@cache
def corpus() -> tuple[Case, ...]:
    """Every case, in the order of the table."""

    def make_of(reader: str, name: str, content: Any) -> Make:
        if callable(content):
            return content
        if reader == "label":
            return partial(bids, table=content)
        if not isinstance(content, (bytes, str)):
            content = torch_bytes(content)
        return (beside if reader == "cohort" else written)(name, content)

    rows = [row for part in (scans, cohorts, latent_files, networks) for row in part()]
    return tuple(
        Case(f"{reader} {name}: {what}", reader, make_of(reader, name, content), expected, name)
        for reader, name, expected, contents in rows
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


def read_records(path: Path, output: Path, label: str = "") -> Any:
    """Which scans are listed; labels where they are asked for."""
    records = safely_named(read_cohort(str(path), label=label))
    return sorted((Path(record["image"]).name, record["label"]) for record in records)


def read_grid(path: Path, output: Path) -> Any:
    """A latent's header, and the way home that it tells."""
    grid = SourceGrid.of_header(latents.read_header(path))
    return None if grid is None else (grid.bring_home(torch.zeros(32, 32, 32), preprocessing()), grid.image())


def read_folder(path: Path, output: Path) -> Any:
    """The latents of the training split with their names."""
    return [latent.header["name"] for latent in latents.read_manifest_latents(path, "train")]


def read_scaling(path: Path, output: Path) -> Any:
    """Statistics, used in both ways."""
    statistics = latents.read_statistics(path)
    return [latents.LatentScaling(kind, statistics).undo(values(), LATENT[1:]) for kind in ("channel", "overall")]


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
    "latent": lambda path, output: latents.read_tensor(latents.list_latents(path)[0]["latent"]), "folder": read_folder,
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
