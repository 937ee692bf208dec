"""What decoding and sampling write: NIfTI files with a place in the world, and pictures.

`decode.json` and `sample.json` attach `DecodedWriter`. A latent whose header knows its scan goes home
to that scan's grid and unit; any other becomes a volume in model space, centred on the origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from monai.transforms import Compose

from scripts.latents import ENDING, read_header
from scripts.report import FILE_NAME, Report, mosaic, origin, quantised, save_png, to_ras, volume_strip
from scripts.run import InputError, as_flag, command_line, file_sha256
from scripts.transforms import SourceGrid, model_space_image, plain_volume, write_nifti

__all__ = ["DecodedWriter", "decoding_report"]

SPACES = ("auto", "source", "model")
MOST_IN_A_STRIP = 16


class DecodedWriter:
    """`<name>_decoded.nii.gz` and `<name>_decoded.png` a latent; one strip of the first sixteen, and the report.

    Args:
        output_dir: where to write.
        preprocessing: the transform into model space, for the way home.
        spacing: of model space in mm.
        weights: the weights file that decodes; "" where it is not known.
        check_weights: whether latents of other weights are refused.
        space: `source` (the scan's own grid and unit), `model`, or `auto`: source where the latent knows it.
        strip: file name of the strip.

    Raises:
        InputError: `space` is none of its values.
    """

    def __init__(
        self,
        output_dir: str,
        preprocessing: Compose,
        spacing: float,
        weights: str = "",
        check_weights: bool | str = True,
        space: str = "auto",
        strip: str = "decoded.png",
    ) -> None:
        if space not in SPACES:
            raise InputError(f"'space' is {space!r}; give one of {', '.join(SPACES)}.")
        self.output_dir = Path(output_dir)
        self.preprocessing = preprocessing
        self.spacing = float(spacing)
        self.weights = weights if as_flag(check_weights, "check_weights") else ""
        self.space, self.strip = space, strip
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


def _header(record: dict[str, Any]) -> dict[str, Any]:
    """The header of the record's file, empty where the latent is not one of this bundle's."""
    path = str(record.get("file", ""))
    return read_header(path) if path.endswith(ENDING) else {}


def decoding_report(
    folder: Path,
    volumes: Mapping[str, np.ndarray],
    spacing: float,
    figures: Mapping[str, float],
    n_written: int,
) -> None:
    """Write the page of decoded latents or samples.

    Args:
        folder: where `report.html` is written.
        volumes: name and volume (D, H, W) in model space, of those that are shown.
        spacing: voxel size in mm.
        figures: what `SampleFigures` found; empty where nothing was compared.
        n_written: how many were decoded.
    """
    report = Report("Decoded volumes", {"volumes": str(n_written), **origin(), "command": command_line()})
    if figures:
        table = pd.DataFrame({"figure": list(figures), "value": list(figures.values())})
        report.add_table("Against real scans", table, text="What each figure means stands in docs/sample.md.")
    grid = (spacing,) * 3
    strip = volume_strip(list(volumes.values()), list(volumes), grid)
    report.add_pictures("Side by side", [(f"the first {len(volumes)} of {n_written}", strip)])
    packed = {name: quantised(volume) for name, volume in volumes.items()}
    shown = [(name, volume, None, [spacing * factor] * 3) for name, (volume, factor) in packed.items()]
    report.add_viewer("Viewer", shown)
    report.write(folder / FILE_NAME)
