"""Scans are read whole or refused before memory is taken for what their headers declare."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.transforms import misplaced_voxels, read_voxels

VOXELS = np.random.default_rng(0).integers(-500, 1000, (20, 21, 22)).astype(np.int16)
# first byte of the voxels, whether the header is refused; 352 is where NIfTI-1 begins in a single file
OFFSETS = {0.0: True, 352.0: False, 368.0: False, 2.0**26: False, 2.0**27: True, 1e30: True, np.inf: True}


def raw(kind: type = nib.Nifti1Image, **fields: Any) -> bytes:
    """A NIfTI file, uncompressed, with fields of its header changed."""
    content = kind(VOXELS, np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes()
    size = kind.header_class.sizeof_hdr
    header = kind.header_class(content[:size], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[size:]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_with_slope_and_intercept(tmp_path: Path, name: str, kind: type) -> None:
    """Stored whole numbers times slope plus intercept, as float32, compressed or not."""
    content = raw(kind, scl_slope=0.5, scl_inter=-3)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read_voxels(nib.load(path), path)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, VOXELS * np.float32(0.5) - 3)  # halves are exact


def test_voxels_of_freesurfer(tmp_path: Path) -> None:
    """MGZ has no stream to read from, and is read all the same."""
    nib.save(nib.MGHImage(VOXELS, np.eye(4)), tmp_path / "a.mgz")
    np.testing.assert_array_equal(read_voxels(nib.load(tmp_path / "a.mgz"), tmp_path / "a.mgz"), VOXELS)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_that_are_not_there(tmp_path: Path, name: str) -> None:
    """More voxels declared than the file can hold, gzip's best ratio counted, are refused before they are read."""
    content = raw(dim=[3, 2000, 2000, 2000, 1, 1, 1, 1])
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(EOFError, match="declares 16000000000 bytes"):
        read_voxels(nib.load(path), path)


def test_checksum_is_looked_at(tmp_path: Path) -> None:
    """One voxel changed in a compressed file that is stored as it is: only gzip's checksum, at its end, tells."""
    content = bytearray(gzip.compress(raw(), compresslevel=0))
    content[len(content) // 2] ^= 1
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        read_voxels(nib.load(path), path)


def test_what_lies_behind_the_voxels(tmp_path: Path) -> None:
    """64 MB may follow them; a compressed file that goes on is not unpacked to its end."""
    path = tmp_path / "a.nii.gz"
    megabytes = gzip.compress(bytes(1 << 25), compresslevel=1)  # 32 MB of zeros
    for n_members, is_refused in ((2, False), (3, True)):
        path.write_bytes(gzip.compress(raw()) + n_members * megabytes)
        if is_refused:
            with pytest.raises(EOFError, match="goes on"):
                read_voxels(nib.load(path), path)
        else:
            np.testing.assert_array_equal(read_voxels(nib.load(path), path), VOXELS)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_where_voxels_begin(tmp_path: Path, name: str) -> None:
    """Inside the header or behind 64 MB, which opening the file would read, is damage."""
    path = tmp_path / name
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for offset, is_refused in OFFSETS.items():
            if kind is nib.Nifti2Image and offset > 2**62:
                continue  # its field holds whole numbers
            content = raw(kind, vox_offset=offset)
            path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
            assert bool(misplaced_voxels(path)) == is_refused, (kind, offset)
    (tmp_path / "text.nii").write_text("hello")
    assert misplaced_voxels(tmp_path / "text.nii") == ""
