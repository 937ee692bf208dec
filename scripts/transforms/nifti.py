"""NIfTI files at both ends: read whole or refused, written on the grid of another image.

The pre-flight check and latents from elsewhere read by it, every job that writes volumes writes by it.
"""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import SerializableImage
from nibabel.spatialimages import SpatialImage

from scripts.run import replacing

__all__ = ["misplaced_voxels", "plain_volume", "read_voxels", "write_nifti"]

MOST_BYTES_BESIDE = 1 << 26  # of extensions before the voxels, and of anything behind them
DEFLATE_LIMIT = 1032  # no gzip file unpacks to more than this times its size (zlib's technical details)


def _is_compressed(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def misplaced_voxels(path: str | Path) -> str:
    """Say what is wrong if a NIfTI file's voxels begin inside its header, or so late that opening it fills memory.

    nibabel reads all extensions before the voxels when it opens a file, and takes 0 for the first byte of the header.
    """
    with gzip.open(path) if _is_compressed(path) else open(path, "rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
    for kind in (nib.Nifti1Header, nib.Nifti2Header):
        if len(start) >= kind.sizeof_hdr and kind.may_contain_header(start):
            offset = float(kind(start[: kind.sizeof_hdr], check=False)["vox_offset"])
            if offset > MOST_BYTES_BESIDE or (offset == 0 and kind(start[: kind.sizeof_hdr], check=False).is_single):
                return f"says that its voxels begin after {offset:.4g} bytes; its header is damaged: convert it again."
    return ""


def read_voxels(image: SpatialImage, path: str | Path) -> np.ndarray:
    """Read all voxels as float32, and a compressed file to its end, where its checksum stands."""
    is_compressed = _is_compressed(path)
    declared = math.prod(int(n) for n in image.shape) * image.get_data_dtype().itemsize
    if os.path.getsize(path) * (DEFLATE_LIMIT if is_compressed else 1) < declared:  # before memory is taken for it
        raise EOFError(f"its header declares {declared} bytes of voxels")
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite and is reported
        if not is_compressed or not isinstance(image, SerializableImage):
            return np.asarray(image.dataobj, dtype=np.float32)
        with gzip.open(path) as stream:
            data = np.asarray(type(image).from_stream(stream).dataobj, dtype=np.float32)
            n_behind = 0
            while chunk := stream.read(1 << 20):
                n_behind += len(chunk)
                if n_behind > MOST_BYTES_BESIDE:
                    raise EOFError("it goes on long after the voxels that its header declares")
    return data


def write_nifti(volume: np.ndarray, source: nib.spatialimages.SpatialImage, path: str | Path) -> None:
    """Write a volume on the grid of another image: same shape, affine and units, float32.

    sform and qform are equal with code 1, or the source's code 4 (MNI) where both of its codes say so: viewers
    disagree on files in which the two differ.

    Args:
        volume: (D, H, W), in the source's axes.
        source: the image (NIfTI or MGH) whose grid it is.
        path: the file to write, .nii or .nii.gz.
    """
    image = nib.Nifti1Image(np.asarray(volume, dtype=np.float32), source.affine)
    codes, units = {1}, ("mm", "sec")
    if isinstance(source.header, nib.Nifti1Header):
        codes = {int(source.header["sform_code"]), int(source.header["qform_code"])}
        units = source.header.get_xyzt_units()
    code = 4 if codes == {4} else 1
    image.set_sform(source.affine, code)
    image.set_qform(source.affine, code)
    image.header.set_xyzt_units(*units)
    with replacing(path) as temporary:
        nib.save(image, temporary)


def plain_volume(volume: torch.Tensor) -> torch.Tensor:
    """The volume as a plain float32 tensor, without a graph and without MetaTensor's bookkeeping."""
    return volume.detach().as_subclass(torch.Tensor).float()
