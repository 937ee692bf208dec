"""MONAI Deploy: what its bundle operator wants of `model.ts`, and the example application in its own environment.

The slow tests run the application; MONAI_DEPLOY_ENV names the folder of its environment (docs/deploy.md).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_JOB, RunBundle, head
from monai.bundle import ConfigParser
from monai.transforms import LoadImage, MapTransform
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat

from scripts.export import torchscript
from scripts.networks import load_torchscript

ENVIRONMENT = os.environ.get("MONAI_DEPLOY_ENV", "")
SHAPE = (42, 45, 39)  # larger than the tiny model space, so that a part of the scan lies outside
OBLIQUE = from_matvec(euler2mat(0.2, 0.1, -0.3) @ np.diag([-3.5, -3.7, 3.1]), [90, 110, -90])
SLOPE = 0.37  # as scanners of one maker have it: no whole numbers
# Run by the other environment, which has pydicom: a series of the voxels in `volume.npz`, its files in no order.
WRITE_SERIES = """
import sys
from pathlib import Path
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

folder, slope = Path(sys.argv[1]), sys.argv[2]
arrays = np.load(folder.parent / "volume.npz")
volume, lps = arrays["volume"], np.diag([-1, -1, 1, 1]) @ arrays["affine"]
spacing = np.linalg.norm(lps[:3, :3], axis=0)
study, series = generate_uid(), generate_uid()
for z in range(volume.shape[2]):
    pixels = np.ascontiguousarray(volume[:, :, z].T, np.int16)
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = MRImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.StudyInstanceUID, header.SeriesInstanceUID, header.Modality = study, series, "MR"
    header.SeriesDescription, header.InstanceNumber, header.PatientPosition = "T1w", z + 1, "HFS"
    header.ImagePositionPatient = [float(f"{x:.10g}") for x in (lps @ [0, 0, z, 1])[:3]]
    header.ImageOrientationPatient = [float(f"{x:.10g}") for x in (lps[:3, :2] / spacing[:2]).T.ravel()]
    header.PixelSpacing = [float(f"{x:.10g}") for x in spacing[1::-1]]
    header.Rows, header.Columns = pixels.shape
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
    header.PixelRepresentation, header.SamplesPerPixel, header.PhotometricInterpretation = 1, 1, "MONOCHROME2"
    header.RescaleSlope, header.RescaleIntercept, header.PixelData = slope, "0", pixels.tobytes()
    header.save_as(folder / f"{(z * 7) % volume.shape[2]:03d}.dcm", enforce_file_format=True)
"""


def in_its_environment(test: Callable[..., None]) -> Callable[..., None]:
    """Marks of what needs it."""
    reason = "MONAI_DEPLOY_ENV names no environment with docs/deploy/requirements.txt"
    return pytest.mark.slow(pytest.mark.skipif(not ENVIRONMENT, reason=reason)(test))


@pytest.fixture(scope="module")
def model(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.ts` of the tiny network, exported with a config that stands for `configs/inference.json`."""
    folder = tmp_path_factory.mktemp("deploy")
    config = json.loads((ROOT / "configs" / "inference.json").read_text())
    config["network_def"] |= {"channels": [4, 8]}
    (folder / "inference.json").write_text(json.dumps(config | {"spatial_size": [32, 36, 32], "spacing": 4.0}))
    torchscript(str(weights), str(folder), "whole", str(folder / "inference.json"))
    return folder / "model.ts"


def write(path: Path, volume: np.ndarray) -> Path:
    """An oblique scan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.fixture
def reconstruct(run_bundle: RunBundle, weights: Path, tmp_path: Path) -> Callable[[Path], Any]:
    """A scan's reconstruction by configs/inference.json, in the memory layout of a TorchScript file."""

    def run(scan: Path) -> Any:
        run_bundle(
            "--config_file", "configs/inference.json", "--dataset_dir", str(scan), "--output_dir",
            str(tmp_path / "bundle"), "--weights", str(weights), "--channels_last", "False", *TINY_JOB,
        )  # fmt: skip
        return nib.load(tmp_path / "bundle" / "scan_recon.nii.gz")

    return run


def test_the_operators_steps_give_what_the_bundle_gives(
    model: Path, reconstruct: Callable[[Path], Any], tmp_path: Path
) -> None:
    """What SDK and application do with the config in the file, in a few lines without the SDK: map transforms of which
    the first loads and none writes."""
    with zipfile.ZipFile(model) as file:
        archive = ConfigParser(json.loads(file.read("model/extra/inference.json")))
    preprocessing, postprocessing = (archive.get_parsed_content(f"{name}processing") for name in ("pre", "post"))
    steps = [*preprocessing.transforms, *postprocessing.transforms]
    assert all(isinstance(step, MapTransform) for step in steps)
    assert not [step for step in steps if "SaveImage" in type(step).__name__]
    preprocessing.transforms = tuple(preprocessing.transforms[1:])
    scan = write(tmp_path / "scan.nii.gz", head(1, SHAPE))
    image = LoadImage("NibabelReader", image_only=True, ensure_channel_first=True)(scan)
    prepared = preprocessing({"image": image})["image"]
    with torch.no_grad():
        pred = archive.get_parsed_content("inferer")(inputs=prepared[None], network=load_torchscript(model))[0]
    recon = postprocessing({"image": prepared, "pred": pred})["pred"]
    np.testing.assert_array_equal(recon[0].numpy(), np.asarray(reconstruct(scan).dataobj))


def start(scan: Path, output: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """The application, by the command of docs/deploy.md."""
    command = [f"{ENVIRONMENT}/bin/python", "docs/deploy/app.py", "-i", str(scan), "-o", str(output), "-m", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
    output.mkdir()
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def series(folder: Path, volume: np.ndarray, slope: float = 1.0) -> Path:
    """A DICOM series of a volume."""
    folder.mkdir(parents=True)
    np.savez(folder.parent / "volume.npz", volume=volume, affine=OBLIQUE)
    program = [f"{ENVIRONMENT}/bin/python", "-c", WRITE_SERIES, str(folder), str(slope)]
    subprocess.run(program, check=True, capture_output=True)
    return folder


@in_its_environment
@pytest.mark.parametrize("kind", ["file", "folder", "dicom"])
def test_the_application_gives_what_the_bundle_gives(
    model: Path, reconstruct: Callable[[Path], Any], tmp_path: Path, kind: str
) -> None:
    """The same floats and header, from a file of whole numbers, from a folder that holds one of fractions, and from a
    DICOM series: oblique, oblong pixels, fractions, an empty first slice, each of which the SDK alone gets wrong."""
    volume = head(3, SHAPE)
    volume[:, :, 0] = 0
    stored = volume if kind == "file" else (SLOPE * volume).astype(np.float32)
    scan = write(tmp_path / "in" / "scan.nii.gz", stored)
    given = {"file": scan, "folder": scan.parent}.get(kind) or series(tmp_path / "dicom", volume, SLOPE)
    done = start(given, tmp_path / "out", model)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "out").iterdir()
    recon, expected = nib.load(file), reconstruct(scan)
    assert recon.get_data_dtype() == np.float32 and np.asarray(recon.dataobj).std() > 10
    if kind != "dicom":
        assert recon.header == expected.header
    # Numbers in DICOM are decimal texts, so the last bit of the affine may differ.
    np.testing.assert_allclose(recon.affine, OBLIQUE.astype(np.float32), rtol=0, atol=1e-5 * (kind == "dicom"))
    tolerance = 1e-4 * np.percentile(stored, 99.5) * (kind == "dicom")
    np.testing.assert_allclose(np.asarray(recon.dataobj), np.asarray(expected.dataobj), rtol=0, atol=tolerance)


@in_its_environment
def test_bad_input_is_refused(model: Path, tmp_path: Path) -> None:
    """One sentence, exit code 2, nothing written. In a renamed model the SDK finds no config, and would run without
    preprocessing."""
    scan, bold = head(4, SHAPE), np.stack([head(4, SHAPE)] * 2, -1)
    two, _, lost = (series(tmp_path / name, scan) for name in ("two/a", "two/b", "lost"))
    (lost / "010.dcm").unlink()
    inputs = [
        (two.parent, model, "error: the input holds 2 MR series"),
        (lost, model, "error: the slices of the series lie 3.100 to 6.200 mm apart"),
        (write(tmp_path / "bold.nii.gz", bold), model, "has 4 dimensions"),
        (write(tmp_path / "scan.nii.gz", scan), shutil.copy(model, tmp_path / "other.ts"), "other.ts has no inference"),
    ]
    for number, (path, file, message) in enumerate(inputs):
        done = start(path, tmp_path / f"out{number}", file)
        assert done.returncode == 2 and message in done.stderr
        assert list((tmp_path / f"out{number}").iterdir()) == []
