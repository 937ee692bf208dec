"""What reconstruction writes: NIfTI files in the scan's own grid, pictures, a summary and the report.

`inference.json` attaches `ReconstructionWriter` as a handler, never as postprocessing: MONAI Label and the Deploy SDK
run `postprocessing` themselves and must not write files by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from scripts.report import (
    FILE_NAME,
    NOTES,
    Case,
    Cases,
    Report,
    add_cases,
    distribution_charts,
    facts_of,
    recon_panel,
    save_png,
    to_ras,
)
from scripts.run import file_sha256, replacing
from scripts.transforms import FACTOR_KEY, count_outside, plain_volume, write_nifti

__all__ = ["ReconstructionWriter", "reconstruction_report"]


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


def reconstruction_report(folder: Path, rows: pd.DataFrame, cases: Sequence[tuple[str, Case]], weights: str) -> None:
    """Write the page of an inference: the columns of `summary.csv`, and the cases ranked by l1."""
    facts = facts_of(rows, {"weights": f"sha256 {file_sha256(weights)}"} if weights else {})
    report = Report("Reconstruction", facts)
    report.add_table("All volumes", rows, better={"l1": False}, notes=NOTES)
    report.add_charts("Distributions", distribution_charts(rows, ["l1"]), "One point a volume.")
    add_cases(report, cases, "ranked by l1")
    report.write(folder / FILE_NAME)
