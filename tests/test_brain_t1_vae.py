"""The unit test of the bundle in the model zoo's own pattern, for its ci/unit_tests/test_brain_t1_vae.py.

The zoo runs it with the bundle's folder as working directory. It needs nothing of this folder's conftest.
"""

from __future__ import annotations

import shutil
import tempfile
import unittest
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.bundle import ConfigWorkflow
from parameterized import parameterized

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "bundle_root": str(ROOT), "network_def#channels": [4, 8], "device": "cpu",
    "spatial_size": [32, 36, 32], "spacing": 4.0, "checks": "stop",
}  # fmt: skip
TRAIN = [[{"epochs": 1, "perceptual_weight": 0.0, "batch_size": 1, "val_fraction": 0.5, "output_dir": "train"}]]
INFER = [
    ["inference", {"output_dir": "recons"}],
    ["evaluate", {"split": "all", "output_dir": "evaluated", "baselines": []}],
]


class TestBrainT1VAE(unittest.TestCase):
    """Training, then inference and evaluation with its weights, through `ConfigWorkflow`, properties checked."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = Path(tempfile.mkdtemp())
        rng = np.random.default_rng(0)
        grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side) for side in (36, 44, 36)], indexing="ij"))
        (cls.folder / "scans").mkdir()
        for number in range(4):
            volume = 500 * (np.sqrt((grid**2).sum(0)) < 0.8) * (1 + 0.1 * rng.random((36, 44, 36)))
            image = nib.Nifti1Image(volume.astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0]))
            nib.save(image, cls.folder / "scans" / f"sub-{number}_T1w.nii.gz")

    @classmethod
    def tearDownClass(cls) -> None:
        shutil.rmtree(cls.folder)

    def run_workflow(self, config: str, workflow_type: str, override: dict) -> Path:
        """`check_workflow` of the zoo: initialize, check the properties, run, finalize; the output folder."""
        output = self.folder / override["output_dir"]
        workflow = ConfigWorkflow(
            config_file=str(ROOT / "configs" / f"{config}.json"),
            logging_file=str(ROOT / "configs" / "logging.conf"),
            meta_file=str(ROOT / "configs" / "metadata.json"),
            workflow_type=workflow_type,
            dataset_dir=str(self.folder / "scans"),
            **SMALL,
            **{**override, "output_dir": str(output)},
        )
        workflow.initialize()
        workflow.check_properties()
        workflow.run()
        workflow.finalize()
        return output

    @parameterized.expand(TRAIN)
    def test_1_train_config(self, override: dict) -> None:
        output = self.run_workflow("train", "train", override)
        self.assertTrue((output / "model.pt").is_file())

    @parameterized.expand(INFER)
    def test_2_infer_config(self, config: str, override: dict) -> None:
        output = self.run_workflow(config, "infer", {**override, "weights": str(self.folder / "train" / "model.pt")})
        self.assertTrue((output / "report.html").is_file())


if __name__ == "__main__":
    unittest.main()
