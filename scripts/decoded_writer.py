"""What decoding and sampling write: NIfTI files with a place in the world, and pictures.

`decode.json` and `sample.json` attach `DecodedWriter`. The one idea: a latent whose header knows its scan goes home
to that scan's grid and unit; any other becomes a volume in model space, centred on the origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.transforms import Compose

from scripts.errors import InputError
from scripts.files import file_sha256
from scripts.job_reports import FILE_NAME, decoding_report
from scripts.latents import ENDING, read_header
from scripts.picture_strips import volume_strip
from scripts.pictures import mosaic, save_png, to_ras
from scripts.source_grid import SourceGrid
from scripts.writers import plain_volume, write_nifti

__all__ = ["DecodedWriter", "model_space_image"]

SPACES = ("auto", "source", "model")
MOST_IN_A_STRIP = 16


class DecodedWriter:
    """`<name>_decoded.nii.gz` and `<name>_decoded.png` a latent; one strip of the first sixteen, and the report.

    Args:
        output_dir: where to write.
        preprocessing: the transform into model space, for the way home.
        spacing: of model space in mm.
        weights: the weights file that decodes; latents of other weights are refused. "" for no such check.
        space: `source` (the scan's own grid and unit), `model`, or `auto`: source where the latent knows it.
        strip: file name of the strip.

    Raises:
        InputError: `space` is another.
    """

    def __init__(
        self,
        output_dir: str,
        preprocessing: Compose,
        spacing: float,
        weights: str = "",
        space: str = "auto",
        strip: str = "decoded.png",
    ) -> None:
        if space not in SPACES:
            raise InputError(f"'space' is {space!r}; give one of {', '.join(SPACES)}.")
        self.output_dir = Path(output_dir)
        self.preprocessing = preprocessing
        self.spacing = float(spacing)
        self.weights, self.space, self.strip = weights, space, strip
        self.shown: dict[str, np.ndarray] = {}
        self.n_written = 0

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose iteration gives `pred` (`decode_iteration`)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        """Check every latent's header before the first is decoded."""
        self.shown, self.n_written = {}, 0
        weights_sha256 = file_sha256(self.weights) if self.weights else ""
        for record in engine.state.dataloader.dataset.data:
            path, header = record.get("file", ""), _header(record)
            if self.space == "source" and SourceGrid.of_header(header) is None:
                raise InputError(f"{path or record['name']} does not know its source scan; set 'space' to 'model'.")
            encoder_sha256 = header.get("weights_sha256")  # not known where the latent is from elsewhere
            if weights_sha256 and encoder_sha256 and encoder_sha256 != weights_sha256:
                raise InputError(
                    f"{path} was encoded with other weights than {self.weights}; give those as 'weights', or set "
                    "'check_weights' to False if only the decoder was trained on."
                )

    def _volumes(self, engine: Engine) -> None:
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            volume = plain_volume(output["pred"]).cpu()[0]
            grid = SourceGrid.of_header(_header(record))
            path = self.output_dir / f"{record['name']}_decoded.nii.gz"
            if grid is not None and self.space != "model":
                decoded, image = grid.bring_home(volume, self.preprocessing), grid.image()
            else:
                decoded, image = volume.numpy(), model_space_image(volume.shape, self.spacing, grid)
            write_nifti(decoded, image, path)
            seen, spacing = to_ras(decoded, image.affine)
            save_png(
                mosaic(seen, spacing=spacing, title=record["name"]), path.with_name(f"{record['name']}_decoded.png")
            )
            if len(self.shown) < MOST_IN_A_STRIP:
                self.shown[record["name"]] = volume.numpy()
            self.n_written += 1

    def _finish(self, engine: Engine) -> None:
        figure = volume_strip(list(self.shown.values()), list(self.shown), (self.spacing,) * 3)
        save_png(figure, self.output_dir / self.strip)
        figures = engine.state.metrics  # of `SampleFigures`, where it is attached before
        decoding_report(self.output_dir, self.shown, self.spacing, figures, self.n_written)
        written = f"NIfTI, PNG, {self.strip} and {FILE_NAME}"
        print(f"\n{self.n_written} decoded: {written} are in {self.output_dir}", flush=True)


def model_space_image(shape: Sequence[int], spacing: float, grid: SourceGrid | None = None) -> nib.Nifti1Image:
    """An image of model space's grid, for `write_nifti`: where the latent's scan lies, else centred on the origin.

    Args:
        shape: voxels of the three axes.
        spacing: voxel size in mm.
        grid: the latent's source, where it is known.
    """
    if grid is None:
        affine = np.diag([spacing] * 3 + [1.0])
        affine[:3, 3] = [-spacing * (side - 1) / 2 for side in shape]
    else:
        affine = np.array(grid.model_affine)
    image = nib.Nifti1Image(np.broadcast_to(np.zeros((), np.uint8), tuple(shape)), affine)
    image.header.set_xyzt_units("mm", "sec")
    return image


def _header(record: dict[str, Any]) -> dict[str, Any]:
    """The header of the record's file, empty where the latent is not one of this bundle's."""
    path = str(record.get("file", ""))
    return read_header(path) if path.endswith(ENDING) else {}
