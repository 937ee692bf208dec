"""Scans are read whole or refused before memory is taken for what their headers declare."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.transforms import read_voxels

VOXELS = np.random.default_rng(0).integers(-500, 1000, (20, 21, 22)).astype(np.int16)


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
    nib.save(nib.MGHImage(VOXELS, np.eye(4)), tmp_path / "a.mgz")  # which has no stream to read from
    np.testing.assert_array_equal(read_voxels(nib.load(tmp_path / "a.mgz"), tmp_path / "a.mgz"), VOXELS)
