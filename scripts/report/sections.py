"""Sections that the reports of several jobs share: facts, the table of all volumes, the worst and best cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from scripts.conventions import STRIDE
from scripts.report.cases import Case
from scripts.report.page import Report
from scripts.report.pictures import latent_strip
from scripts.run import bundle_version, command_line

__all__ = ["FILE_NAME", "LATENT_TEXT", "NOTES", "add_cases", "add_volumes", "facts_of", "group_of", "origin"]

FILE_NAME = "report.html"
NOTES = {
    "l1": "mean absolute error, 1 = 99.5th percentile of the scan; lower is better",
    "psnr": "dB over all voxels; higher is better",
    "psnr_brain": "dB over the foreground (above 0.05); higher is better",
    "ssim": "structural similarity in 3D; higher is better",
    "lpips": "perceptual distance, mean over all slices of three axes; lower is better",
    "kl": "nats per latent value",
    "p": "of Student's paired t-test",
    "p_wilcoxon": "of Wilcoxon's signed-rank test",
    "difference": "mean over subjects of this system minus the model",
}
LATENT_TEXT = (
    "The posterior mean, one column a channel, each in units of its own standard deviation. Structure that can be "
    "recognised says that the latent keeps the head's layout, as a diffusion model wants it."
)


def group_of(rows: pd.DataFrame) -> str:
    """The column by which volumes are told apart in a chart, "" where there is one kind."""
    return next((name for name in ("label", "split") if rows[name].nunique() > 1), "")


def add_volumes(
    report: Report,
    rows: pd.DataFrame,
    initial: Mapping[str, str] | None = None,
    better: Mapping[str, bool] | None = None,
    text: str = "",
) -> None:
    """The table of all volumes, without the columns of the record that are empty; see `Report.add_table`."""
    shown = rows.drop(columns=[name for name in ("session", "label") if (rows[name] == "").all()])
    filters = [name for name in ("system", "split", "label") if name in shown]
    report.add_table("All volumes", shown, filters, initial, better, NOTES, text)


def add_cases(report: Report, cases: Sequence[tuple[str, Case]], ranked: str) -> None:
    """Pictures, channels and viewer of the chosen volumes."""
    titles = [f"{why}: {case.name}" for why, case in cases]
    panels = [(title, case.panel(case.name)) for title, (_, case) in zip(titles, cases, strict=True)]
    report.add_pictures("Worst and best", panels, f"Volumes {ranked}.")
    compared = [(t, case.strip(case.name)) for t, (_, case) in zip(titles, cases, strict=True) if len(case.recons) > 1]
    if compared:
        report.add_pictures("Systems side by side", compared)
    case = cases[0][1]
    if case.mu is not None:
        strip = latent_strip(case.mu, [STRIDE * size for size in case.spacing], case.name)
        report.add_pictures("Latent channels", [(titles[0], strip)], LATENT_TEXT)
    volumes = []
    for title, (_, case) in zip(titles, cases, strict=True):
        for system, recon in case.recons.items():
            name = title if len(case.recons) == 1 else f"{title}, {system}"
            volumes.append((name, case.image, recon, case.spacing))
    report.add_viewer("Viewer", volumes)


def facts_of(rows: pd.DataFrame, more: Mapping[str, str], split: str = "", command: bool = True) -> dict[str, str]:
    """What a page is about: how many volumes, `more`, the bundle, and the command where it made all of them."""
    data = f"{len(rows)} volumes"
    if "subject" in rows:
        data += f" of {rows['subject'].nunique()} subjects"
    if split:
        data += f", split {split}"
    return {"data": data, **more, **origin(), **({"command": command_line()} if command else {})}


def origin() -> dict[str, str]:
    """The bundle's name and version."""
    return {"bundle": f"brain_t1_vae {bundle_version()}"}
