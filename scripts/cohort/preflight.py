"""The check before any work starts: every scan of a cohort against a list of named criteria.

Training, evaluation, encoding and inference call `check_cohort` with the cohort's records. A criterion
is a name and a function that says nothing, or what is wrong and what to do; the header's come first, so that no voxel
is read of a file that cannot be a T1w scan. Files that passed are known by size and time, so a second check is instant.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.spatialimages import SpatialImage
from tqdm import tqdm

from scripts.conventions import MOST_VOXELS, PERCENTILE, SPACING_RANGE_MM
from scripts.run import InputError, folder_named, replacing
from scripts.transforms import misplaced_voxels, read_voxels

__all__ = ["DATA_CRITERIA", "HEADER_CRITERIA", "check_cohort", "check_scan"]

CRITERIA_VERSION = 2  # a change of any criterion that concerns the file needs a new one: it voids what is remembered
MOST_GAP_MM = 1.0  # between where sform and qform put a corner, where they have to agree
FIELD_OF_VIEW_MM = (80.0, 600.0)  # what is larger grows beyond memory when it is resampled


def check_cohort(
    records: Sequence[dict[str, str]], checks: str = "stop", label_required: bool = False, report_dir: str | Path = ""
) -> list[dict[str, str]]:
    """Check every scan of a cohort and print how many are good.

    Records of one cohort with the same subject, session and file name (less the suffix) are one scan listed twice;
    the first counts as good. Labels and duplicates are looked at every time, files that passed not again.

    Args:
        records: from `scripts.cohort.read_cohort`.
        checks: `stop` raises an error if any scan is bad; `skip` prints the table and goes on with the good ones.
        label_required: whether a record without a label is bad.
        report_dir: folder of `preflight.json`, which remembers the files that passed (hash of the path, size, time);
            "" for `brain_t1_vae` in the user's cache folder (XDG_CACHE_HOME or ~/.cache).

    Returns:
        The good records in their order.

    Raises:
        InputError: `checks` is neither of the two; a scan is bad under `stop`; or no good scan is left.
    """
    if checks not in ("stop", "skip"):
        raise InputError(f"checks is {checks!r}; give 'stop' or 'skip'.")
    if not records:
        raise InputError("There is no scan to check; check dataset_dir and split.")
    cache_file = _cache_file(report_dir)
    known = _read_cache(cache_file)
    passed: dict[str, list[int]] = {}
    good: list[dict[str, str]] = []
    bad: list[tuple[str, str, str]] = []
    listed: dict[tuple[str, ...], str] = {}
    quiet = len(records) < 20 or not sys.stderr.isatty()  # few are checked before a bar can be read
    for record in tqdm(records, desc="pre-flight check", unit="scan", disable=quiet):
        problem = _check_record(record, label_required, listed)
        if not problem:
            key, entry = _fingerprint(record["image"])
            problem = None if entry and known.get(key) == entry else check_scan(record["image"])
            passed |= {} if problem else {key: entry}
        if problem:
            bad.append((record["image"], *problem))
        else:
            good.append(record)
    if (n_known := sum(known.get(key) == entry for key, entry in passed.items())) < len(passed):
        _write_cache(cache_file, known | passed)
    if bad and (checks == "stop" or not good):
        remedy = "Correct or remove them, or set checks to 'skip' to go on without them." if good else "None is left."
        raise InputError(f"{len(bad)} of {len(records)} scans fail the pre-flight check. {remedy}\n{_table(bad)}")
    print(f"pre-flight check: {len(records)} scans, {len(good)} good ({n_known} known from an earlier run)")
    if bad:
        print(f"{len(bad)} left out:\n{_table(bad)}")
    return good


def check_scan(path: str | Path) -> tuple[str, str] | None:
    """Check one file; None if it is good, else the first criterion it fails, and what is wrong and what to do.

    Memory: the voxels as stored and once as float32, then twice as float32 for the percentile.
    """
    if reason := _exists(str(path)):
        return "exists", reason
    try:
        if reason := misplaced_voxels(path):
            return "opens", reason
        image = nib.load(path)
        if not isinstance(image, SpatialImage):
            return "opens", f"is a {type(image).__name__}, not a volume; give a NIfTI or MGH scan."
        for name, criterion in HEADER_CRITERIA.items():
            if reason := criterion(image):
                return name, reason
        data = read_voxels(image, path)
    except Exception as error:  # a damaged file makes a reader raise nearly anything
        return "opens", _why_unreadable(str(path), error)
    for name, data_criterion in DATA_CRITERIA.items():
        if reason := data_criterion(data):
            return name, reason
    return None


def _one_volume(image: SpatialImage) -> str:
    shape = _by(image.shape)
    if len(image.shape) == 4 and image.shape[3] == 1:  # MONAI would take it, but not give the same shape back
        return f"has 4 dimensions ({shape}), the last of size 1; drop it with nibabel.squeeze_image."
    if len(image.shape) > 3:
        return f"has {len(image.shape)} dimensions ({shape}); a T1w scan has 3. Is it a functional run?"
    if len(image.shape) < 3 or min(image.shape) < 2:
        return f"has the shape {shape}, which is not a volume; a T1w scan has 3 dimensions. Is it a single slice?"
    return ""


def _size(image: SpatialImage) -> str:
    fault = f"declares {_by(image.shape)} voxels, more than 600 cubed; its header is damaged: convert it again."
    return fault if math.prod(int(n) for n in image.shape) > MOST_VOXELS else ""


def _numeric(image: SpatialImage) -> str:
    dtype = image.get_data_dtype()
    kind = {"c": "complex", "V": "colour (RGB)"}.get(dtype.kind, str(dtype))
    fault = f"holds {kind} values; a T1w scan has one real number a voxel. Export the magnitude image."
    return "" if dtype.kind in "iuf" else fault


def _affine(image: SpatialImage) -> str:
    matrix = np.asarray(image.affine, dtype=float)
    is_finite = np.isfinite(matrix).all()
    # the volume is compared to that of a box of the same edges, so that small voxels do not pass for a singular matrix
    if is_finite and abs(np.linalg.det(matrix[:3, :3])) > 1e-6 * voxel_sizes(matrix).prod():
        return ""
    fault = "that cannot be inverted" if is_finite else "with NaN or infinite entries"
    return f"has an affine {fault}; convert the scan again from DICOM, or correct its sform and qform."


def _one_place(image: SpatialImage) -> str:
    """MONAI's reader takes the qform where the sform does not fit the voxel sizes, nibabel and others the sform."""
    header: Any = image.header
    if not isinstance(header, nib.Nifti1Header) or not header["sform_code"]:
        return ""
    zooms = np.asarray(header.get_zooms()[:3], dtype=float)
    if not np.isfinite(zooms).all() or np.allclose(voxel_sizes(image.affine), zooms):
        return ""
    corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(image.shape) - 1)
    gap = np.abs(apply_affine(image.affine - header.get_qform(), corners)).max()
    sform, pixdim = (_by(spacing.round(6)) for spacing in (voxel_sizes(image.affine), zooms))
    fault = f"has a sform with voxels of {sform} mm and a qform, {gap:.3g} mm off, with voxels of {pixdim} mm"
    return f"{fault}; make them agree, or convert the scan again from DICOM." if gap > MOST_GAP_MM else ""


def _spacing(image: SpatialImage) -> str:
    low, high = SPACING_RANGE_MM
    spacing = voxel_sizes(image.affine)
    fault = f"has voxels of {_by(spacing.round(3))} mm; {low:g} to {high:g} mm are expected on each axis."
    is_good = (spacing >= low - 1e-4).all() and (spacing <= high + 1e-4).all()  # float32 headers round
    return "" if is_good else f"{fault} Thick 2D slices do not fit; else check that the header is in mm."


def _field_of_view(image: SpatialImage) -> str:
    low, high = FIELD_OF_VIEW_MM
    field = voxel_sizes(image.affine) * np.array(image.shape, dtype=float)
    if (field > high).any():
        return f"covers {_by(field.round())} mm; a head fits into {high:g} mm on each axis. Is its header in mm?"
    fault = f"covers {_by(field.round())} mm; a head needs {low:g} mm on each axis. Is it a slab?"
    return "" if (field >= low - 1e-2).all() else fault


def _finite(data: np.ndarray) -> str:
    n_bad = data.size - np.count_nonzero(np.isfinite(data))
    return f"has {n_bad} voxels that are NaN or infinite in float32; set them to 0." if n_bad else ""


def _not_empty(data: np.ndarray) -> str:
    return "" if data.any() else "has no voxel other than zero; export it again."


def _not_constant(data: np.ndarray) -> str:
    first = data.flat[0]
    return f"has the value {first:g} in every voxel; export it again." if (data == first).all() else ""


def _bright(data: np.ndarray) -> str:
    level = float(np.percentile(data, PERCENTILE))
    fault = f"has a {PERCENTILE}th percentile of {level:g}; intensities are divided by it, so it must be above zero."
    return "" if level > 0 else f"{fault} Is it a mask, a difference image, or mostly empty?"


HEADER_CRITERIA: dict[str, Callable[[SpatialImage], str]] = {
    "one volume": _one_volume,
    "size": _size,
    "real numbers": _numeric,
    "affine": _affine,
    "one place": _one_place,
    "spacing": _spacing,
    "field of view": _field_of_view,
}
DATA_CRITERIA: dict[str, Callable[[np.ndarray], str]] = {
    "finite": _finite,
    "not empty": _not_empty,
    "not constant": _not_constant,
    "bright": _bright,
}


def _by(numbers: Iterable[float]) -> str:
    return " x ".join(f"{number:.10g}" for number in numbers)


def _check_record(
    record: Mapping[str, str], label_required: bool, listed: dict[tuple[str, ...], str]
) -> tuple[str, str] | None:
    if label_required and not record["label"]:
        return "label", "has no label; fill it in in the cohort's table, or set checks to 'skip'."
    stem = Path(Path(record["image"]).name.removesuffix(".gz")).stem
    key = (record["cohort"], record["subject"], record["session"], stem)
    if record["subject"] and key in listed:
        remedy = "remove one, or tell them apart by ses-<id> folders or a CSV with a column 'session'."
        return "unique", f"has the subject, session and file name of {listed[key]}; {remedy}"
    listed[key] = record["image"]
    return None


def _exists(path: str) -> str:
    if os.path.isfile(path):
        return ""
    if os.path.isdir(path):
        return "is a folder; give a file, and convert DICOM with dcm2niix first."
    if os.path.exists(path):
        return "is a pipe, socket or device, not a file; copy its content into a file."
    if os.path.islink(path):
        return "is a link to a file that is not here; fetch it (datalad get, git annex get)."
    return "does not exist; check the path."


def _why_unreadable(path: str, error: Exception) -> str:
    if not os.access(path, os.R_OK):
        return "cannot be read; check its permissions."
    try:
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError as fault:
        return f"cannot be read ({fault.strerror}); check the disk or the network drive, or copy it again."
    if not head:
        return "is empty (0 bytes); copy or export it again."
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not a scan: the download failed; download it again."
    if head.startswith((b"version https://git-lfs", b"/annex/objects")):
        return "is a placeholder of git-lfs or git-annex; fetch its content (git lfs pull, datalad get)."
    if path.lower().endswith((".gz", ".mgz")) and not head.startswith(b"\x1f\x8b"):
        return "is not compressed, though its suffix says so; rename it (.nii, .mgh), or download it again."
    detail = " ".join(str(error).replace(path, "the file").split())[:120]
    return f"cannot be read to its end ({type(error).__name__}: {detail}); copy, download or convert it again."


def _table(bad: Sequence[tuple[str, str, str]]) -> str:
    rows = [("file", "criterion", "what is wrong and what to do"), *bad]
    wide, narrow = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"  {file:<{wide}}  {criterion:<{narrow}}  {reason}" for file, criterion, reason in rows)


def _fingerprint(path: str) -> tuple[str, list[int]]:
    """Give the cache's key, which does not tell the path, and size and time of change; [] where there is no file."""
    key = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    status = os.stat(path) if os.path.isfile(path) else None
    return key, [status.st_size, status.st_mtime_ns] if status else []


def _cache_file(report_dir: str | Path) -> Path:
    if report_dir != "":
        return folder_named(report_dir) / "preflight.json"
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache"), tempfile.gettempdir()
    return Path(next(filter(os.path.isabs, places)), "brain_t1_vae", "preflight.json")


def _read_cache(path: Path) -> dict[str, list[int]]:
    # a cache that is missing or damaged costs time, never an error
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(content["passed"]) if content["version"] == CRITERIA_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_cache(path: Path, passed: Mapping[str, list[int]]) -> None:
    # Where it cannot be written, read-only or full, the next run checks again.
    with suppress(InputError, OSError), replacing(path) as temporary:
        temporary.write_text(json.dumps({"version": CRITERIA_VERSION, "passed": passed}), encoding="utf-8")
