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
from conftest import ROOT, TINY_JOB, head
from monai.bundle import ConfigParser
from monai.transforms import Compose, LoadImage, MapTransform
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat

from scripts.export import torchscript
from scripts.networks import load_torchscript

Run = Callable[..., subprocess.CompletedProcess[str]]

ENVIRONMENT = os.environ.get("MONAI_DEPLOY_ENV", "")
in_its_environment = pytest.mark.skipif(
    not ENVIRONMENT, reason="MONAI_DEPLOY_ENV names no environment with docs/deploy/requirements.txt"
)
TINY = {"spatial_size": [32, 36, 32], "spacing": 4.0}
SHAPE = (42, 45, 39)  # larger than the tiny model space, so that a part of the scan lies outside
OBLIQUE = from_matvec(euler2mat(0.2, 0.1, -0.3) @ np.diag([-3.5, -3.7, 3.1]), [90, 110, -90])
SLOPE = 0.37  # as scanners of one maker have it: no whole numbers
# Run by the other environment, which has pydicom: a series of the voxels `volume.npy`, its files in no order.
WRITE_SERIES = """
import sys
from pathlib import Path
import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

folder, volume, slope = Path(sys.argv[1]), np.load(sys.argv[2]), sys.argv[4]
lps = np.diag([-1, -1, 1, 1]) @ np.load(sys.argv[3])
spacing = np.linalg.norm(lps[:3, :3], axis=0)
study, series = generate_uid(), generate_uid()
folder.mkdir(parents=True)
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
    header.BitsAllocated = header.BitsStored = 16
    header.HighBit, header.PixelRepresentation, header.SamplesPerPixel = 15, 1, 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.RescaleSlope, header.RescaleIntercept = slope, "0"
    header.PixelData = pixels.tobytes()
    header.save_as(folder / f"{(z * 7) % volume.shape[2]:03d}.dcm", enforce_file_format=True)
"""


@pytest.fixture(scope="module")
def model(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model.ts` of the tiny network, exported with a config that stands for `configs/inference.json`."""
    folder = tmp_path_factory.mktemp("deploy")
    config = json.loads((ROOT / "configs" / "inference.json").read_text())
    config["network_def"] |= {"channels": [4, 8]}
    (folder / "inference.json").write_text(json.dumps(config | TINY))
    torchscript(str(weights), str(folder), "whole", str(folder / "inference.json"))
    return folder / "model.ts"


@pytest.fixture(scope="module")
def archive(model: Path) -> ConfigParser:
    """The configs in the file, read where the SDK reads them."""
    with zipfile.ZipFile(model) as file:
        parser = ConfigParser()
        parser.read_meta(json.loads(file.read("model/extra/metadata.json")))
        parser.read_config(json.loads(file.read("model/extra/inference.json")))
    return parser


def write(path: Path, volume: np.ndarray) -> Path:
    """An oblique scan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def int16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of whole numbers."""
    return write(tmp_path_factory.mktemp("scan") / "int16.nii.gz", head(1, SHAPE))


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of fractions, alone in its folder."""
    return write(tmp_path_factory.mktemp("scan") / "float32.nii.gz", (SLOPE * head(2, SHAPE)).astype(np.float32))


@pytest.fixture
def reconstruct(run_bundle: Run, weights: Path, tmp_path: Path) -> Callable[[Path], Any]:
    """A scan's reconstruction by configs/inference.json, in the memory layout of a TorchScript file."""

    def run(scan: Path) -> Any:
        run_bundle(
            "--config_file", "configs/inference.json", "--dataset_dir", str(scan), "--output_dir",
            str(tmp_path / "bundle"), "--weights", str(weights), "--channels_last", "False", *TINY_JOB,
        )  # fmt: skip
        return nib.load(tmp_path / "bundle" / f"{scan.name.split('.')[0]}_recon.nii.gz")

    return run


def test_the_archive_declares_one_image_in_and_one_out(archive: ConfigParser) -> None:
    """Names and types that the operator's ports have, and nothing that the network does not give."""
    formats = archive["_meta_#network_data_format"]
    assert {name: entry["type"] for name, entry in formats["inputs"].items()} == {"image": "image"}
    assert {name: entry["type"] for name, entry in formats["outputs"].items()} == {"pred": "image"}


def test_the_transforms_are_what_the_operator_expects(archive: ConfigParser) -> None:
    """Compose of map transforms; loading stands first, and nothing writes files."""
    chains = [archive.get_parsed_content(name) for name in ("preprocessing", "postprocessing")]
    assert all(type(chain) is Compose for chain in chains)
    assert all(isinstance(step, MapTransform) for chain in chains for step in chain.transforms)
    names = [type(step).__name__ for chain in chains for step in chain.transforms]
    assert [name for name in names if "LoadImage" in name] == names[:1]
    assert not [name for name in names if "SaveImage" in name]


def test_the_operators_steps_give_what_the_bundle_gives(
    model: Path, archive: ConfigParser, int16: Path, reconstruct: Callable[[Path], Any]
) -> None:
    """What SDK and application do with the file's own configs, in a few lines without the SDK."""
    preprocessing = archive.get_parsed_content("preprocessing")
    preprocessing.transforms = tuple(preprocessing.transforms[1:])
    image = LoadImage("NibabelReader", image_only=True, ensure_channel_first=True)(int16)
    prepared = preprocessing({"image": image})["image"]
    with torch.no_grad():
        pred = archive.get_parsed_content("inferer")(inputs=prepared[None], network=load_torchscript(model))[0]
    recon = archive.get_parsed_content("postprocessing")({"image": prepared, "pred": pred})["pred"]
    np.testing.assert_array_equal(recon[0].numpy(), np.asarray(reconstruct(int16).dataobj))


def start(scan: Path, output: Path, model: Path) -> subprocess.CompletedProcess[str]:
    """The application, by the command of docs/deploy.md."""
    command = [f"{ENVIRONMENT}/bin/python", "docs/deploy/app.py", "-i", str(scan), "-o", str(output), "-m", str(model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": "."}
    output.mkdir()
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def only_result(done: subprocess.CompletedProcess[str], output: Path) -> Any:
    """What the application has written."""
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = output.iterdir()
    return nib.load(file)


def series(folder: Path, volume: np.ndarray, slope: float = 1.0) -> Path:
    """A DICOM series of a volume."""
    folder.parent.mkdir(exist_ok=True)
    arrays = folder.parent / f"{folder.name}.npy", folder.parent / "affine.npy"
    for file, array in zip(arrays, (volume, OBLIQUE), strict=True):
        np.save(file, array)
    program = [f"{ENVIRONMENT}/bin/python", "-c", WRITE_SERIES, str(folder), *map(str, arrays), str(slope)]
    subprocess.run(program, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@in_its_environment
@pytest.mark.parametrize(("kind", "is_folder"), [("int16", False), ("float32", True)])
def test_the_application_gives_what_the_bundle_gives(
    model: Path,
    reconstruct: Callable[[Path], Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    kind: str,
    is_folder: bool,
) -> None:
    """The same floats and the same header, from a file and from the folder that holds it."""
    scan: Path = request.getfixturevalue(kind)
    recon = only_result(start(scan.parent if is_folder else scan, tmp_path / "out", model), tmp_path / "out")
    expected = reconstruct(scan)
    assert recon.get_data_dtype() == np.float32 and np.asarray(recon.dataobj).std() > 10
    np.testing.assert_array_equal(np.asarray(recon.dataobj), np.asarray(expected.dataobj))
    np.testing.assert_array_equal(recon.affine, OBLIQUE.astype(np.float32))
    assert recon.header == expected.header


@pytest.mark.slow
@in_its_environment
def test_a_dicom_series_gives_what_its_nifti_gives(
    model: Path, reconstruct: Callable[[Path], Any], tmp_path: Path
) -> None:
    """Oblique, oblong pixels, fractions, an empty first slice: each is something that the SDK alone gets wrong."""
    volume = head(3, SHAPE)
    volume[:, :, 0] = 0
    rescaled = (SLOPE * volume).astype(np.float32)
    scan = write(tmp_path / "nifti.nii.gz", rescaled)
    recon = only_result(start(series(tmp_path / "dicom", volume, SLOPE), tmp_path / "out", model), tmp_path / "out")
    expected = reconstruct(scan)
    # Numbers in DICOM are decimal texts, so the last bit of the affine may differ.
    np.testing.assert_allclose(recon.affine, expected.affine, rtol=0, atol=1e-5)
    factor = float(np.percentile(rescaled, 99.5))
    np.testing.assert_allclose(np.asarray(recon.dataobj), np.asarray(expected.dataobj), rtol=0, atol=1e-4 * factor)


def two_series(folder: Path) -> Path:
    """A folder with two."""
    for name in ("a", "b"):
        series(folder / "two" / name, head(4, SHAPE))
    return folder / "two"


def lost_slice(folder: Path) -> Path:
    """A series that lacks a slice in its middle."""
    (series(folder / "lost", head(4, SHAPE)) / "010.dcm").unlink()
    return folder / "lost"


def four_dimensions(folder: Path) -> Path:
    """A functional run."""
    return write(folder / "bold.nii.gz", np.stack([head(4, SHAPE)] * 2, -1))


@pytest.mark.slow
@in_its_environment
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_series, "error: the input holds 2 MR series"),
        (lost_slice, "error: the slices of the series lie 3.100 to 6.200 mm apart"),
        (four_dimensions, "has 4 dimensions"),
    ],
)
def test_bad_input_is_refused(model: Path, tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    """One sentence, exit code 2, nothing written."""
    done = start(make(tmp_path), tmp_path / "out", model)
    assert done.returncode == 2 and message in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
@in_its_environment
def test_a_renamed_model_is_refused(model: Path, int16: Path, tmp_path: Path) -> None:
    """The SDK finds no config in it and would run without preprocessing."""
    shutil.copy(model, tmp_path / "other.ts")
    done = start(int16, tmp_path / "out", tmp_path / "other.ts")
    assert done.returncode == 2 and "other.ts has no inference.json" in done.stderr
