"""The report of each job: which sections its page has, in which order, and what their sentences say.

The writers call these at the end of a run. The page itself is `report.Report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scripts.cases import Case
from scripts.files import file_sha256
from scripts.metrics import COLUMNS
from scripts.picture_strips import latent_strip, volume_strip
from scripts.provenance import bundle_version, command_line
from scripts.report import Report, quantised
from scripts.report_charts import cumulative_charts, curve_charts, distribution_charts, spectrum_chart

__all__ = [
    "FILE_NAME",
    "decoding_report",
    "encoding_report",
    "evaluation_report",
    "reconstruction_report",
    "training_report",
]

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

SPECTRUM_TEXT = (
    "Of values with standard deviation 1. Where the reconstruction falls below the image, detail of that size is "
    "blurred. Where the latent falls slower than the image, its channels hold more fine structure than the image has, "
    "which is hard for a diffusion model to learn."
)


def evaluation_report(
    folder: Path,
    rows: pd.DataFrame,
    summary: pd.DataFrame,
    paired: pd.DataFrame,
    spectra: pd.DataFrame,
    cases: Sequence[tuple[str, Case]],
    ranked_by: str,
    weights_sha256: str,
    split: str,
) -> None:
    """Write the page of an evaluation.

    Args:
        folder: where `report.html` is written.
        rows: one row a volume and system.
        summary: one row a system, mean ± sd as text.
        paired: from `comparison.paired_differences`.
        spectra: from `spectrum.MeanSpectra.result`.
        cases: from `Cases.result`.
        ranked_by: the figure that ranked them.
        weights_sha256: of the model.
        split: its name.
    """
    model = rows[rows["system"] == "model"]
    report = Report("Evaluation of the reconstruction", _facts(model, {"weights": f"sha256 {weights_sha256}"}, split))
    report.add_table("Summary", summary, notes=NOTES, text="Mean ± standard deviation over volumes.")
    if len(paired):
        text = (
            "Mean difference from the model on the same scans, volumes of one subject averaged first, with its 95 % "
            "confidence interval. An interval that holds 0 is no evidence of a difference. Many comparisons are "
            "made here and p is not corrected for their number."
        )
        chosen = {"system": "", "figure": ranked_by}
        report.add_table("Paired comparison", paired, list(chosen), chosen, notes=NOTES, text=text)
    group = _group(model)
    columns = [column for column in COLUMNS if column in model and model[column].notna().any()]
    by = f", by {group}" if group else ""
    report.add_charts("Distributions", distribution_charts(model, columns, group), f"One point a volume{by}.")
    systems = [name for name in rows["system"].unique() if name != "identity"]
    if len(systems) > 1:
        better = {column: COLUMNS[column] for column in columns if column != "kl"}
        text = "How large a share of the volumes reaches a figure: the farther up at a place, the better the system."
        report.add_charts("Against the baselines", cumulative_charts(rows, better, systems), text)
    report.add_charts("Power spectra", [spectrum_chart(spectra)], SPECTRUM_TEXT)
    _add_volumes(report, rows, {"system": "model"}, COLUMNS, "Choose a column's name to sort by it.")
    _add_cases(report, cases, f"ranked by {ranked_by}")
    report.write(folder / FILE_NAME)


def reconstruction_report(folder: Path, rows: pd.DataFrame, cases: Sequence[tuple[str, Case]], weights: str) -> None:
    """Write the page of an inference: the columns of `summary.csv`, and the cases ranked by l1."""
    facts = _facts(rows, {"weights": f"sha256 {file_sha256(weights)}"} if weights else {})
    report = Report("Reconstruction", facts)
    report.add_table("All volumes", rows, better={"l1": False}, notes=NOTES)
    report.add_charts("Distributions", distribution_charts(rows, ["l1"]), "One point a volume.")
    _add_cases(report, cases, "ranked by l1")
    report.write(folder / FILE_NAME)


def encoding_report(
    folder: Path, rows: pd.DataFrame, statistics: Mapping[str, Any], shown: Sequence[tuple[str, np.ndarray]]
) -> None:
    """Write the page of a folder of latents.

    Args:
        folder: the folder of latents.
        rows: one row a latent: name, subject, session, label, split, kl, and mean and sd of mu.
        statistics: of the folder, as in `latent_stats.json`.
        shown: name and mu (C, D, H, W) of the latents whose channels are drawn.
    """
    facts = {"weights": f"sha256 {statistics['weights_sha256'] or 'not known'}"}
    report = Report("Latents of a cohort", _facts(rows, facts, command=False))
    channels = pd.DataFrame(
        {
            "channel": [str(number) for number in range(len(statistics["mu"]["mean"]))] + ["overall"],
            "mean of mu": [*statistics["mu"]["mean"], statistics["mu"]["mean_overall"]],
            "sd of mu": [*statistics["mu"]["sd"], statistics["mu"]["sd_overall"]],
            "sd of z": [*statistics["z"]["sd"], statistics["z"]["sd_overall"]],
            "scale factor": [*statistics["scale_factor"]["channel"], statistics["scale_factor"]["overall"]],
        }
    )
    units = statistics["active_units"]
    text = f"KL {statistics['kl']:.4g} nats a value; active units {'-' if units is None else f'{units:.3f}'}."
    report.add_table("Channels", channels, text=text)
    columns = ["kl", "mean of mu", "sd of mu"]
    report.add_charts("Distributions", distribution_charts(rows, columns, _group(rows)), "One point a volume.")
    shape = statistics["shape"]
    pictures = [(f"{name}, mu of {shape}", latent_strip(mu, title=name)) for name, mu in shown]
    report.add_pictures("Latent channels", pictures, LATENT_TEXT)
    _add_volumes(report, rows)
    report.write(folder / FILE_NAME)


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
    report = Report("Decoded volumes", {"volumes": str(n_written), **_origin(), "command": command_line()})
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


def training_report(output_dir: str, weights: str) -> None:
    """Write the page of a training from its `metrics.csv`; nothing where there is none yet.

    Args:
        output_dir: the training's folder.
        weights: the model file that the training has written; "" or missing: no hash is given.
    """
    path = Path(output_dir) / "metrics.csv"
    if not path.is_file():
        return
    frame = pd.read_csv(path)
    facts = {"epochs": str(frame["epoch"].max()), **_origin(), "command": command_line()}
    if Path(weights).is_file():
        facts["weights"] = f"sha256 {file_sha256(weights)}"
    report = Report("Training", facts)
    curves = [column for column in frame.columns if column != "epoch"]
    validation = [column for column in curves if column.startswith("val_")]
    others = [column for column in curves if column not in validation]
    for title, columns in (("Validation", validation), ("Training", others)):
        if columns:
            report.add_charts(
                title, curve_charts(frame, "epoch", columns), "docs/tensorboard.md says how to read them."
            )
    measured = frame.astype(object).where(frame.notna(), None)  # the start has no loss, most epochs no validation
    report.add_table("All epochs", measured, better={"val_l1": False})
    report.write(Path(output_dir) / FILE_NAME)


def _group(rows: pd.DataFrame) -> str:
    """The column by which volumes are told apart in a chart, "" where there is one kind."""
    return next((name for name in ("label", "split") if rows[name].nunique() > 1), "")


def _add_volumes(
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


def _add_cases(report: Report, cases: Sequence[tuple[str, Case]], ranked: str) -> None:
    """Pictures, channels and viewer of the chosen volumes."""
    titles = [f"{why}: {case.name}" for why, case in cases]
    panels = [(title, case.panel(case.name)) for title, (_, case) in zip(titles, cases, strict=True)]
    report.add_pictures("Worst and best", panels, f"Volumes {ranked}.")
    compared = [(t, case.strip(case.name)) for t, (_, case) in zip(titles, cases, strict=True) if len(case.recons) > 1]
    if compared:
        report.add_pictures("Systems side by side", compared)
    case = cases[0][1]
    if case.mu is not None:
        strip = latent_strip(case.mu, [4 * size for size in case.spacing], case.name)
        report.add_pictures("Latent channels", [(titles[0], strip)], LATENT_TEXT)
    volumes = []
    for title, (_, case) in zip(titles, cases, strict=True):
        for system, recon in case.recons.items():
            name = title if len(case.recons) == 1 else f"{title}, {system}"
            volumes.append((name, case.image, recon, case.spacing))
    report.add_viewer("Viewer", volumes)


def _facts(rows: pd.DataFrame, more: Mapping[str, str], split: str = "", command: bool = True) -> dict[str, str]:
    data = f"{len(rows)} volumes"
    if "subject" in rows:
        data += f" of {rows['subject'].nunique()} subjects"
    if split:
        data += f", split {split}"
    return {"data": data, **more, **_origin(), **({"command": command_line()} if command else {})}


def _origin() -> dict[str, str]:
    return {"bundle": f"brain_t1_vae {bundle_version()}"}
