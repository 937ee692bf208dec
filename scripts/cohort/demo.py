"""A small cohort of made-up T1w brains, so that every job runs before anybody has found their own data.

The configs use it where `dataset_dir` is empty, and so do tests and docs. Nilearn ships the ICBM 152
tissue maps in its wheel, so nothing is downloaded; each subject is these maps seen through a smooth random
deformation, with folding, tissue contrast, bias field and noise of its own. Half of the scans are brain-extracted,
half are whole heads whose skull, face and neck are drawn from simple solids. Patients have larger ventricles and
wider sulci than controls, so that a label means something visible.

    from scripts.cohort.demo import demo_cohort
    root = demo_cohort()    # a BIDS root; seconds the first time, instant afterwards
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from scripts.cohort.demo_anatomy import TemplateMap, Templates, load_templates
from scripts.run import InputError, replacing

__all__ = ["N_SUBJECTS", "demo_cohort", "demo_scan", "participants"]

N_SUBJECTS = 24
VERSION = "demo-v1"  # part of the folder's name: a change of any voxel needs a new one
SEED = 152
POWER = 2.3  # sharpens the template's shares of tissue
STRIDE = 4  # voxels between the points at which smooth fields are computed
LICENCE = (
    "Derived from nilearn's MNI152 template (ICBM 152 nonlinear atlases, 2009). Copyright (C) 1993-2004 Louis Collins, "
    "McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, "
    "modify and distribute for any purpose and without fee is granted, provided that this copyright notice appears in "
    "all copies; provided as is, without any warranty. Cite Fonov et al., NeuroImage 54(1), 2011, 313-327."
)


def demo_cohort(n_subjects: int = N_SUBJECTS, folder: str | Path = "") -> Path:
    """Make what is missing of the demo cohort and return its BIDS root.

    Subject k is the same file, byte for byte, whatever `n_subjects` is. The tables always describe all 24 subjects,
    made or not; the root may hold more scans than asked for, from an earlier call.

    Args:
        n_subjects: how many scans to have, 1 to 24; each group and each kind of scan is in the first four.
        folder: where; empty means `brain_t1_vae/demo-v1` in the user's cache (XDG_CACHE_HOME or ~/.cache), or in the
            temporary folder where that cannot be written.

    Returns:
        The BIDS root: participants.tsv (participant_id, age, sex, group) and sub-*/anat/sub-*_T1w.nii.gz.

    Raises:
        InputError: `n_subjects` is out of range, or the folder cannot be written or holds another data set.
    """
    if not 1 <= n_subjects <= N_SUBJECTS:
        raise InputError(f"n_subjects is {n_subjects}; the demo cohort has 1 to {N_SUBJECTS} subjects.")
    for root in [Path(folder)] if folder else _default_folders():
        try:
            _make_missing(root, n_subjects)
        except (OSError, InputError) as error:
            reason = error.__cause__ or error
            failure = InputError(f"The demo cohort cannot be made in {root} ({reason}); give it another folder.")
        else:
            return root
    raise failure


def participants() -> list[dict[str, str]]:
    """Table of all 24 subjects: participant_id, age (years), sex (F or M), group (control or patient)."""
    rows = []
    for number in range(1, N_SUBJECTS + 1):
        age = np.random.default_rng([SEED, number, 0]).integers(22, 79)
        sex = "FM"[(number - 1) // 4 % 2]
        group = "control" if number % 2 else "patient"
        rows.append({"participant_id": f"sub-{number:02d}", "age": str(age), "sex": sex, "group": group})
    return rows


def demo_scan(number: int, templates: Templates) -> nib.Nifti1Image:
    """Make the scan of one subject.

    Args:
        number: 1 to 24; odd ones are controls; of every four the first two are brain-extracted, the others whole heads.
        templates: from `scripts.cohort.demo_anatomy.load_templates`.

    Returns:
        int16 image of about 1.5 mm, RAS or LAS, in arbitrary scanner units; extracted scans are zero outside the brain.
    """
    if not 1 <= number <= N_SUBJECTS:
        raise ValueError(f"number must be 1 to {N_SUBJECTS}, got {number}")
    rng = np.random.default_rng([SEED, number, 1])
    person = participants()[number - 1]
    patient = float(person["group"] == "patient")
    old = (int(person["age"]) - 50) / 28  # -1 to 1
    whole_head = (number - 1) // 2 % 2 == 1

    spacing = float(rng.choice([1.4, 1.5, 1.5, 1.6]))
    extent, centre = ((188, 240, 232), (0, -4, -13)) if whole_head else ((168, 206, 178), (0, -17, 4))  # mm
    grid = _Grid(tuple(int(length / spacing) for length in extent), spacing, centre)
    ventricle_growth = 1.5 + 1.2 * old + 4.5 * patient + rng.normal(0, 0.5)  # mm
    points = grid.upsample(_deform(grid, rng, templates.pull, ventricle_growth))
    mask = templates.mask.sample(points)
    atrophy = 0.1 + 0.3 * old + 0.8 * patient + rng.normal(0, 0.15)  # log odds of CSF
    brain, tissue = _draw_brain(grid, rng, templates, points, mask > 0, atrophy)

    signal = mask * brain + (1 - mask) * templates.head.sample(points) if whole_head else brain
    signal = signal * np.exp(0.1 * grid.upsample(grid.field(rng, 90)))  # bias field
    noise = rng.standard_normal((2, *grid.shape), np.float32) * np.float32(rng.uniform(0.018, 0.032))
    scan = np.hypot(signal + noise[0], noise[1])  # Rician: the magnitude of a complex signal
    if not whole_head:
        # A brain extraction keeps narrow sulci and drops wide CSF; the filling keeps the ventricles.
        parts, _ = ndimage.label((ndimage.gaussian_filter(tissue, 3 / spacing) > 0.4) & (mask > 0.5))
        scan *= ndimage.binary_fill_holes(parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]))
    units = rng.uniform(60, 120) if whole_head else rng.uniform(250, 900)  # of white matter
    return grid.image(np.rint(scan * units).astype(np.int16), left_first=number % 3 != 0)


@dataclass(frozen=True)
class _Grid:
    """The scanner's grid: shape, spacing (mm) and the world point at its centre. What is smooth is computed at every
    fourth voxel (`coarse`) and upsampled."""

    shape: tuple[int, ...]
    spacing: float
    centre: tuple[float, float, float]

    @property
    def coarse(self) -> tuple[int, ...]:
        return tuple((size - 1) // STRIDE + 2 for size in self.shape)

    @property
    def origin(self) -> np.ndarray:
        return np.array(self.centre) - (np.array(self.shape) - 1) / 2 * self.spacing

    def field(self, rng: np.random.Generator, wavelength: float) -> np.ndarray:
        """Smooth random field at the coarse points, about -2 to 2: a spline through normals `wavelength` mm apart."""
        length = np.array(self.coarse) * STRIDE * self.spacing
        knots = rng.standard_normal(np.ceil(length / wavelength).astype(int) + 2, np.float32)
        return ndimage.zoom(knots, np.array(self.coarse) / knots.shape, order=3)

    def upsample(self, values: np.ndarray) -> np.ndarray:
        """Linear, from (..., coarse) to (..., shape); float32."""
        for axis, size in zip((-3, -2, -1), self.shape, strict=True):
            low, rest = np.divmod(np.arange(size), STRIDE)
            share = (rest / np.float32(STRIDE)).astype(np.float32).reshape((-1,) + (1,) * (-1 - axis))
            values = values.take(low, axis) * (1 - share) + values.take(low + 1, axis) * share
        return values

    def image(self, scan: np.ndarray, left_first: bool) -> nib.Nifti1Image:
        """NIfTI of a scan (x to R, y to A, z to S), stored as RAS (left first) or LAS."""
        affine = np.diag([self.spacing] * 3 + [1.0])
        affine[:3, 3] = self.origin
        if not left_first:
            affine[0, 0], affine[0, 3] = -self.spacing, self.origin[0] + (self.shape[0] - 1) * self.spacing
            scan = scan[::-1]
        image = nib.Nifti1Image(scan, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        return image


def _deform(
    grid: _Grid, rng: np.random.Generator, pull: tuple[TemplateMap, ...], ventricle_growth: float
) -> np.ndarray:
    """Template points (3, coarse) that the coarse points show: one subject's size, pose, shape and ventricles."""
    axes = [start + STRIDE * grid.spacing * np.arange(n) for start, n in zip(grid.origin, grid.coarse, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
    rotation = Rotation.from_euler("xyz", rng.normal(0, (5, 2, 2)), degrees=True)
    # The template is larger than the average brain; a subject measures 0.86 to 1 of it, each axis a little apart.
    size = np.clip(rng.normal(0.93, 0.03), 0.86, 1) * np.clip(rng.normal(1, 0.015, 3), 0.97, 1.03)
    turn = rotation.as_matrix() / size
    pivot = np.array([0, -17, 4])[:, None, None, None]
    points = np.einsum("ij,jxyz->ixyz", turn, points - pivot - rng.normal(0, 1.5, (3, 1, 1, 1))) + pivot
    points += 3.0 * np.stack([grid.field(rng, 45) for _ in range(3)])  # mm: lobes
    points += 1.3 * np.stack([grid.field(rng, 18) for _ in range(3)])  # mm: gyri
    return (points + ventricle_growth * np.stack([slope.sample(points) for slope in pull])).astype(np.float32)


def _draw_brain(
    grid: _Grid, rng: np.random.Generator, templates: Templates, points: np.ndarray, mask: np.ndarray, atrophy: float
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of the brain (white matter 1) and share of grey and white matter, both zero outside of the mask.

    The template is an average, so its sulci are blurred: a power of the shares sharpens them, and a random field in the
    log odds of CSF opens and closes them differently in each subject.
    """
    box = ndimage.find_objects(mask.astype(np.int8))[0]
    gm = np.clip(templates.gm.sample(points[(slice(None), *box)]), 0, 1)
    wm = np.clip(templates.wm.sample(points[(slice(None), *box)]), 0, 1)
    csf = np.clip(1 - gm - wm, 0, 1) ** POWER * np.exp(atrophy + 0.8 * grid.upsample(grid.field(rng, 10))[box])
    gm, wm = gm**POWER, wm**POWER
    total = csf + gm + wm + 1e-6
    brightness, tissue = np.zeros((2, *grid.shape), np.float32)
    tissue[box] = (gm + wm) / total * mask[box]
    brightness[box] = (rng.uniform(0.12, 0.2) * csf + rng.uniform(0.6, 0.7) * gm + wm) / total * mask[box]
    return brightness, tissue


def _tables() -> dict[str, str]:
    """Name and text of the files beside the scans."""
    rows = participants()
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    columns = {
        "age": {"Description": "made up", "Units": "years"},
        "sex": {"Description": "made up", "Levels": {"F": "female", "M": "male"}},
        "group": {
            "Description": "decides the anatomy",
            "Levels": {"control": "average ventricles and sulci", "patient": "large ventricles, wide sulci"},
        },
    }
    about = {
        "Name": "Demo cohort of brain_t1_vae: 24 made-up T1w scans",
        "BIDSVersion": "1.8.0",
        "DatasetType": "derivative",
        "License": LICENCE,
        "GeneratedBy": [{"Name": "brain_t1_vae scripts/demo.py", "Version": VERSION}],
        "SourceDatasets": [{"URL": "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"}],
    }
    return {
        "dataset_description.json": json.dumps(about, indent=2) + "\n",
        "participants.json": json.dumps(columns, indent=2) + "\n",
        "participants.tsv": "\n".join(lines) + "\n",
    }


def _make_missing(root: Path, n_subjects: int) -> None:
    """Write the tables and scans that are not there yet, each whole or not at all."""
    for name, text in _tables().items():
        path = root / name
        if not path.is_file():
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
        elif path.read_text(encoding="utf-8") != text:
            raise InputError(f"{name} there is another data set's")
    names = {number: f"sub-{number:02d}/anat/sub-{number:02d}_T1w.nii.gz" for number in range(1, n_subjects + 1)}
    missing = {number: root / name for number, name in names.items() if not (root / name).is_file()}
    if missing:
        templates = load_templates()
        for number, path in tqdm(missing.items(), desc="Making the demo cohort", unit="scan", disable=None):
            content = demo_scan(number, templates).to_bytes()
            with replacing(path) as temporary:
                temporary.write_bytes(gzip.compress(content, compresslevel=4, mtime=0))


def _default_folders() -> list[Path]:
    """The user's cache, then a folder of the user's own among the temporary ones."""
    caches = [Path(os.environ.get("XDG_CACHE_HOME", "")), Path(os.path.expanduser("~")) / ".cache"]
    temporary = Path(tempfile.gettempdir())
    cache = next((path for path in caches if path.is_absolute()), temporary)
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [cache / "brain_t1_vae" / VERSION, temporary / f"brain_t1_vae-{user}" / VERSION]
