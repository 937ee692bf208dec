"""One self-contained HTML page that shows a job's results: tables, charts, pictures and a viewer, without a network.

The jobs compose their pages from it. A
section is data (rows, SVG text, base64 volumes); template, style and script in `assets/` know nothing of jobs.
The viewer is NiiVue, embedded with its licence.

    report = Report("Evaluation", {"weights": "sha256 c784..."})
    report.add_table("Volumes", frame, filters=["split", "label"])
    report.write("output/evaluate/report.html")
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from scripts.report.pictures import DPI
from scripts.run import replacing

__all__ = ["CEILING", "Report", "quantised"]

PAGE = Path(__file__).parent / "assets"
MOST_BYTES = 15_000_000  # of the page, so that it can be mailed
RESERVE = 1_500_000  # of that, for what is added after the viewer
CEILING = 1.2  # intensity of the brightest of 256 steps; 1 is the 99.5th percentile
MOST_VOXELS = 2_500_000  # of a volume in the viewer; finer ones are averaged


class Report:
    """A page, built section by section in the order in which it is read.

    Args:
        title: of the page.
        facts: name and value of what the page is about: version, weights, data, command.
    """

    def __init__(self, title: str, facts: Mapping[str, str]) -> None:
        self.title, self.facts = title, dict(facts)
        self.sections: list[dict[str, Any]] = []

    def add_table(
        self,
        title: str,
        frame: pd.DataFrame,
        filters: Sequence[str] = (),
        initial: Mapping[str, str] | None = None,
        better: Mapping[str, bool] | None = None,
        notes: Mapping[str, str] | None = None,
        text: str = "",
    ) -> None:
        """A table that can be sorted by every column and searched.

        Args:
            title: of the section.
            frame: the rows; a number that is not finite is shown as inf or nan, None as a dash.
            filters: columns of text with a choice of one value each.
            initial: the values chosen at first.
            better: for columns of numbers, whether large is good; the first click brings the worst to the top.
            notes: what a column means, shown when the pointer rests on it.
            text: a sentence above the table.
        """
        better, notes = better or {}, notes or {}
        columns: list[dict[str, Any]] = []
        cells: list[list[Any]] = []
        for name in frame.columns:
            number = pd.api.types.is_numeric_dtype(frame[name])
            good = {True: "more", False: "less"}.get(better[name], "") if name in better else ""
            columns.append(
                {
                    "name": name,
                    "number": number,
                    "digits": _digits(frame[name]) if number else 0,
                    "better": good,
                    "note": notes.get(name, ""),
                }
            )
            cells.append([_cell(value, number) for value in frame[name]])
        rows = [list(row) for row in zip(*cells, strict=True)]
        table = {"columns": columns, "rows": rows, "filters": list(filters), "initial": dict(initial or {})}
        self._add("table", title, text, json=_json(table))

    def add_charts(self, title: str, charts: Sequence[tuple[str, str]], text: str = "") -> None:
        """Charts side by side: pairs of a caption for those who cannot see it, and the SVG (`charts`)."""
        figures = [{"caption": caption, "svg": Markup(svg)} for caption, svg in charts]
        self._add("charts", title, text, figures=figures)

    def add_pictures(self, title: str, pictures: Sequence[tuple[str, Figure]], text: str = "") -> None:
        """Pictures below each other, with captions: figures of `pictures`."""
        figures = []
        for caption, figure in pictures:
            stream = io.BytesIO()
            # WebP is a fifth of PNG and every browser has it.
            figure.savefig(stream, format="webp", dpi=DPI, facecolor="black", pil_kwargs={"quality": 82})
            width, height = (round(inches * DPI) for inches in figure.get_size_inches())
            source = "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()
            figures.append({"caption": caption, "source": source, "width": width, "height": height})
        self._add("pictures", title, text, figures=figures)

    def add_viewer(
        self,
        title: str,
        volumes: Sequence[tuple[str, np.ndarray, np.ndarray | None, Sequence[float]]],
        text: str = "",
    ) -> None:
        """Three linked planes of each volume, of a pair its difference, too; the first volumes for which there is room.

        Args:
            title: of the section.
            volumes: name; image and reconstruction (or None for every volume), (D, H, W) of `quantised`, RAS; and
                the voxel size in mm.
            text: a sentence above the viewer.
        """
        room = MOST_BYTES - RESERVE - len(self.render())
        room -= 0 if self._has_viewer() else (PAGE / "niivue.umd.js").stat().st_size
        packs: dict[str, int] = {}  # base64 text and its number: systems share the image of a scan
        shown: list[dict[str, Any]] = []
        for name, image, recon, spacing in volumes:
            parts = [_packed(volume, spacing) for volume in (image, recon) if volume is not None]
            room -= sum(len(part) for part in parts if part not in packs)
            if room < 0:
                text = f"{text} {len(volumes) - len(shown)} more would make this page too large to be mailed.".strip()
                break
            numbers = [packs.setdefault(part, len(packs)) for part in parts]
            shown.append({"name": name, "image": numbers[0], "recon": numbers[1] if recon is not None else ""})
        if shown:
            self._add("viewer", title, text, volumes=shown, packs=list(packs))

    def render(self) -> str:
        """The page as text; the same sections give the same bytes."""
        environment = Environment(loader=FileSystemLoader(PAGE), autoescape=select_autoescape(["html"]))
        parts: dict[str, Any] = {
            name: Markup((PAGE / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")
        }
        if self._has_viewer():
            parts["niivue"] = Markup((PAGE / "niivue.umd.js").read_text(encoding="utf-8"))
            parts["niivue_license"] = (PAGE / "niivue_license.txt").read_text(encoding="utf-8")
        return environment.get_template("page.html").render(
            title=self.title, facts=self.facts, sections=self.sections, **parts
        )

    def write(self, path: str | Path) -> None:
        """Write the page; the file is whole or absent.

        Raises:
            InputError: the folder cannot be written to.
        """
        with replacing(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")

    def _add(self, kind: str, title: str, text: str, **content: Any) -> None:
        self.sections.append({"kind": kind, "title": title, "text": text, **content})

    def _has_viewer(self) -> bool:
        return any(section["kind"] == "viewer" for section in self.sections)


def quantised(volume: np.ndarray, top: float = 1.0) -> tuple[np.ndarray, int]:
    """A volume in 256 steps from 0 to 1.2 times `top`, averaged over cubes where it is too fine for a page.

    Args:
        volume: (D, H, W), any float type; not-finite values become 0.
        top: the intensity that is white.

    Returns:
        uint8 (D/k, H/k, W/k), and k; a remainder at the far edges is cut off.
    """
    factor = max(1, math.ceil((volume.size / MOST_VOXELS) ** (1 / 3)))
    volume = np.nan_to_num(np.asarray(volume, np.float32), nan=0, posinf=0, neginf=0)
    if factor > 1:
        d, h, w = (side // factor for side in volume.shape)
        cut = volume[: d * factor, : h * factor, : w * factor]
        volume = cut.reshape(d, factor, h, factor, w, factor).mean(axis=(1, 3, 5))
    return np.clip(np.rint(volume * (255 / (CEILING * top))), 0, 255).astype(np.uint8), factor


def _packed(volume: np.ndarray, spacing: Sequence[float]) -> str:
    """A gzipped NIfTI file in base64, with the same bytes for the same volume."""
    image = nib.Nifti1Image(volume, np.diag([*spacing, 1.0]))
    image.header["scl_slope"], image.header["scl_inter"] = CEILING / 255, 0
    return base64.b64encode(gzip.compress(image.to_bytes(), mtime=0)).decode()


def _cell(value: Any, number: bool) -> Any:
    if value is None or value is pd.NA:
        return None
    if not number:
        return str(value)
    return float(value) if math.isfinite(value) else str(float(value))


def _digits(column: pd.Series) -> int | None:
    """Decimals that show four figures of the column's typical value; 0 for whole numbers.

    None where sizes differ by more than a thousand: the page then gives each number three figures of its own.
    """
    values = column[np.isfinite(column.astype(float))].astype(float)
    if values.empty or (values == values.round()).all():
        return 0
    sizes = values[values != 0].abs()
    if sizes.max() > 1000 * sizes.min():
        return None
    return int(min(6, max(0, 3 - math.floor(math.log10(sizes.median())))))


def _json(data: Any) -> Markup:
    """JSON that cannot end the script element in which it stands."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
