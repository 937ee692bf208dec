"""From a cohort to a finished folder of latents, through any number of interruptions.

`encode.json` asks `scans_to_encode` what is left to do, attaches `LatentWriter`, and calls its `finish` at the end.
The files are the state. A file that is there is whole and says in its header what it was made from and
by which weights and preprocessing; a run encodes what is missing, and manifest and statistics are made from the
files when none is missing, so that they are the same whoever wrote them, in how many runs and processes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import Compose
from tqdm import tqdm

from scripts.latents import (
    DTYPES,
    ENDING,
    MANIFEST,
    RECORD_KEYS,
    STATISTICS,
    Latent,
    LatentStatistics,
    latent_files,
    latent_path,
    manifest_entry,
    read_header,
    read_latent,
    write_latent,
)
from scripts.report import (
    FILE_NAME,
    LATENT_TEXT,
    Report,
    add_volumes,
    distribution_charts,
    facts_of,
    group_of,
    latent_strip,
)
from scripts.run import (
    InputError,
    as_flag,
    bundle_version,
    file_sha256,
    is_first,
    remove_unfinished,
    replacing,
    share_of_rank,
    wait_for_all,
)
from scripts.transforms import SourceGrid, preprocessing_sha256

__all__ = ["LatentWriter", "encoding_report", "encoding_settings", "finish_folder", "scans_to_encode"]

SETTINGS = {"weights_sha256": "weights", "preprocessing_sha256": "preprocessing", "dtype": "dtype"}
MOST_SHOWN = 2  # latents whose channels are drawn in the report
MOST_WAITING = 4  # volumes that may wait for the disk before the encoder waits for it, too


def encoding_settings(weights: str, preprocessing: Compose, dtype: str) -> dict[str, str]:
    """What decides about a latent besides the scan; every file of a folder was made with the same.

    Args:
        weights: the weights file.
        preprocessing: the transform into model space.
        dtype: `float16` or `float32`.

    Raises:
        InputError: the dtype is none of its values, or the weights cannot be read.
    """
    if dtype not in DTYPES:
        raise InputError(f"'dtype' is {dtype!r}; give {' or '.join(DTYPES)}.")
    about = {"weights_sha256": file_sha256(weights), "preprocessing_sha256": preprocessing_sha256(preprocessing)}
    return {**about, "dtype": dtype}


def scans_to_encode(
    scans: Sequence[dict[str, str]],
    output_dir: str,
    settings: Mapping[str, str],
    overwrite: bool | str,
    shards: int = 0,
) -> list[dict[str, str]]:
    """This process's share of the scans, less those whose latents are there already.

    Args:
        scans: records of the cohort.
        output_dir: the folder of latents.
        settings: from `encoding_settings`.
        overwrite: whether latents of other weights, preprocessing or scans are made anew; else they are refused.
        shards: see `latent_path`.

    Raises:
        InputError: the folder holds latents that this run may not replace.
    """
    overwrite = as_flag(overwrite, "overwrite")
    folder, names, share = Path(output_dir), {scan["name"] for scan in scans}, share_of_rank(scans)
    sources = {scan["name"]: scan["image"] for scan in share}  # each process hashes its own
    done, stale = set(), False
    for path in tqdm(latent_files(folder), desc="latents there already", disable=None, leave=False):
        header = read_header(path)
        name = path.name.removesuffix(ENDING)
        changed = [text for key, text in SETTINGS.items() if header.get(key) != settings[key]]
        if name in names and path != latent_path(folder, name, shards):
            raise InputError(f"{path} was written with another 'shards'; use that number, or another output_dir.")
        if name in sources and header["source_sha256"] != file_sha256(sources[name]):
            changed.append("scan")
        if changed and not (overwrite and name in names):
            remedy = "add --overwrite True or give" if name in names else "it is not of this cohort: give"
            raise InputError(
                f"{path} was made with another {' and another '.join(changed)}; {remedy} another output_dir."
            )
        stale = stale or bool(changed)
        if not changed:
            done.add(name)
    if stale:
        for name in (MANIFEST, STATISTICS):  # they speak of files that are about to change
            (folder / name).unlink(missing_ok=True)
    return [scan for scan in share if scan["name"] not in done]


class LatentWriter:
    """`<name>_latent.safetensors` a volume, written beside the encoding of the next one; manifest and statistics.

    Args:
        output_dir: the folder of latents.
        settings: from `encoding_settings`.
        shards: see `latent_path`.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, str], shards: int = 0) -> None:
        self.folder = Path(output_dir)
        self.settings = dict(settings)
        self.shards = shards
        self.version = bundle_version()
        self.waiting: deque[Future[None]] = deque()
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="latent-writer")

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator whose iteration gives mu and logvar (`encode_iteration`)."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._volumes)
        engine.add_event_handler(Events.COMPLETED, self._drain)

    def finish(self) -> None:
        """Once every process is done, the first writes manifest and statistics of all files, and says where they are.

        Raises:
            InputError: a file was made with other settings by a process that ran at the same time.
        """
        wait_for_all()
        if is_first():
            finish_folder(self.folder, self.settings)
        wait_for_all()

    def _volumes(self, engine: Engine) -> None:
        dtype = DTYPES[self.settings["dtype"]]
        for record, output in zip(engine.state.batch, engine.state.output, strict=True):
            mu, logvar = (output[key].detach().as_subclass(torch.Tensor).to("cpu", dtype) for key in ("mu", "logvar"))
            about = {key: record.get(key, "") for key in RECORD_KEYS}
            self.waiting.append(self.pool.submit(self._write, about, output["image"], mu, logvar))
        while len(self.waiting) > MOST_WAITING:
            self.waiting.popleft().result()

    def _drain(self, engine: Engine) -> None:
        while self.waiting:
            self.waiting.popleft().result()

    def _write(self, about: dict[str, str], image: MetaTensor, mu: torch.Tensor, logvar: torch.Tensor) -> None:
        source = Path(image.meta["filename_or_obj"])
        header = {
            **about,
            **self.settings,
            "source_file": source.name,
            "source_sha256": file_sha256(source),
            "bundle_version": self.version,
            **SourceGrid.of_image(image).as_header(),
        }
        write_latent(latent_path(self.folder, about["name"], self.shards), mu, logvar, header)


def finish_folder(folder: str | Path, settings: Mapping[str, str]) -> None:
    """Write manifest and statistics of all latents of a folder.

    Args:
        folder: the folder of latents.
        settings: what every file must have been made with.

    Raises:
        InputError: a file was made with other settings, or is damaged.
    """
    folder = Path(folder)
    remove_unfinished(folder)
    statistics = LatentStatistics()
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, np.ndarray]] = []
    with replacing(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as manifest:
        for path in tqdm(latent_files(folder), desc="manifest and statistics", disable=None, leave=False):
            latent = read_latent(path)
            if any(latent.header.get(key) != value for key, value in settings.items()):
                raise InputError(f"{path} was made with other settings than the rest of the folder; delete it.")
            statistics.update(latent.mu, latent.logvar)
            rows.append(_row(latent))
            if len(shown) < MOST_SHOWN:
                shown.append((rows[-1]["name"], latent.mu.float().numpy()))
            manifest.write(json.dumps(manifest_entry(folder, path, latent.header)) + "\n")
    result = {**statistics.result(), **settings, "bundle_version": bundle_version()}
    with replacing(folder / STATISTICS) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    encoding_report(folder, pd.DataFrame(rows), result, shown)
    print(f"{_channels(result).to_string(index=False, float_format='%.4f')}\n{_summary(result)}")
    print(f"{result['n']} latents, {MANIFEST}, {STATISTICS} and {FILE_NAME} are in {folder}", flush=True)


def _row(latent: Latent) -> dict[str, Any]:
    """What the report says of one latent."""
    posterior = latent.posterior
    about = {key: latent.header.get(key, "") for key in RECORD_KEYS}
    figures = {"mean of mu": float(posterior.mu.mean()), "sd of mu": float(posterior.mu.std(unbiased=False))}
    return {**about, "kl": float(posterior.kl().mean()), **figures}


def _channels(statistics: Mapping[str, Any]) -> pd.DataFrame:
    """The statistics as a table of one line a channel, and one over all of them."""
    mu, z, scale = statistics["mu"], statistics["z"], statistics["scale_factor"]
    return pd.DataFrame(
        {
            "channel": [*map(str, range(len(mu["mean"]))), "overall"],
            "mean of mu": [*mu["mean"], mu["mean_overall"]],
            "sd of mu": [*mu["sd"], mu["sd_overall"]],
            "sd of z": [*z["sd"], z["sd_overall"]],
            "scale factor": [*scale["channel"], scale["overall"]],
        }
    )


def _summary(statistics: Mapping[str, Any]) -> str:
    units = statistics["active_units"]
    return f"KL {statistics['kl']:.4g} nats a value; active units {'-' if units is None else f'{units:.3f}'}."


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
    report = Report("Latents of a cohort", facts_of(rows, facts, command=False))
    report.add_table("Channels", _channels(statistics), text=_summary(statistics))
    columns = ["kl", "mean of mu", "sd of mu"]
    report.add_charts("Distributions", distribution_charts(rows, columns, group_of(rows)), "One point a volume.")
    shape = statistics["shape"]
    pictures = [(f"{name}, mu of {shape}", latent_strip(mu, title=name)) for name, mu in shown]
    report.add_pictures("Latent channels", pictures, LATENT_TEXT)
    add_volumes(report, rows)
    report.write(folder / FILE_NAME)
