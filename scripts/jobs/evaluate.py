"""What an evaluation writes: every figure of the protocol a volume, summarised, compared, and shown in a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from scripts.latents import RECORD_KEYS, ActiveUnits
from scripts.metrics import (
    COLUMNS,
    Baseline,
    MeanSpectra,
    Peer,
    format_paired,
    format_table,
    paired_differences,
    reconstruction_metrics,
    summarise,
    summary_frame,
)
from scripts.networks import Posterior
from scripts.report import (
    FILE_NAME,
    NOTES,
    Case,
    Cases,
    Report,
    add_cases,
    add_volumes,
    cumulative_charts,
    distribution_charts,
    facts_of,
    group_of,
    spectrum_chart,
    to_ras,
)
from scripts.run import command_line, file_sha256, gathered, joined_shares, replacing
from scripts.transforms import plain_volume

__all__ = ["EvaluationWriter", "evaluation_report"]

RANKED_BY = "psnr_brain"  # the figure that background cannot flatter


class EvaluationWriter:
    """Every figure of the protocol, per volume and summarised, for the model and what it is measured against.

    Systems: `model` (the posterior mean), the peers, `identity` (preprocessing, its inverse and preprocessing again:
    what the protocol alone costs) and the baselines. Writes `metrics.csv` (one line a volume and system),
    `summary.json`, `paired.csv` (each system against the model), `spectrum.csv` (of images, reconstructions and
    latents), `table.txt` and `report.html`, and prints the table.
    In several processes each measures its own scans (`share_of_rank`); the first writes, in the cohort's order.

    Args:
        output_dir: where to write.
        preprocessing: the transform that made the volumes, for `identity`.
        lpips: `LPIPS3D`, on the network's device.
        baselines: codes to run beside the model; fitted on `training` when the run starts.
        training: preprocessed training split for the baselines that are fitted; None where there is none.
        split: name of the split, for the table.
        weights: the weights file, for its sha256.
        peers: other models, from `metrics.read_peers`.
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
        peers: Sequence[Peer] = (),
    ) -> None:
        self.output_dir = Path(output_dir)
        self.preprocessing = preprocessing
        self.lpips = lpips
        self.baselines = list(baselines)
        self.training = training
        self.split, self.weights = split, weights
        self.peers = list(peers)
        self.rows: list[list[dict[str, Any]]] = []  # by volume
        self.active_units = ActiveUnits()
        self.spectra = MeanSpectra()
        self.cases = Cases()

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose iteration keeps the posterior (`posterior_iteration`)."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _start(self, engine: Engine) -> None:
        self.rows, self.active_units, self.spectra, self.cases = [], ActiveUnits(), MeanSpectra(), Cases()
        for peer in self.peers:
            peer.check(record["name"] for record in engine.state.dataloader.dataset.data)
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
            base = {key: record.get(key, "") for key in RECORD_KEYS}
            x = plain_volume(image)[None]
            shown = {"model": plain_volume(pred)[None]}
            shown |= {peer.name: plain_volume(peer(record["name"], image))[None] for peer in self.peers}
            self._add_spectra({"image": x[0], **{name: y[0] for name, y in shown.items()}, "latent": mu[0]}, image)
            systems = {**shown, "identity": plain_volume(self._identity(image))[None]}
            systems |= {code.name: code(x) for code in self.baselines}
            self.rows.append([])
            for system, y in systems.items():
                row = reconstruction_metrics(x, y, self.lpips)
                if system == "model":
                    row["kl"] = float(Posterior(mu, logvar).kl().mean())
                    self.cases.add(-row[RANKED_BY], partial(_case, record["name"], image, shown, mu))
                self.rows[-1].append({**base, "system": system, **row})

    def _add_spectra(self, volumes: dict[str, torch.Tensor], image: MetaTensor) -> None:
        extent = image.pixdim.numpy() * image.shape[1:]
        for kind, volume in volumes.items():
            self.spectra.update(kind, volume, extent / volume.shape[1:])

    def _identity(self, image: MetaTensor) -> torch.Tensor:
        """The volume sent home to its source grid and brought back (all transforms after the loading)."""
        home = self.preprocessing.inverse({"image": image})
        return Compose(self.preprocessing.transforms[1:])(home)["image"]

    def _collect(self) -> tuple[list[dict[str, Any]], ActiveUnits, MeanSpectra, Cases]:
        """What all processes have measured, as if one had: rows in the cohort's order, sums over volumes, cases."""
        rows = [row for volume in joined_shares(self.rows) for row in volume]
        active_units, spectra, cases = ActiveUnits(), MeanSpectra(), Cases()
        for share in gathered(self.active_units):
            active_units.merge(share)
        for spectra_share in gathered(self.spectra):
            spectra.merge(spectra_share)
        kept = [
            ((number, rank), found)  # sorts as the cohort does: a round of shares after the other
            for rank, share in enumerate(gathered(self.cases.kept))
            for number, found in share.items()
        ]
        for _, (badness, case) in sorted(kept, key=lambda item: item[0]):
            cases.add(badness, partial(replace, case))
        return rows, active_units, spectra, cases

    def _finish(self, engine: Engine) -> None:
        rows, active_units, spectra, cases = self._collect()
        if engine.state.rank == 0:
            self._write(pd.DataFrame(rows), active_units, spectra.result(), cases)

    def _write(self, table: pd.DataFrame, active_units: ActiveUnits, spectra: pd.DataFrame, cases: Cases) -> None:
        summaries = {
            str(system): summarise(
                [dict(row) for _, row in rows.dropna(axis=1, how="all").iterrows()],
                active_units.share() if system == "model" else None,
            )
            for system, rows in table.groupby("system", sort=False)
        }
        sha256, command = file_sha256(self.weights), command_line()
        columns = [column for column in COLUMNS if column in table and column != "kl"]
        paired = paired_differences(table[table["system"] != "identity"], columns)
        text = format_table(summaries, split=self.split, weights_sha256=sha256, command=command)
        if self.peers:
            peers = [peer.name for peer in self.peers]
            text += "\n\n" + format_paired(paired[paired["system"].isin(peers)])
        about = {"split": self.split, "n": int((table["system"] == "model").sum()), "weights_sha256": sha256}
        for name, frame in (("metrics.csv", table), ("paired.csv", paired), ("spectrum.csv", spectra)):
            with replacing(self.output_dir / name) as temporary:
                frame.to_csv(temporary, index=False, float_format="%.6g")
        with replacing(self.output_dir / "summary.json") as temporary:
            temporary.write_text(json.dumps({**about, "command": command, "systems": summaries}, indent=2) + "\n")
        with replacing(self.output_dir / "table.txt") as temporary:
            temporary.write_text(text + "\n")
        shown, summary = cases.result(), summary_frame(summaries)
        evaluation_report(self.output_dir, table, summary, paired, spectra, shown, RANKED_BY, sha256, self.split)
        written = f"metrics.csv, paired.csv, spectrum.csv, summary.json, table.txt, {FILE_NAME}"
        print(f"\n{text}\n\nwritten to {self.output_dir}: {written}", flush=True)


def _case(name: str, image: MetaTensor, systems: dict[str, torch.Tensor], mu: torch.Tensor) -> Case:
    affine = image.affine.numpy()
    volume, spacing = to_ras(plain_volume(image)[0].cpu().numpy(), affine)
    recons = {system: to_ras(y[0, 0].cpu().numpy(), affine)[0] for system, y in systems.items()}
    return Case.of_volumes(name, volume, recons, spacing, mu=mu[0].cpu().numpy())


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
        paired: from `metrics.paired_differences`.
        spectra: from `spectrum.MeanSpectra.result`.
        cases: from `Cases.result`.
        ranked_by: the figure that ranked them.
        weights_sha256: of the model.
        split: its name.
    """
    model = rows[rows["system"] == "model"]
    report = Report("Evaluation of the reconstruction", facts_of(model, {"weights": f"sha256 {weights_sha256}"}, split))
    report.add_table("Summary", summary, notes=NOTES, text="Mean ± standard deviation over volumes.")
    if len(paired):
        text = (
            "Mean difference from the model on the same scans, volumes of one subject averaged first, with its 95 % "
            "confidence interval. An interval that holds 0 is no evidence of a difference. Many comparisons are "
            "made here and p is not corrected for their number."
        )
        chosen = {"system": "", "figure": ranked_by}
        report.add_table("Paired comparison", paired, list(chosen), chosen, notes=NOTES, text=text)
    group = group_of(model)
    columns = [column for column in COLUMNS if column in model and model[column].notna().any()]
    by = f", by {group}" if group else ""
    report.add_charts("Distributions", distribution_charts(model, columns, group), f"One point a volume{by}.")
    systems = [name for name in rows["system"].unique() if name != "identity"]
    if len(systems) > 1:
        better = {column: COLUMNS[column] for column in columns if column != "kl"}
        text = "How large a share of the volumes reaches a figure: the farther up at a place, the better the system."
        report.add_charts("Against the baselines", cumulative_charts(rows, better, systems), text)
    report.add_charts("Power spectra", [spectrum_chart(spectra)], SPECTRUM_TEXT)
    add_volumes(report, rows, {"system": "model"}, COLUMNS, "Choose a column's name to sort by it.")
    add_cases(report, cases, f"ranked by {ranked_by}")
    report.write(folder / FILE_NAME)
