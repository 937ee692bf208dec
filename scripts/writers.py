"""What reconstruction writes: NIfTI files in the scan's own grid, pictures, a summary and the report.

`inference.json` attaches `ReconstructionWriter` as a handler, never as postprocessing: MONAI Label and the Deploy SDK
run `postprocessing` themselves and must not write files by it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from scripts.cases import Case, Cases
from scripts.files import replacing
from scripts.job_reports import FILE_NAME, reconstruction_report
from scripts.pictures import recon_panel, save_png, to_ras
from scripts.transforms import FACTOR_KEY, count_outside

__all__ = ["ReconstructionWriter", "plain_volume", "write_nifti"]


class ReconstructionWriter:
    """`<name>_recon.nii.gz` in the scan's own grid and unit, `<name>_recon.png`, and summary and report of the run.

    Args:
        output_dir: where to write.
        weights: the weights file, for its sha256 in the report; "" where it is not known.

    Postprocessing leaves `pred` on the scan's grid and the mask of `ZeroOutsided`. Where it has kept a copy under
    `pred_model_space`, `<name>_model_space.nii.gz` and `<name>_model_space_recon.nii.gz` are written too, in units of
    the scan's own percentile.
    """

    def __init__(self, output_dir: str, weights: str = "") -> None:
        self.output_dir = Path(output_dir)
        self.weights = weights
        self.rows: list[dict[str, Any]] = []
        self.cases = Cases()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose postprocessing inverts the preprocessing of `pred`."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows, self.cases = [], Cases()

    def _volumes(self, engine: Engine) -> None:
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            recon = plain_volume(output["pred"])[0].cpu().numpy()
            self._write(record, output["image"], recon, plain_volume(output["outside"])[0].cpu() > 0)
            if "pred_model_space" in output:
                image = output["image"]
                grid = nib.Nifti1Image(np.zeros(image.shape[1:], np.uint8), np.asarray(image.affine))
                grid.header.set_xyzt_units("mm", "sec")
                for key, ending in (("image", "model_space"), ("pred_model_space", "model_space_recon")):
                    volume = plain_volume(output[key])[0].cpu().numpy()
                    write_nifti(volume, grid, self.output_dir / f"{record['name']}_{ending}.nii.gz")

    def _write(self, record: dict[str, Any], image: MetaTensor, recon: np.ndarray, outside: torch.Tensor) -> None:
        name, source_path = record["name"], Path(image.meta["filename_or_obj"])
        source: Any = nib.load(source_path)
        if recon.shape != source.shape:
            raise RuntimeError(f"{source_path} is {source.shape}, its reconstruction {recon.shape}")
        original = np.asarray(source.dataobj, dtype=np.float32)
        n_outside = count_outside(torch.from_numpy(original), outside)
        write_nifti(recon, source, self.output_dir / f"{name}_recon.nii.gz")
        image_ras, spacing = to_ras(original, source.affine)
        recon_ras, _ = to_ras(recon, source.affine)
        save_png(recon_panel(image_ras, recon_ras, spacing, title=name), self.output_dir / f"{name}_recon.png")
        inside = ~outside.numpy()
        factor = float(image.meta[FACTOR_KEY])
        error = np.abs(original - recon)[inside].mean() / factor
        self.cases.add(float(error), partial(Case.of_volumes, name, image_ras, {"model": recon_ras}, spacing, factor))
        self.rows.append(
            {
                "name": name,
                "l1": float(error),
                "intensity_factor": factor,
                "voxels_outside": n_outside.voxels,
                "foreground_voxels_outside": n_outside.foreground_voxels,
            }
        )

    def _finish(self, engine: Engine) -> None:
        table = pd.DataFrame(self.rows)
        with replacing(self.output_dir / "summary.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        print(f"\n{table.to_string(index=False)}\n")
        reconstruction_report(self.output_dir, table, self.cases.result(), self.weights)
        written = f"NIfTI, PNG, summary.csv and {FILE_NAME}"
        print(f"{len(table)} reconstructed: {written} are in {self.output_dir}", flush=True)


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
