"""What evaluation and reconstruction write: figures per volume, and NIfTI files with pictures.

`evaluate.json` attaches `EvaluationWriter`, `inference.json` attaches `ReconstructionWriter` as handlers, never as
postprocessing: MONAI Label and the Deploy SDK run `postprocessing` themselves and must not write files by it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from scripts.baselines import Baseline
from scripts.files import file_sha256, replacing
from scripts.latent_statistics import ActiveUnits, kl_per_value
from scripts.metrics import format_table, reconstruction_metrics, summarise
from scripts.pictures import recon_panel, save_png, to_ras
from scripts.transforms import FACTOR_KEY, count_outside, outside_model_space

__all__ = ["EvaluationWriter", "ReconstructionWriter", "write_nifti"]

RECORD_COLUMNS = ("name", "subject", "session", "label", "split")


class EvaluationWriter:
    """Every figure of the protocol, per volume and summarised, for the model and what it is measured against.

    Systems: `model` (the posterior mean), `identity` (preprocessing, its inverse and preprocessing again: what the
    protocol alone costs) and the baselines. Writes `metrics.csv` (one line a volume and system), `summary.json` and
    `table.txt`, and prints the table.

    Args:
        output_dir: where to write.
        preprocessing: the transform that made the volumes, for `identity`.
        lpips: `LPIPS3D`, on the network's device.
        baselines: codes to run beside the model; fitted on `training` when the run starts.
        training: preprocessed training split for the baselines that are fitted; None where there is none.
        split: name of the split, for the table.
        weights: the weights file, for its sha256.
    """

    def __init__(
        self,
        output_dir: str,
        preprocessing: Compose,
        lpips: torch.nn.Module,
        baselines: Sequence[Baseline],
        training: Dataset | None,
        split: str,
        weights: str,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.preprocessing = preprocessing
        self.lpips = lpips
        self.baselines = list(baselines)
        self.training = training
        self.split, self.weights = split, weights
        self.rows: list[dict[str, Any]] = []
        self.active_units = ActiveUnits()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose iteration keeps the posterior (`posterior_iteration`)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows, self.active_units = [], ActiveUnits()
        if self.training is None or len(self.training) == 0:
            dropped = [code.name for code in self.baselines if type(code).fit is not Baseline.fit]
            self.baselines = [code for code in self.baselines if code.name not in dropped]
            if dropped:
                print(f"no training split: {', '.join(dropped)} cannot be fitted and is left out")
        for code in self.baselines:
            training: Any = self.training or []
            code.fit(scan["image"] for scan in tqdm(training, desc=f"fitting {code.name}", disable=None, leave=False))

    def _volumes(self, engine: Engine) -> None:
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            image, pred = output["image"], output["pred"]
            mu, logvar = output["mu"][None], output["logvar"][None]
            self.active_units.update(mu)
            base = {key: record.get(key, "") for key in RECORD_COLUMNS}
            x = _plain(image)[None]
            systems = {"model": _plain(pred)[None], "identity": _plain(self._identity(image))[None]}
            systems |= {code.name: code(x) for code in self.baselines}
            for system, y in systems.items():
                row = reconstruction_metrics(x, y, self.lpips)
                if system == "model":
                    row["kl"] = float(kl_per_value(mu, logvar))
                self.rows.append({**base, "system": system, **row})

    def _identity(self, image: MetaTensor) -> torch.Tensor:
        """The volume sent home to its source grid and brought back (all transforms after the loading)."""
        home = self.preprocessing.inverse({"image": image})
        return Compose(self.preprocessing.transforms[1:])(home)["image"]

    def _finish(self, engine: Engine) -> None:
        table = pd.DataFrame(self.rows)
        summaries = {
            str(system): summarise(
                [dict(row) for _, row in rows.dropna(axis=1, how="all").iterrows()],
                self.active_units.share() if system == "model" else None,
            )
            for system, rows in table.groupby("system", sort=False)
        }
        sha256, command = file_sha256(self.weights), _command()
        text = format_table(summaries, split=self.split, weights_sha256=sha256, command=command)
        about = {"split": self.split, "n": int((table["system"] == "model").sum()), "weights_sha256": sha256}
        with replacing(self.output_dir / "metrics.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        with replacing(self.output_dir / "summary.json") as temporary:
            temporary.write_text(json.dumps({**about, "command": command, "systems": summaries}, indent=2) + "\n")
        with replacing(self.output_dir / "table.txt") as temporary:
            temporary.write_text(text + "\n")
        print(f"\n{text}\n\nwritten to {self.output_dir}: metrics.csv, summary.json, table.txt", flush=True)


class ReconstructionWriter:
    """`<name>_recon.nii.gz` in the scan's own grid and unit, `<name>_recon.png`, and a summary of the run.

    Args:
        output_dir: where to write.
        preprocessing: the transform that made the volumes, to tell what lay outside model space.

    Where postprocessing has kept a copy under `pred_model_space`, `<name>_model_space.nii.gz` and
    `<name>_model_space_recon.nii.gz` are written too, in units of the scan's own percentile.
    """

    def __init__(self, output_dir: str, preprocessing: Compose) -> None:
        self.output_dir = Path(output_dir)
        self.preprocessing = preprocessing
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose postprocessing inverts the preprocessing of `pred`."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows = []

    def _volumes(self, engine: Engine) -> None:
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._write(record, output["image"], _plain(output["pred"])[0].cpu().numpy())
            if "pred_model_space" in output:
                image = output["image"]
                grid = nib.Nifti1Image(np.zeros(image.shape[1:], np.uint8), np.asarray(image.affine))
                grid.header.set_xyzt_units("mm", "sec")
                for key, ending in (("image", "model_space"), ("pred_model_space", "model_space_recon")):
                    volume = _plain(output[key])[0].cpu().numpy()
                    write_nifti(volume, grid, self.output_dir / f"{record['name']}_{ending}.nii.gz")

    def _write(self, record: dict[str, Any], image: MetaTensor, recon: np.ndarray) -> None:
        name, source_path = record["name"], Path(image.meta["filename_or_obj"])
        source: Any = nib.load(source_path)
        if recon.shape != source.shape:
            raise RuntimeError(f"{source_path} is {source.shape}, its reconstruction {recon.shape}")
        original = np.asarray(source.dataobj, dtype=np.float32)
        outside = outside_model_space(image, self.preprocessing)[0].cpu()
        recon[outside.numpy()] = 0
        n_outside = count_outside(torch.from_numpy(original), outside)
        write_nifti(recon, source, self.output_dir / f"{name}_recon.nii.gz")
        image_ras, spacing = to_ras(original, source.affine)
        recon_ras, _ = to_ras(recon, source.affine)
        save_png(recon_panel(image_ras, recon_ras, spacing, title=name), self.output_dir / f"{name}_recon.png")
        inside = ~outside.numpy()
        error = np.abs(original - recon)[inside].mean() / float(image.meta[FACTOR_KEY])
        self.rows.append(
            {
                "name": name,
                "l1": float(error),
                "intensity_factor": float(image.meta[FACTOR_KEY]),
                "voxels_outside": n_outside.voxels,
                "foreground_voxels_outside": n_outside.foreground_voxels,
            }
        )

    def _finish(self, engine: Engine) -> None:
        table = pd.DataFrame(self.rows)
        with replacing(self.output_dir / "summary.csv") as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        print(f"\n{table.to_string(index=False)}\n")
        print(f"{len(table)} reconstructed: NIfTI, PNG and summary.csv are in {self.output_dir}", flush=True)


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


def _plain(volume: torch.Tensor) -> torch.Tensor:
    return volume.detach().as_subclass(torch.Tensor).float()


def _command() -> str:
    """What the user ran, with the last part of every path, since the table is made to be shown."""
    words = [word.rpartition("=") for word in sys.argv[1:]]
    shown = [key + sign + (Path(value).name if Path(value).is_absolute() else value) for key, sign, value in words]
    return " ".join(["python -m monai.bundle", *shown])
