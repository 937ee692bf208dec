"""Damaged inputs by the hundred, each made from a valid one, and what has to become of each.

    PYTHONPATH=. python tests/damaged_inputs.py show        # every case and its outcome; show latents, of one class
    PYTHONPATH=. python tests/damaged_inputs.py write       # the table of docs/robustness.md

`tests/test_damaged_inputs.py` goes through them. The one idea: a case is a function that writes files into an empty
folder, the reader that they go to, and what is expected: `refused` (one sentence that names the file), `same` (what the
undamaged input gives) or `other` (the file is valid and says something else, which nobody can tell). Nothing is drawn
by chance but what comes from a seed.
"""

from __future__ import annotations

import bz2
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
from collections import Counter
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
from safetensors.torch import save, save_file

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

PAGE = ROOT / "docs" / "robustness.md"
START, END = "<!-- made by tests/damaged_inputs.py write -->", "<!-- end -->"
KINDS = ("refused", "same", "other")
MOST_BYTES = 4 * 10**9  # that a reader may take on top of what the process holds already
MOST_SECONDS = 20  # for one case, on a busy machine
BOMB = 20 * 10**9  # bytes that a bomb unpacks to
SIDES = (22, 24, 22)  # voxels of 4 mm: 88 x 96 x 88 mm
AFFINE = np.diag([-4.0, 4.0, 4.0, 1.0])
LATENT = (4, 6, 5, 3)


@dataclass(frozen=True)
class Case:
    """One damaged input.

    Attributes:
        group: the class, as in the table of docs/robustness.md.
        name: what was done; unique within the class.
        reader: key of `READERS`.
        make: writes the files into a folder and gives what the reader is called with.
        expected: `refused`, `same` or `other`.
        named: what the refusal has to name; "" for the name of the path that `make` gives.
    """

    group: str
    name: str
    reader: str
    make: Make
    expected: str = "refused"
    named: str = ""


class Timeout(BaseException):
    """A reader took longer than `MOST_SECONDS`; no handler of `Exception` swallows it."""


# --- what is valid ---------------------------------------------------------------------------------------------------


@cache
def volume() -> np.ndarray:
    """Voxels of a head, int16."""
    return head(0, SIDES)


@cache
def nifti(kind: type = nib.Nifti1Image, dtype: str = "int16") -> bytes:
    """A valid scan, uncompressed."""
    image = kind(volume().astype(dtype), AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    return image.to_bytes()


@cache
def zipped() -> bytes:
    """The valid scan, compressed."""
    return gzip.compress(nifti(), mtime=0)


@cache
def mgh() -> bytes:
    """A valid scan of FreeSurfer."""
    return nib.MGHImage(volume(), AFFINE).to_bytes()


@cache
def values() -> torch.Tensor:
    """A latent."""
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(0))


@cache
def latent_bytes(ending: str) -> bytes:
    """The latent in the format of an ending."""
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
def state() -> dict[str, torch.Tensor]:
    """Weights of the tiny network."""
    torch.manual_seed(0)
    return BrainVAE(**TINY_VAE).state_dict()


def torch_bytes(content: Any) -> bytes:
    """What `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


# --- small changes ---------------------------------------------------------------------------------------------------


def written(name: str, content: bytes | str) -> Make:
    """A case of one file."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


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


def bomb(first: bytes, size: int = BOMB) -> bytes:
    """gzip: some bytes, then zeros without end; a member of 64 MB again and again."""
    member = gzip.compress(bytes(1 << 26), mtime=0)
    return gzip.compress(first, mtime=0) + member * (size >> 26)


@cache
def deflated_zeros() -> bytes:
    """64 MB of zeros as blocks of a deflate stream, which may follow each other any number of times."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(bytes(1 << 26)) + packer.flush(zlib.Z_FULL_FLUSH)


def deflated(name: str, members: dict[str, tuple[bytes, int]]) -> Make:
    """An archive whose members go on with so many zeros; what unpacks a bomb first looks at its checksum last."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, (first, n_zeros) in members.items():
                packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
                blocks = packer.compress(first) + packer.flush(zlib.Z_FULL_FLUSH)
                archive.writestr(member, blocks + deflated_zeros() * (n_zeros >> 26) + b"\x03\x00")
                entry = archive.getinfo(member)
                entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, len(first) + n_zeros
                entry.CRC = zlib.crc32(first) if not n_zeros else 0
        return folder / name

    return make


def npy_header(**fields: Any) -> bytes:
    """The header alone of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": LATENT, **fields})
    return stream.getvalue()


def trap(sentinel: str = "sentinel") -> Any:
    """An object whose pickle writes a file when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({sentinel!r}, 'w')",)

    return Trap()


# --- scans -----------------------------------------------------------------------------------------------------------


def truncations() -> Iterator[Case]:
    """Every boundary of every header, and the voxels."""
    group = "scans cut off"
    for kind, what in ((nib.Nifti1Image, "NIfTI-1"), (nib.Nifti2Image, "NIfTI-2")):
        raw = nifti(kind)
        fields = kind.header_class.template_dtype.fields
        places = {f"before {name}": offset for name, (_, offset, *_) in fields.items() if offset}
        start = len(raw) - volume().nbytes
        places |= {"after the header": start, "in the voxels": start + 999, "by one byte": len(raw) - 1}
        if kind is nib.Nifti2Image:
            places = dict(list(places.items())[::4] + list(places.items())[-3:])
        for where, place in places.items():
            yield Case(group, f"{what} {where}", "scan", written("a.nii", raw[:place]))
    middle = len(zipped()) // 2
    gzip_places = {"magic": 1, "name": 10, "data": 200, "middle": middle, "checksum": -8, "length": -4, "last byte": -1}
    for where, place in gzip_places.items():
        yield Case(group, f"gzip before its {where}", "scan", written("a.nii.gz", zipped()[:place]))
    for place in (40, 200, 348, 352, 20000, -1):
        content = gzip.compress(nifti()[:place], mtime=0)
        yield Case(group, f"whole gzip of {place} bytes of a scan", "scan", written("a.nii.gz", content))
    for place in (3, 4, 20, 28, 90, 283, 284, 20000):
        yield Case(group, f"MGH after {place} bytes", "scan", written("a.mgh", mgh()[:place]))
        content = gzip.compress(mgh()[:place], mtime=0)
        yield Case(group, f"MGZ after {place} bytes", "scan", written("a.mgz", content))
    yield Case(group, "MGH without its footer", "scan", written("a.mgh", mgh()[: 284 + volume().nbytes]), "same")


# The highest bit of a field's last byte is a number's sign, or the highest of a text; what is not named here is the
# same. Without its code the sform is not looked at, and the scan lies elsewhere.
FLIPPED = {
    "datatype": "refused", "vox_offset": "refused", "scl_slope": "refused", "magic": "refused", "sform_code": "other",
}  # fmt: skip


def flips() -> Iterator[Case]:
    """The highest bit of every field of the header; bits of voxels, with and without a checksum."""
    group = "bits flipped in scans"
    for name, (dtype, offset, *_) in nib.Nifti1Header.template_dtype.fields.items():
        content = flipped(nifti(), offset + dtype.itemsize - 1)
        yield Case(group, f"header: {name}", "scan", written("a.nii", content), FLIPPED.get(name, "same"))
    start, size = 352, len(nifti())
    for number, place in enumerate(np.random.default_rng(0).integers(start, size, 6)):
        content = flipped(nifti(), int(place), number)
        yield Case(group, f"voxel {number}, no checksum", "scan", written("a.nii", content), "other")
        stored = gzip.compress(nifti(), 0, mtime=0)
        content = flipped(stored, int(place) + 15, number)
        yield Case(group, f"voxel {number}, with a checksum", "scan", written("a.nii.gz", content))
    for number, place in enumerate(np.random.default_rng(1).integers(10, len(zipped()), 10)):
        content = flipped(zipped(), int(place), number % 8)
        yield Case(group, f"compressed byte {number}", "scan", written("a.nii.gz", content))
    floats = nifti(dtype="float32")
    for bit in range(8):
        content = flipped(floats, 352 + 4 * int(volume().ravel("F").argmax()) + 3, bit)
        yield Case(group, f"sign or exponent of a float: bit {bit}", "scan", written("a.nii", content), "other")


def other_formats() -> Iterator[Case]:
    """What stands in a scan's place under its name."""
    group = "not the format of the name"
    dicom = bytes(128) + b"DICM" + bytes(300)
    contents: dict[str, bytes] = {
        "nothing": b"", "one byte": b"\0", "zeros": bytes(40000), "text": b"hello\n" * 99, "HTML": b"<html>404</html>",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(400), "DICOM": dicom, "a pickle": pickle.dumps(trap()),
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "an annex pointer": b"/annex/objects/MD5E-s1--0.nii.gz\n", "bzip2": bz2.compress(nifti()),
        "a .npy": latent_bytes(".npy"), "safetensors": latent_bytes(".safetensors"), "torch.save": torch_bytes(state()),
        "random bytes": np.random.default_rng(0).bytes(40000), "gzip in gzip": gzip.compress(zipped()),
        "MGH": mgh(), "magic n+2": nifti()[:344] + b"n+2\0" + nifti()[348:],
        "magic of spaces": header(magic=b"    "), "no magic": header(magic=b""),
    }  # fmt: skip
    for what, content in contents.items():
        yield Case(group, f".nii: {what}", "scan", written("a.nii", content))
        yield Case(group, f".nii.gz: {what}", "scan", written("a.nii.gz", content))
    yield Case(group, ".nii: magic ni1", "scan", written("a.nii", header(magic=b"ni1")), "same")
    yield Case(group, ".nii: gzip", "scan", written("a.nii", zipped()))
    yield Case(group, ".nii.gz: not compressed", "scan", written("a.nii.gz", nifti()))
    yield Case(group, ".mgz: NIfTI", "scan", written("a.mgz", zipped()))
    yield Case(group, ".NII.GZ in capitals", "scan", written("A.NII.GZ", zipped()), "same")
    yield Case(group, "gzip of two members", "scan",
               written("a.nii.gz", gzip.compress(nifti()[:999]) + gzip.compress(nifti()[999:])), "same")  # fmt: skip
    yield Case(group, "zeros after the scan", "scan", written("a.nii", nifti() + bytes(999)), "same")
    yield Case(group, "garbage after gzip", "scan", written("a.nii.gz", zipped() + b"garbage"))


def dimensions() -> Iterator[Case]:
    """Headers that declare what no memory holds, or no volume."""
    group = "absurd dimensions"
    most = 32767
    dims: dict[str, list[int]] = {
        "32767 cubed": [3, most, most, most, 1, 1, 1, 1], "all seven": [7, *[most] * 7], "1000 cubed": [3, *[1000] * 3],
        "negative": [3, -22, 24, 22], "all negative": [3, -22, -24, -22], "zero": [3, 0, 24, 22], "0 axes": [0, *SIDES],
        "8 axes": [8, *SIDES], "-1 axes": [-1, *SIDES], "2 axes": [2, *SIDES], "1 axis": [1, 11616],
        "4 axes": [4, *SIDES, 1], "time": [4, 22, 24, 11, 2], "5 axes": [5, 22, 24, 11, 1, 2],
        "one voxel": [3, 1, 1, 1],
        "one slice": [3, 22, 528, 1], "byte order": [768, *SIDES], "one more slice": [3, 22, 24, 23],
    }  # fmt: skip
    for what, dim in dims.items():
        content = header(dim=[*dim, *[1] * (8 - len(dim))])
        yield Case(group, f"NIfTI-1: {what}", "scan", written("a.nii", content))
        yield Case(group, f"NIfTI-1, gzip: {what}", "scan", written("a.nii.gz", gzip.compress(content)))
    for what, sides in {"2^62 cubed": [2**62] * 3, "2^32 squared": [2**32, 2**32, 2], "-1": [-1, 24, 22],
                        "2^63 - 1": [2**63 - 1, 1, 1]}.items():  # fmt: skip
        content = header(nifti(nib.Nifti2Image), nib.Nifti2Header, dim=[3, *sides, 1, 1, 1, 1])
        yield Case(group, f"NIfTI-2: {what}", "scan", written("a.nii", content))
    for what, words in {"2^31 - 1 cubed": (2**31 - 1,) * 3, "negative": (-22, 24, 22), "zero": (0, 24, 22),
                        "many frames": (22, 24, 22, 2**31 - 1)}.items():  # fmt: skip
        content = mgh()[:4] + struct.pack(f">{len(words)}i", *words) + mgh()[4 + 4 * len(words) :]
        yield Case(group, f"MGH: {what}", "scan", written("a.mgh", content))
        yield Case(group, f"MGZ: {what}", "scan", written("a.mgz", gzip.compress(content)))
    for what, offset in {"negative": -352, "zero": 0, "in the header": 300, "NaN": np.nan, "infinite": np.inf,
                         "1e30": 1e30, "past the end": 1e6, "3e9": 3e9, "16 more": 368}.items():  # fmt: skip
        content = header(vox_offset=offset)
        yield Case(group, f"voxels begin at: {what}", "scan", written("a.nii", content))
        yield Case(group, f"voxels begin at, gzip: {what}", "scan", written("a.nii.gz", gzip.compress(content)))


def bombs() -> Iterator[Case]:
    """Small files that unpack to 20 GB, or say so."""
    group = "compression bombs"
    yield Case(group, "zeros after the voxels", "scan", lambda f: written("a.nii.gz", bomb(nifti()))(f))
    for what, dtype, code in (("float64", "float64", 64), ("bytes", "uint8", 2)):
        start = header(nifti(dtype=dtype), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1], datatype=code)
        yield Case(group, f"1000 cubed {what}", "scan", lambda f, s=start: written("a.nii.gz", bomb(s))(f))
    extension = struct.pack("<4bii", 1, 0, 0, 0, 2**31 - 16, 6)
    start = header(vox_offset=2**31)[:348] + extension
    wide = header(dim=[3, 150, 150, 600, 1, 1, 1, 1])
    yield Case(group, "a field of 2.4 m, 1 GB when resampled", "scan", lambda f: written("a.nii.gz", bomb(wide))(f))
    yield Case(group, "a header's extension of 2 GB", "scan", lambda f: written("a.nii.gz", bomb(start))(f))
    far = header(vox_offset=1.9e10)[:348] + bytes(4)
    yield Case(group, "voxels behind 19 GB", "scan", lambda f: written("a.nii.gz", bomb(far))(f))
    frames = mgh()[:4] + struct.pack(">3i", 1000, 1000, 1000) + mgh()[16:]
    yield Case(group, "MGZ of 1000 cubed", "scan", lambda f: written("a.mgz", bomb(frames))(f))
    image = nib.Nifti1Image(np.moveaxis(values().numpy(), 0, -1).astype(np.float64), np.eye(4)).to_bytes()
    large = header(image, dim=[4, 500, 500, 500, 4, 1, 1, 1])
    yield Case(group, "latent: NIfTI of 4 GB", "latent", lambda f: written("x.nii.gz", bomb(large))(f))
    yield Case(group, "latent: NIfTI that goes on", "latent", lambda f: written("x.nii.gz", bomb(image))(f))
    begun = header(image, vox_offset=2**31)[:348] + extension
    yield Case(
        group, "latent: NIfTI with an extension of 2 GB", "latent", lambda f: written("x.nii.gz", bomb(begun))(f)
    )
    big = npy_header(descr="<f8", shape=(9 * 10**8,))
    yield Case(group, "latent: npz of 7 GB", "latent", deflated("x.npz", {"z.npy": (big, 7 * 2**30)}))
    text = npy_header(descr="<U2000000000", shape=())
    yield Case(group, "latent: npz of one text of 8 GB", "latent", deflated("x.npz", {"z.npy": (text, 0)}))
    yield Case(group, "latent: npz that goes on", "latent",
               deflated("x.npz", {"z.npy": (npy_header() + values().numpy().tobytes(), 2**30)}), "same")  # fmt: skip
    for what, reader, name in (("latent", "latent", "x.pt"), ("weights", "weights", "w.pt")):
        yield Case(group, f"{what}: torch archive of 5 GB", reader, partial(_torch_bomb, name=name))
    yield Case(group, "latent: one value, expanded", "latent",
               written("x.pt", torch_bytes(torch.zeros(1).expand(10**12))))  # fmt: skip


def _torch_bomb(folder: Path, name: str) -> Path:
    """A `torch.save` file whose one storage is compressed zeros."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"z": torch.zeros(8)}))) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    n_bytes = 5 * 2**30
    storage = next(member for member in members if member.endswith("data/0"))
    # BININT 8 is the storage's length in the pickle; torch asks the archive for the bytes
    pickled = next(member for member in members if member.endswith("data.pkl"))
    members[pickled] = members[pickled].replace(b"K\x08", b"\x8a\x05" + struct.pack("<q", n_bytes // 4)[:5])
    return deflated(name, {m: (raw, n_bytes if m == storage else 0) for m, raw in members.items()})(folder)


def geometry() -> Iterator[Case]:
    """Affines, zooms and units."""
    group = "affine and zooms"

    def sform(*rows: Any, **more: Any) -> bytes:
        names = dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=False))
        return header(sform_code=1, **names, **more)

    def qform(**more: Any) -> bytes:
        return header(sform_code=0, qform_code=1, **more)

    x, y, z = [-4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]
    spread = [1.0, 4.0, 4.0, 4.0, 1, 1, 1, 1]
    refused = {
        "NaN in the sform": sform(np.nan), "one NaN": sform([np.nan, 0, 0, 0], y, z), "infinite": sform(np.inf),
        "infinite origin": sform([-4.0, 0, 0, np.inf], y, z), "all zero": sform(0, 0, 0),
        "two equal rows": sform(x, x, z),
        "a zero row": sform(x, 0, z), "almost singular": sform(x, [-4.0, 1e-7, 0, 0], z),
        "400 mm": sform([400, 0, 0, 0], y, z),
        "1e30 mm": sform([1e30, 0, 0, 0], y, z), "1e-30 mm": sform([1e-30, 0, 0, 0], y, z),
        "metres": sform([-0.004, 0, 0, 0], [0, 0.004, 0, 0], [0, 0, 0.004, 0]),
        "micrometres": sform([-4e3, 0, 0, 0], [0, 4e3, 0, 0], [0, 0, 4e3, 0]),
        "origin of 1e30": sform([-4.0, 0, 0, 1e30], y, z),
        "axes 0.1 degrees apart": sform(x, [-4.0, 0.007, 0, 0], z),
        "axes 3 degrees apart": sform(x, [-4.0, 0.2, 0, 0], z),
        "quaternion NaN": qform(quatern_b=np.nan), "quaternion of 5": qform(quatern_b=5.0),
        "qfac 0 and zooms 0": qform(pixdim=0),
        "zooms NaN": qform(pixdim=np.nan), "zooms infinite": qform(pixdim=[1, np.inf, 4, 4, 1, 1, 1, 1]),
        "one zoom 0": qform(pixdim=[1, 0, 4, 4, 1, 1, 1, 1]), "zooms 1e-20": qform(pixdim=[1, *[1e-20] * 7]),
        "zooms that contradict the sform": sform(x, y, z, pixdim=[1, 3, 3, 3, 1, 1, 1, 1]),
        "a rounded sform and another qform": sform([-3.9999, 0, 0, 0], y, z, quatern_c=0),
        "no code, zooms NaN": header(sform_code=0, qform_code=0, pixdim=np.nan),
        "no code, zooms 0": header(sform_code=0, qform_code=0, pixdim=0),
    }  # fmt: skip
    for what, content in refused.items():
        yield Case(group, what, "scan", written("a.nii", content))
    cosine, oblique = 0.75**0.5, [1, 3.9, np.hypot(1.95, 3.378), 4, 1, 1, 1, 1]
    turned = {
        "negative zooms beside a sform": (sform(x, y, z, pixdim=[1, -4, -4, -4, 1, 1, 1, 1]), "same"),
        "zooms NaN beside a sform": (sform(x, y, z, pixdim=np.nan), "same"),
        "origin of 1e9": (sform([-4.0, 0, 0, 1e9], y, z), "other"),
        "qfac 7": (qform(pixdim=[7, *spread[1:]]), "other"),
        "negative zooms of a qform": (qform(pixdim=[-1, -4, 4, 4, 1, 1, 1, 1]), "same"),
        "no code": (header(sform_code=0, qform_code=0, pixdim=spread), "other"),
        "code 99": (header(sform_code=99, qform_code=99), "other"),
        "code -1": (header(sform_code=-1, qform_code=0), "other"),
        "units of 255": (header(xyzt_units=255), "same"),
        "axes 60 degrees apart": (sform([-3.9, -1.95, 0, 0], [0, 3.378, 0, 0], z, pixdim=oblique), "other"),
        "a sform rounded to four digits": (sform([-3.9999, 0, 0, 0], y, z), "same"),
        "turned by 30 degrees": (sform([-4 * cosine, -2, 0, 0], [-2, 4 * cosine, 0, 0], z), "other"),
    }
    for what, (content, expected) in turned.items():
        yield Case(group, what, "scan", written("a.nii", content), expected)


def numbers() -> Iterator[Case]:
    """Types of voxels, scaling, and voxels that are no picture."""
    group = "voxel types and values"
    for dtype in ("uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"):
        data = (volume() / 8).astype(dtype) if dtype.endswith("t8") else volume().astype(dtype)
        content = nib.Nifti1Image(data, AFFINE, dtype=data.dtype).to_bytes()
        yield Case(group, f"{dtype}", "scan", written("a.nii", content), "other" if dtype.endswith("t8") else "same")
    big = nib.Nifti1Image(volume(), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes()
    yield Case(group, "big-endian", "scan", written("a.nii", big), "same")
    for code in (0, 1, 32, 128, 1536, 1792, 2048, 2304, 9999, -1):
        yield Case(group, f"data type code {code}", "scan", written("a.nii", header(datatype=code)))
    for what, slope, inter, expected in (
        ("slope NaN", np.nan, np.nan, "same"), ("slope 0", 0, 0, "same"), ("slope infinite", np.inf, 0, "same"),
        ("slope 1e38", 1e38, 0, "refused"), ("slope negative", -1, 0, "refused"), ("slope 1e-45", 1e-45, 0, "same"),
        ("slope 1e-20", 1e-20, 0, "same"), ("slope 1e30", 1e30, 0, "same"), ("intercept NaN", 1, np.nan, "refused"),
        ("intercept infinite", 1, np.inf, "refused"),
        ("intercept -1e9", 1, -1e9, "refused"), ("intercept 1e30", 1, 1e30, "refused"),
    ):  # fmt: skip
        yield Case(group, what, "scan", written("a.nii", header(scl_slope=slope, scl_inter=inter)), expected)
    contents = {
        "all zero": np.zeros(SIDES), "all NaN": np.full(SIDES, np.nan), "all 7": np.full(SIDES, 7),
        "all -inf": np.full(SIDES, -np.inf),
        "negative": -volume(), "one voxel": np.eye(1, volume().size, 5000).reshape(SIDES), "1e300": volume() * 1e300,
    }  # fmt: skip
    for what, data in contents.items():
        content = nib.Nifti1Image(data.astype(np.float64), AFFINE).to_bytes()
        yield Case(group, f"voxels {what}", "scan", written("a.nii", content))


NAMES = [
    "with space.nii", "'quotes\".nii", "a`b$HOME$(id).nii", "@image.nii", "%run.nii", "$@dataset_dir.nii", "#1.nii",
    "[1].nii",
    "*?.nii", "-dash.nii", "--dataset_dir.nii", "~.nii", "~nobody.nii", "a\nb.nii", "a\tb.nii", "\x1b[31mred.nii",
    "back\\slash.nii", "Jürgen.nii", "Ju\u0308rgen.nii", "脳.nii", "🧠.nii", "\u202egpj.nii", "\u200b.nii", "con.nii",
    "a..nii", " .nii",
    "..nii.nii", "n" * 251 + ".nii", "é" * 125 + ".nii", ",.nii", ";.nii", "&lt;script&gt;.nii", "<script>.nii",
    "{}.nii", "%s.nii",
    "2024.nii", "None.nii", "a.nii.nii", "sub-.nii", "sub-01_ses-.nii",
]  # fmt: skip


def names() -> Iterator[Case]:
    """File and folder names that are hard on shells, configs and reports, but names all the same."""
    group = "names"
    for name in NAMES:
        is_plain = name.isprintable() and "\\" not in name or "\u200b" in name or "\u202e" in name
        expected = "same" if is_plain else "refused"  # the scan's name is its subject's id, too
        yield Case(group, f"scan {name[:40]!r}", "scan", written(name, nifti()), expected, ascii(name)[1:5])
        if "nii.nii" not in name:
            folder = f"{name.removesuffix('.nii')}/scan.nii"
            yield Case(
                group, f"folder {name[:40]!r}", "scan", lambda f, n=folder: written(n, nifti())(f).parent, "same"
            )
    for name in NAMES[:22]:
        latent = name.replace(".nii", ".npy")
        yield Case(group, f"latent {latent!r}", "latent", written(latent, latent_bytes(".npy")), "same")
    not_text = os.fsdecode(b"caf\xe9.nii")
    yield Case(group, "scan of a name that is not UTF-8", "scan", written(not_text, nifti()), named="caf")
    yield Case(group, "folder of a name that is not UTF-8", "scan",
               lambda f: written(os.fsdecode(b"caf\xe9/a.nii"), nifti())(f).parent, named="caf")  # fmt: skip
    yield Case(group, "latent of a name that is not UTF-8", "latent",
               written(os.fsdecode(b"caf\xe9.npy"), latent_bytes(".npy")), named="caf")  # fmt: skip
    yield Case(
        group, "scan whose name is hidden", "cohort", lambda f: written(".nii", nifti())(f).parent, named="no scan"
    )


def special_files() -> Iterator[Case]:
    """Links, pipes, devices and folders where a file is expected."""
    group = "links and special files"

    def link(name: str, to: str) -> Make:
        def make(folder: Path) -> Path:
            (folder / name).symlink_to(to)
            return folder / name

        return make

    def two_links(folder: Path) -> Path:
        link("a.nii", "b.nii")(folder)
        return link("b.nii", "a.nii")(folder)

    def pipe(name: str, give: str = "") -> Make:
        def make(folder: Path) -> Path:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.mkfifo(folder / name)
            return folder / give if give else folder / name

        return make

    def listed(make: Make, name: str = "a.nii") -> Make:
        def make_both(folder: Path) -> Path:
            make(folder)
            return written("t.csv", f"image\n{name}\n")(folder)

        return make_both

    def loop(folder: Path) -> Path:
        written("deep/down/a.nii", nifti())(folder)
        (folder / "deep/down/up").symlink_to(folder)
        (folder / "deep/self").symlink_to(".")
        return folder

    def bids_loop(folder: Path) -> Path:
        written("sub-01/anat/sub-01_T1w.nii", nifti())(folder)
        (folder / "sub-01/ses-1").symlink_to("../sub-01")
        (folder / "sub-02").symlink_to("sub-02")
        return folder

    def bids_pipe(folder: Path) -> Path:
        pipe("participants.tsv")(folder)
        return bids(folder)

    def latents_loop(folder: Path) -> Path:
        (folder / "up").symlink_to(folder)
        return written("x.npy", latent_bytes(".npy"))(folder).parent

    def bound_socket(folder: Path) -> Path:
        with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(folder):
            end.bind("a.nii")
        return folder / "a.nii"

    def kept_folder(name: str) -> Make:
        def make(folder: Path) -> Path:
            (folder / name).mkdir()
            return folder / name

        return make

    scans: dict[str, Make] = {
        "a link to itself": link("a.nii", "a.nii"), "two links in a ring": two_links,
        "a link to nothing": link("a.nii", "gone.nii"),
        "a pipe": pipe("a.nii"), "/dev/zero": link("a.nii", "/dev/zero"),
        "/dev/random": link("a.nii.gz", "/dev/random"),
        "/dev/null": link("a.nii", "/dev/null"), "/proc/self/mem": link("a.nii", "/proc/self/mem"),
        "a socket": bound_socket,
        "a folder called a.nii": kept_folder("a.nii"), "a link to /": link("a.nii", "/proc/self/fdinfo"),
    }  # fmt: skip
    for what, make in scans.items():
        yield Case(group, f"scan: {what}", "scan", make)
        name = "a.nii.gz" if "random" in what else "a.nii"
        yield Case(group, f"scan in a table: {what}", "scan", listed(make, name), named=name)
    yield Case(group, "a folder that links to itself", "scan", loop, "same")
    yield Case(group, "a folder that links back alone", "cohort", link("up", ".."), named="no scan")
    yield Case(group, "a BIDS tree that links to itself", "cohort", bids_loop, named="listed twice")
    for name in ("t.csv", "t.tsv", "t.json"):
        yield Case(group, f"a pipe as {name}", "cohort", pipe(name))
        yield Case(group, f"/dev/zero as {name}", "cohort", link(name, "/dev/zero"))
        yield Case(group, f"a link to itself as {name}", "cohort", link(name, name))
    yield Case(group, "a pipe as participants.tsv", "label", bids_pipe, named="participants.tsv")
    for ending in (".npy", ".pt", ".safetensors", ".nii"):
        yield Case(group, f"a pipe as latent {ending}", "latent", pipe(f"x{ending}"))
        yield Case(group, f"/dev/zero as latent {ending}", "latent", link(f"x{ending}", "/dev/zero"))
    yield Case(group, "a pipe as latent of this bundle", "header", pipe("x_latent.safetensors"))
    yield Case(group, "a pipe as statistics", "statistics", pipe("latent_stats.json"))
    yield Case(group, "/dev/zero as statistics", "statistics", link("latent_stats.json", "/dev/zero"))
    yield Case(group, "a pipe as manifest", "folder", pipe("manifest.jsonl", "."), named="manifest.jsonl")
    yield Case(group, "a pipe as weights", "weights", pipe("w.pt"))
    yield Case(group, "a folder as weights", "weights", kept_folder("w.pt"))
    yield Case(group, "a folder of latents that links to itself", "listing", latents_loop, "same")


# --- cohorts ---------------------------------------------------------------------------------------------------------


def bids(folder: Path) -> Path:
    """A BIDS root of two subjects."""
    for subject in ("sub-01", "sub-02"):
        written(f"{subject}/anat/{subject}_T1w.nii", nifti())(folder)
    return folder


def with_participants(content: bytes | str) -> Make:
    """The BIDS root with a participants.tsv."""

    def make(folder: Path) -> Path:
        written("participants.tsv", content)(folder)
        return bids(folder)

    return make


def beside_scans(name: str, content: bytes | str) -> Make:
    """A table or datalist beside three scans."""

    def make(folder: Path) -> Path:
        for scan in ("a.nii", "b.nii", "sub dir/c.nii"):
            written(scan, nifti())(folder)
        return written(name, content)(folder)

    return make


def tables() -> Iterator[Case]:
    """CSV and TSV."""
    group = "tables"
    refused: dict[str, bytes | str] = {
        "empty": "", "only spaces": "   \n", "no rows": "image\n", "column misspelt": "Image\na.nii\n",
        "no header": "a.nii\nb.nii\n",
        "two columns image": "image,image\na.nii,b.nii\n", "two columns subject": "image,subject,subject\na.nii,s,t\n",
        "a row too long": "image\na.nii,b.nii\n", "a file that is not there": "image\ngone.nii\n",
        "an empty path": "image,x\n,1\n",
        "a quote that never ends": 'image\n"a.nii\nb.nii\n' + "x" * 3000,
        "a field of 200 KB": "image\n" + "x" * 200_000 + "\n",
        "a path of 5000": "image\n" + "x" * 5000 + ".nii\n", "NUL": "image\na.nii\0\n",
        "UTF-16": "image\na.nii\n".encode("utf-16"),
        "latin-1": "image,x\na.nii,é\n".encode("latin-1"), "binary": nifti(), "gzip": gzip.compress(b"image\na.nii\n"),
        "another suffix": "image\nt.csv\n", "a folder": "image\nsub dir\n", "itself": "image\n./t.csv\n",
        "another split": "image,split\na.nii,5\n",
        "a URL": "image\nhttps://example.org/a.nii\n", "a wildcard": "image\n*.nii\n",
        "a list": "image\n\"['a.nii','b.nii']\"\n",
        "~nobody": "image\n~nobody/a.nii\n", "an Excel formula": "image\n=A1\n",
        "HTML": "<html><body>404</body></html>",
        "columns by tabs": "image\tsubject\na.nii\ts\n",
        "merge conflict": "<<<<<<< HEAD\nimage\na.nii\n=======\nimage\nb.nii\n",
        "deep JSON": "[" * 100_000,
    }  # fmt: skip
    for what, content in refused.items():
        yield Case(group, what, "cohort", beside_scans("t.csv", content))
    disagreeing = "image,subject,split\na.nii,s,train\nb.nii,s,test\n"
    yield Case(group, "splits that disagree", "cohort", beside_scans("t.csv", disagreeing), named="Subject s of t")
    yield Case(group, "twice the same", "cohort", beside_scans("t.csv", "image\na.nii\n./a.nii\n"), named="a.nii")
    read = {
        "byte order mark": "\ufeffimage\na.nii\nb.nii\nsub dir/c.nii\n",
        "semicolons": "image;x\na.nii;1\nb.nii;2\nsub dir/c.nii;\n",
        "carriage returns": "image\r\na.nii\r\nb.nii\r\nsub dir/c.nii\r\n",
        "empty lines": "image\n\n\na.nii\n\nb.nii\nsub dir/c.nii\n",
        "spaces": " image \n a.nii \nb.nii\n  sub dir/c.nii\n", "quotes": 'image\n"a.nii"\n"b.nii"\n"sub dir/c.nii"\n',
        "up and down": "image\nsub dir/../a.nii\n./b.nii\nsub dir//c.nii\n",
        "old Mac line ends": "image\ra.nii\rb.nii\rsub dir/c.nii\r",
        "text where numbers are": "image,age\na.nii,old\nb.nii,NaN\nsub dir/c.nii,1e999\n",
    }  # fmt: skip
    for what, content in read.items():
        yield Case(group, what, "cohort", beside_scans("t.csv", content), "same")


def datalists() -> Iterator[Case]:
    """MONAI's JSON."""
    group = "datalists"
    deep = "[" * 100_000 + "]" * 100_000
    refused: dict[str, bytes | str] = {
        "empty": "", "cut off": '{"training": [{"image": "a.nii"}', "null": "null", "a number": "3",
        "a text": '"a.nii"', "true": "true",
        "no item": "[]", "no section": "{}", "another section": '{"train_set": ["a.nii"]}',
        "null in it": '["a.nii", null]',
        "a number in it": '["a.nii", 3]', "null section": '{"training": null}', "a list in it": '[["a.nii"]]',
        "image is a number": '[{"image": 3}]',
        "image is a list": '[{"image": ["a.nii"]}]', "image is null": '[{"image": null}]',
        "image is empty": '[{"image": ""}]',
        "no image": '[{"img": "a.nii"}]', "gone": '["gone.nii"]', "NUL in a path": '["a.nii\\u0000"]',
        "a lone surrogate": '["\\ud800.nii"]',
        "a surrogate as subject": '[{"image": "a.nii", "subject": "\\ud800"}]',
        "a surrogate as label": '[{"image": "a.nii", "session": "\\ud800"}]',
        "100,000 deep": deep, "100,000 deep in an item": f'[{{"image": "a.nii", "x": {deep}}}]',
        "a comment": '// x\n["a.nii"]', "a trailing comma": '["a.nii",]',
        "single quotes": "['a.nii']", "UTF-16": '["a.nii"]'.encode("utf-16"), "latin-1": '["é.nii"]'.encode("latin-1"),
        "two documents": '["a.nii"]["b.nii"]',
        "a split of 5": '[{"image": "a.nii", "split": 5}]', "a path of 5000": json.dumps(["x" * 5000 + ".nii"]),
        "subject is an object": '[{"image": "a.nii", "subject": {"id": "a/b"}}]', "HTML": "<html></html>",
    }  # fmt: skip
    for what, content in refused.items():
        yield Case(group, what, "cohort", beside_scans("t.json", content))
    twice = '{"training": ["a.nii"], "test": ["a.nii"]}'
    yield Case(group, "twice the same", "cohort", beside_scans("t.json", twice), named="a.nii")
    read = {
        "in a list": '["a.nii", "b.nii", "sub dir/c.nii"]',
        "byte order mark": '\ufeff["a.nii", "b.nii", "sub dir/c.nii"]',
        "escapes": '["\\u0061.nii", "b.nii", "sub\\u0020dir/c.nii"]',
        "long numbers": '[{"image": "a.nii", "age": %s}, "b.nii", "sub dir/c.nii"]' % ("9" * 5000),
        "NaN": '[{"image": "a.nii", "age": NaN}, "b.nii", "sub dir/c.nii"]',
        "keys twice": '[{"image": "b.nii", "image": "a.nii"}, "b.nii", "sub dir/c.nii"]',
        "other keys": '[{"image": "a.nii", "box": [1, {"x": null}], "fold": 0}, "b.nii", "sub dir/c.nii"]',
        "one object": '{"training": {"image": "a.nii"}, "test": ["b.nii", "sub dir/c.nii"], "x": 3}',
    }  # fmt: skip
    for what, content in read.items():
        yield Case(group, what, "cohort", beside_scans("t.json", content), "same")


def bids_trees() -> Iterator[Case]:
    """BIDS roots and participants.tsv; `label` reads the column group."""
    group = "BIDS trees"

    start = "participant_id\tgroup\n"
    refused: dict[str, bytes | str] = {
        "empty": "", "no participant_id": "id\tgroup\nsub-01\tx\n",
        "no such column": "participant_id\tage\nsub-01\t3\n", "a subject twice": start + "sub-01\ta\nsub-01\tb\n",
        "twice, with and without sub-": start + "sub-01\ta\n01\tb\n", "commas": "participant_id,group\nsub-01,a\n",
        "UTF-16": (start + "sub-01\ta\n").encode("utf-16"),
        "a row too long": start + "sub-01\ta\tb\n", "binary": nifti(),
        "another split": "participant_id\tgroup\tsplit\nsub-01\ta\t9\n", "NUL": start + "sub-01\t\0\n",
        "two columns group": "participant_id\tgroup\tgroup\nsub-01\ta\tb\n",
    }  # fmt: skip
    for what, content in refused.items():
        yield Case(group, f"participants.tsv: {what}", "label", with_participants(content), named="participants.tsv")
    rows = "sub-01\ta\nsub-02\tb\n"
    read = {
        "a subject without a scan": f"{start}{rows}sub-99\tc\n", "n/a": f"{start}{rows}sub-03\tn/a\n",
        "without sub-": f"{start}01\ta\n02\tb\n", "byte order mark": f"\ufeff{start}{rows}",
    }  # fmt: skip
    for what, content in read.items():
        yield Case(group, f"participants.tsv: {what}", "label", with_participants(content), "same")

    def changed(change: Callable[[Path], Any]) -> Make:
        def make(folder: Path) -> Path:
            bids(folder)
            change(folder)
            return folder

        return make

    def other_contrast(folder: Path) -> None:
        for scan in folder.rglob("*_T1w.nii"):
            scan.rename(scan.with_name(scan.name.replace("T1w", "T2w")))

    trees: dict[str, tuple[Callable[[Path], Any], str, str]] = {
        "no T1w": (other_contrast, "refused", ""),
        "a file called sub-03": (lambda f: (f / "sub-03").touch(), "same", ""),
        "anat is a file": (lambda f: ((f / "sub-03").mkdir(), (f / "sub-03/anat").touch()), "same", ""),
        "an empty subject": (lambda f: (f / "sub-03/anat").mkdir(parents=True), "same", ""),
        "a subject linked again": (lambda f: (f / "sub-03").symlink_to("sub-01"), "refused", "listed twice"),
        "hidden files": (lambda f: (f / "sub-01/anat/._sub-01_T1w.nii").touch(), "same", ""),
        "no participants.tsv": (lambda f: None, "same", ""),
    }  # fmt: skip
    for what, (change, expected, named) in trees.items():
        yield Case(group, what, "bids", changed(change), expected, named)
    not_fetched = changed(lambda f: (f / "sub-01/anat/sub-01_acq-x_T1w.nii").symlink_to("../.git/annex"))
    yield Case(group, "a scan that is not fetched", "scan", not_fetched, named="acq-x")
    a_folder = changed(lambda f: (f / "sub-01/anat/sub-01_run-2_T1w.nii").mkdir())
    yield Case(group, "a folder called sub-01_run-2_T1w.nii", "scan", a_folder, named="run-2")


OUTWARD = [
    "../../etc/passwd", "/etc/passwd", "..", ".", "a/b", "a\\b", "..\\..\\x", "x\nname", "x\ty", "x\x7f", "x\0y",
    "C:\\x", "//server/x", "a/../../b",
]  # fmt: skip


def traversals() -> Iterator[Case]:
    """Ids that would lead out of the output folder."""
    group = "path traversal"
    for text in OUTWARD:
        for key in ("subject", "session"):
            content = json.dumps([{"image": "a.nii", key: text}])
            yield Case(group, f"{key} {text!r} in a datalist", "cohort", beside_scans("t.json", content))
        named = text if text in ("a/b", "a\\b") else "manifest.jsonl"  # these two are inside, and missing
        entry = {**RECORD, "file": text if "/" in text or "\\" in text else f"../{text}"}
        yield Case(group, f"manifest names {text!r}", "folder", latent_folder(entry), named=named)
    outward = {"file": "x_latent.safetensors", **RECORD, "name": "../../x"}
    yield Case(group, "manifest whose name leads outward", "folder", latent_folder(outward), named="manifest.jsonl")
    for what, text in {"quoted newline": '"x\ny"', "slash": "a/b"}.items():
        yield Case(
            group, f"subject in a table: {what}", "cohort", beside_scans("t.csv", f"image,subject\na.nii,{text}\n")
        )
    for text in ("a b", "Ünal", "O'Brien", '"x"', "-rf", "$(id)", "<b>", "x" * 300, "NULL", "7", "脳"):
        content = json.dumps([{"image": "a.nii", "subject": text}, "b.nii", "sub dir/c.nii"])
        yield Case(group, f"subject {text[:20]!r}", "cohort", beside_scans("t.json", content), "same")


# --- latents, weights, checkpoints -----------------------------------------------------------------------------------


def latents() -> Iterator[Case]:
    """Single latents in every format."""
    group = "latents"
    for ending in (".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz"):
        raw = latent_bytes(ending)
        for place in (0, 1, 7, 8, 9, 64, len(raw) // 2, len(raw) - 1):
            yield Case(group, f"{ending} cut after {place} bytes", "latent", written(f"x{ending}", raw[:place]))
        for what, content in {"HTML": b"<html>404</html>", "a pickle": pickle.dumps(trap()), "zeros": bytes(5000),
                              "random": np.random.default_rng(0).bytes(5000)}.items():  # fmt: skip
            yield Case(group, f"{ending} is {what}", "latent", written(f"x{ending}", content))
    z = values()
    tensors: dict[str, Any] = {
        "NaN": torch.full_like(z, torch.nan), "complex": z.to(torch.complex64), "bool": z > 0,
        "overflowing": z.double() * 1e300, "empty list": [], "text": "mu",
        "two without a name": {"a": z, "b": z}, "nothing": {}, "None": None, "number": 3.0, "sparse": z.to_sparse(),
        "meta": z.to("meta"), "nested": {"mu": {"mu": z}},
        "mu is a list": {"mu": [1.0]},
        "nested tensor": [[z]], "a network": {"mu": trap()},
    }  # fmt: skip
    for what, content in tensors.items():
        yield Case(group, f".pt holds {what}", "latent", written("x.pt", torch_bytes(content)))
    for what, content in {"float64": z.double(), "a dict": {0: z}, "float64 in a dict": {"z": z.double(), "x": 3},
                          "a parameter": torch.nn.Parameter(z)}.items():  # fmt: skip
        yield Case(group, f".pt holds {what}", "latent", written("x.pt", torch_bytes(content)), "same")
    heads: dict[str, bytes] = {
        "10^12 values": npy_header(shape=(10**12,)), "2^62 x 8": npy_header(shape=(2**62, 8)),
        "negative": npy_header(shape=(-1, 3)), "objects": npy_header(descr="|O"),
        "texts of 2 GB": npy_header(descr="<U500000000", shape=(1,)),
        "records": npy_header(descr=[("a", "<f4"), ("b", "<f4")]), "dates": npy_header(descr="<M8[s]"),
        "blocks": npy_header(descr="|V4"), "version 9": b"\x93NUMPY\x09\x00" + npy_header()[8:],
        "code": npy_header().replace(b"False", b"print"),
        "4 GB of header": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99),
        "deep brackets": b"\x93NUMPY\x01\x00\xf0\x20" + b"(" * 8432,
    }  # fmt: skip
    for what, content in heads.items():
        content = content + bytes(1440)
        yield Case(group, f".npy declares {what}", "latent", written("x.npy", content))
        yield Case(group, f".npz declares {what}", "latent", deflated("x.npz", {"z.npy": (content, 0)}))
    prefix = {
        "2^63 bytes of header": struct.pack("<Q", 2**63), "100 MB of header": struct.pack("<Q", 10**8) + b"{",
        "no JSON": struct.pack("<Q", 4) + b"{]}{",
        "offsets past the end": _safetensors({"z": {"dtype": "F32", "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}),
        "offsets that disagree": _safetensors({"z": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        "10^18 values": _safetensors({"z": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 16]}}),
        "an overflowing shape": _safetensors({"z": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 16]}}),
        "another type": _safetensors({"z": {"dtype": "F31", "shape": [4], "data_offsets": [0, 16]}}),
        "negative offsets": _safetensors({"z": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}),
        "no tensor": _safetensors({}), "a list": _safetensors([]),
        "deep JSON": _safetensors("[" * 100_000),
    }  # fmt: skip
    for what, content in prefix.items():
        yield Case(group, f".safetensors declares {what}", "latent", written("x.safetensors", content))
    for what, names_ in {"a path": "../z", "an absolute path": "/z"}.items():
        content = {names_ + ".npy": (npy_header() + z.numpy().tobytes(), 0)}
        yield Case(group, f".npz whose entry is {what}", "latent", deflated("x.npz", content), "same")
    yield Case(group, ".npz of no entry", "latent", deflated("x.npz", {}))
    yield Case(group, ".npz of two entries", "latent", deflated("x.npz", {"a.npy": (b"", 0), "b.npy": (b"", 0)}))
    yield Case(group, ".npz of a text", "latent", deflated("x.npz", {"z": (b"hello", 0)}))


def _safetensors(content: Any) -> bytes:
    """A safetensors file with a header of our own and 16 bytes of data."""
    text = content if isinstance(content, str) else json.dumps(content)
    return struct.pack("<Q", len(text)) + text.encode() + bytes(16)


GRID: dict[str, Any] = {
    "source_shape": list(SIDES), "source_affine": AFFINE.tolist(), "source_codes": [1, 1],
    "source_units": ["mm", "sec"],
    "model_affine": np.diag([4.0, 4, 4, 1]).tolist(), "intensity_factor": 700.0,
}  # fmt: skip
STATISTICS = {"scale_factor": {"channel": [1.0] * 4, "overall": 1.0}, "shift": {"channel": [0.0] * 4, "overall": 0.0}}
RECORD = {"name": "x", "subject": "s", "session": "", "label": "", "split": "train"}
SHA256 = dict.fromkeys(("source_sha256", "weights_sha256", "preprocessing_sha256"), "0")
ABOUT = {"source_file": "x.nii", **SHA256, "dtype": "float32"}


def latent_file(**changes: Any) -> Make:
    """A latent of this bundle with fields of its header changed; None leaves one out."""

    def make(folder: Path) -> Path:
        fields = {key: value for key, value in {**RECORD, **ABOUT, **GRID, **changes}.items() if value is not None}
        path = folder / "x_latent.safetensors"
        write_latent(path, values(), torch.zeros(LATENT), fields)
        return path

    return make


def latent_folder(*entries: Any) -> Make:
    """A folder of one latent whose manifest has these lines: objects as JSON, texts and bytes as they are."""

    def make(folder: Path) -> Path:
        latent_file()(folder)
        lines = [e if isinstance(e, bytes) else (e if isinstance(e, str) else json.dumps(e)).encode() for e in entries]
        (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return folder

    return make


def latent_folders() -> Iterator[Case]:
    """Headers of latents, manifests and statistics."""
    group = "folders of latents"
    fields: dict[str, Any] = {
        "shape of terabytes": {"source_shape": [10**5] * 3}, "shape of 16 GB": {"source_shape": [1600] * 3},
        "shape negative": {"source_shape": [-1, 2, 3]}, "shape of two": {"source_shape": [22, 24]},
        "shape a text": {"source_shape": "22"}, "shape of fractions": {"source_shape": [22.5, 24, 22]},
        "affine NaN": {"source_affine": np.full((4, 4), np.nan).tolist()},
        "affine zero": {"source_affine": np.zeros((4, 4)).tolist()},
        "affine 3 x 3": {"source_affine": np.eye(3).tolist()}, "affine of texts": {"source_affine": "eye"},
        "affine of 1e-9 mm": {"source_affine": np.diag([1e-9, 1e-9, 1e-9, 1]).tolist()},
        "codes texts": {"source_codes": ["a", "b"]}, "one code": {"source_codes": [1]},
        "code 9": {"source_codes": [9, 99999]}, "units": {"source_units": ["parsec", "sec"]},
        "factor NaN": {"intensity_factor": float("nan")}, "factor a text": {"intensity_factor": "7"},
        "factor infinite": {"intensity_factor": float("inf")},
        "model affine singular": {"model_affine": np.zeros((4, 4)).tolist()},
        "model affine a number": {"model_affine": 4},
    }  # fmt: skip
    for what, change in fields.items():
        yield Case(group, f"header: {what}", "header", latent_file(**change))
    yield Case(group, "header without the grid", "header", latent_file(**dict.fromkeys(GRID)), "other")
    yield Case(
        group, "header without its record", "folder", latent_folder_without("name"), named="x_latent.safetensors"
    )
    raws = {"no JSON": {"source_shape": "["}, "deep JSON": {"source_shape": "[" * 5000}}
    for what, texts in raws.items():
        yield Case(group, f"header: {what}", "header", partial(_raw_header, texts=texts))
    yield Case(group, "header of another format", "header", partial(_raw_header, texts={}, version="another"))
    entry = {"file": "x_latent.safetensors", "sha256": "0", "bytes": 1, **RECORD}
    lines: dict[str, list[Any]] = {
        "no JSON": ["{"], "a list": ["[]"], "a number": ["3"], "null": ["null"], "empty line": [entry, "", entry],
        "no file": [{"split": "train"}], "no split": [{"file": "x_latent.safetensors", "name": "x", "label": ""}],
        "no label": [{"file": "x_latent.safetensors", "name": "x", "split": "train"}],
        "file is a number": [{**entry, "file": 3}], "file is empty": [{**entry, "file": ""}],
        "file is a list": [{**entry, "file": ["x"]}],
        "file with NUL": [{**entry, "file": "x\0"}], "file with a surrogate": [{**entry, "file": "\ud800"}],
        "deep JSON": ["[" * 100_000], "not UTF-8": [b'{"file": "\xff"}'],
        "UTF-16": [json.dumps(entry).encode("utf-16")], "binary": [nifti()],
        "a file that is not there": [{**entry, "file": "y_latent.safetensors"}],
    }  # fmt: skip
    for what, entries in lines.items():
        named = {"file is empty": "", "a file that is not there": "y_latent"}.get(what, "manifest.jsonl")
        yield Case(group, f"manifest: {what}", "folder", latent_folder(*entries), named=named)
    yield Case(group, "no manifest", "folder", lambda f: latent_file()(f).parent, named="manifest.jsonl")
    good = STATISTICS

    def scale(channel: Any, overall: Any = 1.0) -> str:
        return json.dumps({**good, "scale_factor": {"channel": channel, "overall": overall}})

    texts = {
        "empty": "", "cut off": json.dumps(good)[:40], "a list": "[]", "no scale": "{}",
        "no channel": json.dumps({**good, "shift": {"overall": 0.0}}),
        "scale a number": json.dumps({**good, "scale_factor": 1.0}),
        "scales NaN": scale([float("nan")] * 4), "scales infinite": scale([float("inf")] * 4),
        "scales 0": scale([0.0] * 4), "scales texts": scale(["a"] * 4), "scales null": scale(None),
        "scales of a list": scale([[1.0]] * 4),
        "no scales": scale([]), "overall a text": scale([1.0] * 4, "x"),
        "shift longer": json.dumps({**good, "shift": {"channel": [0.0] * 5, "overall": 0.0}}),
        "deep JSON": "[" * 100_000, "binary": "\0\0", "5000 digits": scale([1.0] * 4).replace("1.0]", "9" * 5000 + "]"),
    }  # fmt: skip
    for what, text in texts.items():
        yield Case(group, f"statistics: {what}", "statistics", written("latent_stats.json", text))


def latent_folder_without(key: str) -> Make:
    """A folder whose latent lacks a field of its record."""

    def make(folder: Path) -> Path:
        latent_folder({"file": "x_latent.safetensors", "sha256": "0", "bytes": 1, **RECORD})(folder)
        latent_file(**{key: None})(folder)
        return folder

    return make


def _raw_header(folder: Path, texts: dict[str, str], version: str = "brain_t1_vae latent 1") -> Path:
    """A latent whose header holds texts as they are."""
    path = folder / "x_latent.safetensors"
    save_file({"mu": values(), "logvar": torch.zeros(LATENT)}, path, {"format": version, **RECORD, **ABOUT, **texts})
    return path


def weights() -> Iterator[Case]:
    """Weights files."""
    group = "weights"
    for ending, raw in ((".pt", torch_bytes(state())), (".safetensors", save(state()))):
        for place in (0, 1, 4, 8, 30, 100, len(raw) // 2, len(raw) - 22, len(raw) - 1):
            yield Case(group, f"{ending} cut after {place} bytes", "weights", written(f"w{ending}", raw[:place]))
        others = {
            "HTML": b"<!doctype html>", "zeros": bytes(5000), "a scan": nifti(), "a pickle": pickle.dumps(trap()),
            "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\n",
        }  # fmt: skip
        for what, content in others.items():
            yield Case(group, f"{ending} is {what}", "weights", written(f"w{ending}", content))
    first = next(iter(state()))
    contents: dict[str, Any] = {
        "nothing": {}, "a list": [1, 2], "a number": 3, "None": None, "a tensor": values(),
        "one tensor missing": {k: v for k, v in state().items() if k != first},
        "one too many": {**state(), "x": values()},
        "one of another shape": {**state(), first: values()}, "numbers for tensors": dict.fromkeys(state(), 1.0),
        "keys that are numbers": {**state(), 0: values(), 1: values()},
        "a meta tensor": {**state(), first: state()[first].to("meta")},
        "a sparse tensor": {**state(), first: state()[first].to_sparse()},
        "an expanded tensor": {**state(), "x": torch.zeros(1).expand(10**12)}, "a network": trap(),
        "an optimizer": {"optimizer": {"state": {}}}, "a list under model": {"model": [state()]},
        "NaN": {k: torch.full_like(v, torch.nan) for k, v in state().items()},
        "complex numbers": {k: v.to(torch.complex64) for k, v in state().items()},
        "half of them infinite": {k: v / 0 for k, v in state().items()},
    }  # fmt: skip
    for what, content in contents.items():
        yield Case(group, f"holds {what}", "weights", written("w.pt", torch_bytes(content)))
    double = {name: tensor.double() for name, tensor in state().items()}
    for what, content in {"float64": double, "under model": {"model": state(), "epoch": 3}}.items():
        yield Case(group, f"holds {what}", "weights", written("w.pt", torch_bytes(content)), "same")


def checkpoints() -> Iterator[Case]:
    """The newest checkpoint of a run that is to go on."""
    group = "training checkpoints"
    good = {
        "epoch": 3, "epoch_length": 5, "processes": 1, "objects": {"network": state()}, "best_metric": 0.5,
        "best_metric_epoch": 2, "early_stop": None,
    }  # fmt: skip
    raw = torch_bytes(good)
    for place in (0, 4, 100, len(raw) // 2, len(raw) - 1):
        yield Case(group, f"cut after {place} bytes", "checkpoint", written("epoch_0003.pt", raw[:place]))
    contents: dict[str, Any] = {
        "a list": [], "a state dict": state(), "None": None,
        **{f"no {key}": {k: v for k, v in good.items() if k != key} for key in good if key != "processes"},
        "other objects": {**good, "objects": {"network": {}}},
        "objects a list": {**good, "objects": []}, "epoch a text": {**good, "epoch": "3"},
        "another length": {**good, "epoch_length": 7}, "length a text": {**good, "epoch_length": "5"},
        "best a text": {**good, "best_metric": "x"}, "a network": trap(),
    }  # fmt: skip
    for what, content in contents.items():
        yield Case(group, f"{what}", "checkpoint", written("epoch_0003.pt", torch_bytes(content)))


# --- keys of the configs ---------------------------------------------------------------------------------------------


def a_job(config: str, **more: Any) -> Make:
    """A job on a valid scan, with keys changed."""
    scan = written("a.nii", nifti())
    return lambda folder: (config, {"dataset_dir": str(scan(folder)), "output_dir": str(folder / "out"), **more})


def keys() -> Iterator[Case]:
    """Values of keys as they arrive from the command line, a text where a number is meant and the other way round."""
    group = "keys of the configs"
    table: dict[str, list[Any]] = {
        "spatial_size": [
            "abc", 32, None, [32, 32], [32, 32, 33], [0, 0, 0], [-32, 32, 32], [32.0, 32, 32], ["32", 32, 32],
            [40000] * 3, {"x": 32},
        ],
        "spacing": ["abc", 0, -1.5, float("nan"), float("inf"), 1e-6, None, [1.5], True],
        "device": ["gpu", "cuda:99", "", 3, None, [1], "meta", "cpu:x"], "split": ["everything", 3, None, ["val"]],
        "checks": ["maybe", 1, None, True],
        "weights": ["gone.pt", 3, None, [], "/", ""],
        "dataset_dir": [
            "/gone", 3, 2024, [3], [None], ["/gone", ""], {"a": 1}, "[", "['/gone'", "~no_such_user/x", "/dev/null",
            "a\0b",
        ],
        "output_dir": [3, 2024, None, ["x"]], "max_scans": ["x", -1, 1.5, [1]], "amp": ["maybe", 2, None, "yes please"],
        "channels_last": ["maybe", 7], "save_model_space": ["maybe"],
        "num_workers": ["x", -1, 1.5, None],
    }  # fmt: skip
    for key, options in table.items():
        for value in options:
            yield Case(group, f"{key} {value!r}", "job", a_job("inference", **{key: value}), named=_named(key, value))
    more: dict[str, dict[str, list[Any]]] = {
        "encode": {
            "dtype": ["float64", 16, None], "shards": ["x", -1, 1.5, None], "overwrite": ["maybe", 3],
            "val_fraction": ["x", 2, -1, None], "test_fraction": ["1/3", 1.0], "label": ["group", 3],
        },
        "evaluate": {"baselines": [["nope"], "dct", 3, None], "peers": [3, ["model"], [["x"]]]},
    }  # fmt: skip
    for config, entries in more.items():
        for key, options in entries.items():
            for value in options:
                make = a_job(config, **{key: value})
                yield Case(group, f"{config}: {key} {value!r}", "job", make, named=_named(key, value))
    yield Case(group, "encode: weights 3", "job", a_job("encode", weights=3), named="3 is no path")
    for key, value, named in (("output_dir", "/dev/null/out", "/dev/null"), ("weights", str(ROOT), str(ROOT))):
        yield Case(group, f"{key} of a file or folder", "job", a_job("inference", **{key: value}), named=named)
    yield Case(group, "evaluate: peers that are gone", "job", a_job("evaluate", peers=["gone.pt"]), named="gone.pt")
    good = {"amp": "no", "channels_last": 0, "max_scans": 3, "checks": "skip", "label": None}
    for key, value in good.items():
        config = "encode" if key == "label" else "inference"
        yield Case(group, f"{key} {value!r}", "job", a_job(config, **{key: value}), "same")


def _named(key: str, value: Any) -> str:
    """What a refusal has to name: the value, where it is a path, or the key."""
    is_path = key in ("weights", "dataset_dir") and isinstance(value, str) and len(value) > 3 and value.isprintable()
    return value if is_path else key


GROUPS: list[Callable[[], Iterator[Case]]] = [
    truncations, flips, other_formats, dimensions, bombs, geometry, numbers, names, special_files, tables, datalists,
    bids_trees, traversals, latents, latent_folders, weights, checkpoints, keys,
]  # fmt: skip


@cache
def corpus() -> tuple[Case, ...]:
    """Every case, in the order of the groups."""
    return tuple(case for group in GROUPS for case in group())


# --- readers ---------------------------------------------------------------------------------------------------------


@cache
def preprocessing() -> Any:
    """The way into model space, as the jobs have it."""
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "encode.json"))
    parser["spacing"], parser["spatial_size"] = 4.0, [32, 32, 32]
    return parser.get_parsed_content("preprocessing")


def read_scan(path: Path, output: Path) -> Any:
    """List, check and preprocess."""
    records = check_cohort(safely_named(read_cohort(str(path))), report_dir=output)
    image = preprocessing()(dict(records[0]))["image"]
    return {"voxels": image.as_tensor(), "affine": image.affine}


def read_records(path: Path, output: Path, label: str = "") -> Any:
    """Which scans are listed; labels where they are asked for."""
    records = safely_named(read_cohort(str(path), label=label))
    return sorted((Path(record["image"]).name, record["label"]) for record in records)


def safely_named(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """The records, whose names become files of the output folder."""
    for record in records:
        assert re.fullmatch(r"[\w+][\w.+-]*", record["name"]), record["name"]
        assert len(os.fsencode(record["name"])) <= 220, record["name"]
    return records


def read_one_latent(path: Path, output: Path) -> Any:
    """List and read."""
    return read_tensor(list_latents(path)[0]["latent"])


def read_grid(path: Path, output: Path) -> Any:
    """A latent's header, and the way home that it tells."""
    grid = SourceGrid.of_header(read_header(path))
    return None if grid is None else (grid.bring_home(torch.zeros(32, 32, 32), preprocessing()), grid.image())


def read_folder(path: Path, output: Path) -> Any:
    """The latents of the training split with their names."""
    return [(latent.header["name"], latent.header["source_sha256"]) for latent in read_manifest_latents(path, "train")]


def read_scaling(path: Path, output: Path) -> Any:
    """Statistics, used in both ways."""
    statistics = read_statistics(path)
    return [LatentScaling(kind, statistics).undo(values(), LATENT[1:]) for kind in ("channel", "overall")]


def read_weights(path: Path, output: Path) -> Any:
    """Load into the tiny network."""
    return load_weights(BrainVAE(**TINY_VAE), path).state_dict()


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
    network = {"network_def#channels": [4, 8]}
    tiny = {"spatial_size": [32, 32, 32], "spacing": 4.0, "weights": str(output / "tiny.pt"), "device": "cpu"}
    workflow = ConfigWorkflow(
        config_file=str(ROOT / "configs" / f"{name}.json"), workflow_type="inference",
        logging_file=False, **{"bundle_root": str(ROOT), **tiny, **network, **more},
    )  # fmt: skip
    hook = sys.excepthook
    try:
        workflow.initialize()
        workflow.run()
    finally:
        sys.excepthook = hook
    if name == "encode":
        return read_tensor(Path(more["output_dir"], "a_latent.safetensors"))
    return torch.from_numpy(nib.load(Path(more["output_dir"], "a_recon.nii.gz")).get_fdata(dtype=np.float32))


READERS: dict[str, Callable[[Any, Path], Any]] = {
    "scan": read_scan, "cohort": read_records, "bids": read_records, "label": partial(read_records, label="group"),
    "latent": read_one_latent, "listing": lambda path, output: len(list_latents(path)), "header": read_grid,
    "folder": read_folder, "statistics": read_scaling, "weights": read_weights, "checkpoint": read_checkpoint,
    "job": read_job,
}  # fmt: skip


@cache
def undamaged(reader: str) -> Any:
    """What a reader gives of valid input."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make: dict[str, Make] = {
            "scan": written("a.nii", nifti()), "cohort": beside_scans("t.csv", "image\na.nii\nb.nii\nsub dir/c.nii\n"),
            "bids": bids,
            "label": with_participants("participant_id\tgroup\nsub-01\ta\nsub-02\tb\n"),
            "latent": written("x.npy", latent_bytes(".npy")), "listing": written("x.npy", b""), "header": latent_file(),
            "folder": latent_folder({"file": "x_latent.safetensors", **RECORD}),
            "weights": written("w.pt", torch_bytes(state())),
            "inference": a_job("inference"), "encode": a_job("encode"),
        }  # fmt: skip
        given, output = make[reader](root), root / "undamaged"
        output.mkdir()
        return READERS[reader if reader in READERS else "job"](given, output)


# --- the judge -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Memory and time for one case; what does not keep to them raises MemoryError or Timeout."""

    def stop(*_: Any) -> None:
        raise Timeout

    with open("/proc/self/statm", encoding="ascii") as statistics:
        held = int(statistics.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, previous = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (held + MOST_BYTES, before[1]))
    signal.alarm(MOST_SECONDS)
    # for code that no signal wakes up
    faulthandler.dump_traceback_later(3 * MOST_SECONDS, exit=True, file=sys.__stderr__)
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


def fault_of(message: str, named: str) -> str:
    """What is wrong with a refusal; "" where it is one clear sentence that names the file."""
    first, *table = message.splitlines() or [""]
    if re.search(r"allocat|out of memory|MemoryError", message, re.I):
        return "an allocation"
    if named not in message:
        return f"does not name {named}"
    if len(first) > 1000 or any(len(line) > 1500 for line in table):
        return "too long"
    if re.search(r"Traceback| object at 0x", message) or (table and "criterion" not in table[0]):
        return "not one sentence"
    return "" if message.rstrip()[-1:] in (".", "?") else "not a whole sentence"


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Run one case.

    Args:
        case: the case.
        folder: an empty one, for its files.

    Returns:
        `refused`, `same` or `other`, or what must not be (`unclear`, `traceback`, `memory`, `hang`, `outside`); and
        the sentence.
    """
    inputs, output, here = folder / "in", folder / "out", folder / "here"
    for place in (inputs, output, here):
        place.mkdir()
    given = case.make(inputs)
    before = sorted(os.fsencode(path) for path in inputs.rglob("*"))
    expected = None
    if case.expected == "same" or case.reader not in ("job", "statistics", "checkpoint"):
        expected = undamaged(given[0] if case.reader == "job" else case.reader)
    silent = io.StringIO()
    try:
        with contextlib.chdir(here), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), limits():
            found = READERS[case.reader](given, output)
    except Timeout:
        return "hang", f"more than {MOST_SECONDS} s"
    except Exception as error:
        return judged(error, case.named or (given.name if isinstance(given, Path) else ""))
    after = sorted(os.fsencode(path) for path in inputs.rglob("*") if "out" not in path.parts)
    if any(here.iterdir()) or (case.reader != "job" and before != after):
        return "outside", "wrote a file"
    return ("same", "") if expected is not None and is_equal(found, expected) else ("other", "")


def judged(error: BaseException, named: str) -> tuple[str, str]:
    """The outcome of an exception, by the first `InputError` in its chain, as the jobs show it."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    text = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    if any(isinstance(e, MemoryError) or re.search(r"can't allocate|Unable to allocate", str(e)) for e in chain):
        return "memory", text
    refusal = next((e for e in chain if isinstance(e, InputError)), None)
    if refusal is None:
        return "traceback", text
    fault = fault_of(str(refusal), named)
    return ("unclear", f"{fault}: {refusal}") if fault else ("refused", str(refusal))


def every_bit() -> Counter[str]:
    """Outcomes of a NIfTI-1 header with each of its bits flipped, one at a time."""
    counts: Counter[str] = Counter()
    for number in range(8 * 352):
        content = flipped(nifti(), number // 8, number % 8)
        with tempfile.TemporaryDirectory() as folder:
            counts[outcome(Case("", "", "scan", written("a.nii", content), "same"), Path(folder))[0]] += 1
    return counts


# --- the page --------------------------------------------------------------------------------------------------------


def table() -> str:
    """What docs/robustness.md says of the corpus: a line a class."""
    counts: dict[str, Counter[str]] = {}
    for case in corpus():
        counts.setdefault(case.group, Counter())[case.expected] += 1
    rows = [(group, *(count[kind] for kind in KINDS)) for group, count in counts.items()]
    rows.append(("all", *(sum(row[place] for row in rows) for place in range(1, 1 + len(KINDS)))))  # type: ignore[misc]
    lines = [f"| {group} | {sum(numbers)} | {' | '.join(map(str, numbers))} |" for group, *numbers in rows]
    return "\n".join(["| class | inputs | refused | as before | another, valid |", "|---|---|---|---|---|", *lines])


def show(*groups: str) -> None:
    """Print every case of some groups, or of all, with its outcome; `!!` where it is not what is expected."""
    for case in corpus():
        if groups and case.group not in groups:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found, said = outcome(case, Path(folder))
        mark = "  " if found == case.expected else "!!"
        print(f"{mark} {case.group} | {case.name} | {found} | {' '.join(said.split())[:300]}", flush=True)


def write() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    {"show": show, "write": write}[sys.argv[1]](*sys.argv[2:])
