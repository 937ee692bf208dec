"""What a reconstruction writes: grid and unit of the source, what was cut off as zero, every figure right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, Invertd
from phantoms import SIZE, ScalingNetwork, preprocessing, write_head

from scripts.jobs.inference import ReconstructionWriter
from scripts.networks import AutocastInferer, prepare_batch
from scripts.transforms import ZeroOutsided

CPU = torch.device("cpu")


def reconstruct(records: Sequence[dict], folder: Path, network: ScalingNetwork) -> pd.DataFrame:
    """Run inference.json's evaluator; returns summary.csv."""
    steps = preprocessing()
    home = Invertd("pred", steps, orig_keys="image", nearest_interp=False, to_tensor=True)
    SupervisedEvaluator(
        CPU, DataLoader(Dataset(records, steps), batch_size=1), network, prepare_batch=prepare_batch,
        inferer=AutocastInferer(False, CPU), postprocessing=Compose([home, ZeroOutsided("pred", steps)]),
        val_handlers=[ReconstructionWriter(str(folder))],
    ).run()  # fmt: skip
    return pd.read_csv(folder / "summary.csv")


def voxels(path: Path) -> np.ndarray:
    """Of a NIfTI file."""
    return nib.load(path).get_fdata()


@pytest.mark.parametrize("grid", ["axes_swapped", "anisotropic", "freesurfer"])
def test_a_reconstruction_is_on_the_sources_grid(tmp_path: Path, grid: str) -> None:
    """Shape, affine, unit and intensity are the source's, for any axes, spacing and format."""
    record = write_head(tmp_path, grid)
    table = reconstruct([record], tmp_path, ScalingNetwork())
    source, recon = nib.load(record["image"]), nib.load(tmp_path / "sub-01_T1w_recon.nii.gz")
    np.testing.assert_allclose(recon.affine, source.affine, atol=1e-4)
    assert recon.shape == source.shape and recon.header.get_xyzt_units() == ("mm", "sec")
    original = source.get_fdata()
    # Two trilinear resamplings of a head that is smooth over 20 mm, but for its rim, cost below 3 % of its intensity.
    inside = original > 100
    assert np.abs(original - recon.get_fdata())[inside].mean() < 0.03 * original[inside].mean()
    assert table["l1"][0] < 0.02


def test_outputs_and_figures(tmp_path: Path) -> None:
    """Per scan NIfTI and PNG by its name, one table; of a network that halves, the error is half the mean intensity."""
    names = ["sub-01_T1w", "sub-02_ses-1_T1w"]
    records = [write_head(tmp_path), write_head(tmp_path, "las", names[1])]
    out = tmp_path / "out"
    table = reconstruct(records, out, ScalingNetwork(0.5))
    volumes = [f"{name}_recon.{ending}" for name in names for ending in ("nii.gz", "png")]
    assert sorted(path.name for path in out.iterdir()) == ["report.html", *volumes, "summary.csv"]
    assert table["name"].tolist() == names
    source = voxels(Path(records[0]["image"]))
    factor = source.max() / preprocessing()(records[0])["image"].max().item()
    assert table["intensity_factor"][0] == pytest.approx(factor, rel=1e-5)
    # aligned and zero where model space ends: exact over the voxels inside, all but those counted
    n_inside = source.size - table["voxels_outside"][0]
    assert table["l1"][0] == pytest.approx(0.5 * source.sum() / n_inside / factor, rel=1e-4)
    assert table["foreground_voxels_outside"][0] == 0


def test_voxels_outside_of_model_space_are_zero(tmp_path: Path) -> None:
    """A head of 220 mm loses its neck: those voxels are zero, counted, and not in the error."""
    record = write_head(tmp_path, "beyond_model_space", height=110.0)
    table = reconstruct([record], tmp_path, ScalingNetwork())
    source, recon = voxels(Path(record["image"])), voxels(tmp_path / "sub-01_T1w_recon.nii.gz")
    # on the model's grid it is exact: the box is kept, all else is zero and counted
    assert table["voxels_outside"][0] == source.size - np.prod(SIZE)
    expected = int(((source > 0.05 * np.percentile(source, 99.5)) & (recon == 0)).sum())
    assert table["foreground_voxels_outside"][0] == expected > 1000
    assert table["l1"][0] < 1e-6
