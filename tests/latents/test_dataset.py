"""Latents as training data: fresh samples, scaled and padded; MONAI's diffusion on top."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_VAE
from monai.data import DataLoader
from test_storage import HEADER

from scripts.latents import (
    FirstStage,
    LatentDataset,
    LatentScaling,
    LatentStatistics,
    latent_datalist,
    latent_path,
    manifest_entry,
    read_header,
    read_latent,
    read_statistics,
    write_latent,
)
from scripts.networks import BrainVAE
from scripts.run import InputError

SHAPE = (4, 4, 6, 4)  # its middle side halves only once, like 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder of six latents; the last two are validation."""
    root = tmp_path_factory.mktemp("latents")
    statistics, entries = LatentStatistics(), []
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        mu = 3 * torch.randn(SHAPE, generator=generator) + 5
        logvar = torch.randn(SHAPE, generator=generator) - 2
        split = "val" if number > 3 else "train"
        path = latent_path(root, f"sub-{number}")
        write_latent(path, mu, logvar, {**HEADER, "name": f"sub-{number}", "split": split, "label": str(number % 2)})
        statistics.update(mu, logvar)
        entries.append(manifest_entry(root, path, read_header(path)))
    (root / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (root / "latent_stats.json").write_text(json.dumps(statistics.result()))
    return root


def test_a_sample_is_fresh(folder: Path) -> None:
    """Two loads of one file differ, also in two workers of one epoch; the mean is mu, scaled and padded."""
    data = LatentDataset(folder, scaling="raw")
    data.data = [data.data[0]] * 4
    drawn = torch.cat([batch["latent"] for batch in DataLoader(data, batch_size=1, num_workers=2)])
    assert len({float(z.sum()) for z in drawn}) == 4
    mean, mu = LatentDataset(folder, draw="mean", pad=True), read_latent(latent_path(folder, "sub-0")).mu
    assert torch.equal(mean[0]["latent"], LatentScaling("channel", read_statistics(folder), pad=True).apply(mu))


def test_a_split_and_its_labels(folder: Path, tmp_path: Path) -> None:
    """Records come along; a split without latents, unknown words, and changed or missing files are errors."""
    data = LatentDataset(folder, split="val")
    assert [(item["name"], item["label"]) for item in data] == [("sub-4", "0"), ("sub-5", "1")]
    for key, value in (("split", "test"), ("draw", "median"), ("scaling", "most")):
        with pytest.raises(InputError, match=f"{key} '{value}'|'{key}' is '{value}'"):
            LatentDataset(folder, **{key: value})
    copy = shutil.copytree(folder, tmp_path / "copy")
    victim = latent_path(copy, "sub-2")
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert len(latent_datalist(copy)) == 6
    with pytest.raises(InputError, match="sub-2"):
        latent_datalist(copy, check_hashes=True)
    victim.unlink()
    with pytest.raises(InputError, match="sub-2"):
        latent_datalist(copy)


def test_a_first_stage_for_monais_latent_diffusion(folder: Path) -> None:
    """A batch is taken as it is, and what is sampled is unpadded, unscaled and decoded."""
    data, vae = LatentDataset(folder, split="train", pad=True), BrainVAE(**TINY_VAE).eval()
    z, stage = next(iter(DataLoader(data, batch_size=2)))["latent"], FirstStage(vae, data.scaling, data.sides)
    assert stage.encode_stage_2_inputs(z) is z
    with torch.no_grad():
        raw = torch.stack([data.scaling.undo(one, data.sides) for one in z])
        torch.testing.assert_close(stage.decode_stage_2_outputs(z), vae.decode(raw))
    assert raw.shape[1:] == SHAPE != z.shape[1:]
