"""Sampling from its config: every prior, an interpolation, figures, and what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Job, make_weights
from in_process import input_error, parsed

from scripts.latents import read_manifest_latents
from scripts.run import InputError

LOWRANK = {"prior": "lowrank", "n_components": 3}
PAIR = ["sub-01_T1w", "sub-02_T1w"]
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"prior": "gaussian", "dataset_dir": ""}, "folder made by encode.json"),
    "unknown label": ({"prior": "gaussian", "label_value": "athlete"}, "with label 'athlete'"),
    "another network": ({"prior": "gaussian", "spatial_size": [32, 32, 32]}, "encode the cohort anew"),
    "other weights": ({"prior": "gaussian", "weights": "other.pt"}, "encoded with other weights"),
    "unknown volume": ({"between": [PAIR[0], "sub-99_T1w"]}, "no latent 'sub-99_T1w'"),
    "one volume": ({"between": PAIR[:1]}, "names of two volumes"),
}


def test_samples_are_volumes_beside_their_yardsticks(sampled: Job) -> None:
    """NIfTIs in model space centred on the origin, pictures, and distances in files and on the screen."""
    volumes = [nib.load(path) for path in sorted(sampled.folder.glob("*.nii.gz"))]
    assert [volume.shape for volume in volumes] == [(32, 36, 32)] * 3
    assert len({volume.get_fdata().tobytes() for volume in volumes}) == 3
    np.testing.assert_allclose(volumes[0].affine @ [15.5, 17.5, 15.5, 1], [0, 0, 0, 1], atol=1e-6)
    assert (sampled.folder / "samples.png").is_file()
    figures = json.loads((sampled.folder / "figures.json").read_text())
    assert figures["n_samples"] == 3 and figures["n_real"] == 8
    for key in ("histogram_distance", "mmd", "mmd_real", "nearest_median", "nearest_least", "nearest_among_training"):
        assert np.isfinite(figures[key]) and key in sampled.console
    nearest = pd.read_csv(sampled.folder / "nearest.csv")
    assert figures["nearest_least"] == pytest.approx(nearest["distance"].min(), rel=1e-5)  # six digits are written
    assert figures["nearest_median"] == pytest.approx(nearest["distance"].median(), rel=1e-5)
    assert set(nearest["nearest"]) <= {f"sub-0{number}_T1w" for number in range(1, 7)}  # of the training split


def test_a_prior_is_fitted_and_drawn_as_the_keys_say(encoded: Path, weights: Path) -> None:
    """Of the training split alone by default, or of the patients of all; the residual is passed on; a sample does not
    depend on how many there are, but on the seed and the truncation."""
    keys = {"dataset_dir": encoded, "weights": weights}
    for more, split, label in (({}, "train", ""), ({"split": "all", "label_value": "patient"}, "all", "patient")):
        prior = parsed("sample", **keys, prior="gaussian", **more).get_parsed_content("fitted_prior")
        expected = torch.stack([latent.mu for latent in read_manifest_latents(encoded, split, label)]).mean(0)
        torch.testing.assert_close(prior.mean, expected, rtol=1e-5, atol=1e-6)
    for residual in (False, "True"):
        prior = parsed("sample", **keys, **LOWRANK, residual=residual).get_parsed_content("fitted_prior")
        assert len(prior.components) == 3 and (prior.residual is not None) == bool(residual)
    first, *others = (
        parsed("sample", **keys, **LOWRANK, **more).get_parsed_content("dataset")[0]["latent"]
        for more in ({"n_samples": 1}, {"n_samples": 3}, {"seed": 1}, {"truncation": 0.5})
    )
    assert [torch.equal(first, other) for other in others] == [True, False, False]


def test_the_way_between_two_subjects(encoded: Path, weights: Path, tmp_path: Path) -> None:
    """As many volumes as steps and one strip; the ends are the subjects' latents, decoded."""
    keys = {"dataset_dir": encoded, "output_dir": tmp_path, "weights": weights, "between": PAIR, "n_steps": 3}
    job = parsed("sample", **keys)
    job.get_parsed_content("evaluator").run()
    assert (tmp_path / "interpolation.png").is_file()
    volumes = [nib.load(path).get_fdata() for path in sorted(tmp_path.glob("step_*_decoded.nii.gz"))]
    ends = [latent.mu for latent in read_manifest_latents(encoded) if latent.header["name"] in PAIR]
    with torch.no_grad():
        expected = job.get_parsed_content("network").decode(torch.stack(ends))[:, 0]
    assert len(volumes) == 3
    np.testing.assert_allclose(np.stack([volumes[0], volumes[2]]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence(mistake: str, encoded: Path, weights: Path, tmp_path: Path) -> None:
    """An error before the first sample is decoded, naming the key or the folder."""
    changes, message = MISTAKES[mistake]
    if "weights" in changes:
        changes = {**changes, "weights": make_weights(tmp_path / changes["weights"], 5)}
    with pytest.raises((RuntimeError, InputError)) as raised:
        parsed("sample", **{"dataset_dir": encoded, "weights": weights, **changes}).get_parsed_content("dataset")[0]
    assert message in input_error(raised.value)
