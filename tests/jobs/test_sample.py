"""Sampling from its config: every prior, an interpolation, figures, and what a user can get wrong."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, TINY_JOB, make_weights
from monai.bundle import ConfigParser

from scripts.run import InputError

Run = Callable[..., subprocess.CompletedProcess[str]]

PRIORS = {
    "standard": [],
    "gaussian": ["--prior", "gaussian", "--label_value", "patient"],
    "lowrank": ["--prior", "lowrank", "--n_components", "3", "--residual", "True", "--split", "all"],
}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no folder": ({"prior": "gaussian", "dataset_dir": ""}, "folder made by encode.json"),
    "another prior": ({"prior": "flow"}, "'prior' is 'flow'"),
    "too many components": ({"prior": "lowrank", "n_components": 6}, "'n_components' is 6"),
    "unknown label": ({"prior": "gaussian", "label_value": "athlete"}, "with label 'athlete'"),
    "no samples": ({"n_samples": 0}, "'n_samples'"),
    "negative truncation": ({"truncation": -1}, "'truncation'"),
    "unknown volume": ({"between": ["sub-01_T1w", "sub-99_T1w"]}, "no latent 'sub-99_T1w'"),
    "one volume": ({"between": ["sub-01_T1w"]}, "names of two volumes"),
    "one step": ({"between": ["sub-01_T1w", "sub-02_T1w"], "n_steps": 1}, "'n_steps'"),
}
TINY_KEYS = {key.removeprefix("--"): value for key, value in zip(TINY_JOB[::2], TINY_JOB[1::2], strict=True)}
TINY_KEYS = {key: ast.literal_eval(value) for key, value in TINY_KEYS.items() if key != "device"}


def sampling(folder: Path, output: Path, weights: Path, *more: str) -> list[str]:
    """Arguments of a sampling run."""
    return [
        "--config_file", "configs/sample.json", "--dataset_dir", str(folder), "--output_dir", str(output),
        "--weights", str(weights), "--n_samples", "2", *TINY_JOB, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_are_volumes(prior: str, encoded: Path, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Two NIfTIs in model space centred on the origin, with pictures."""
    run_bundle(*sampling(encoded, tmp_path, weights, *PRIORS[prior]))
    volumes = [nib.load(path) for path in sorted(tmp_path.glob("*.nii.gz"))]
    assert [volume.shape for volume in volumes] == [(32, 36, 32)] * 2
    assert np.isfinite(volumes[0].get_fdata()).all()
    assert not np.array_equal(volumes[0].get_fdata(), volumes[1].get_fdata())
    np.testing.assert_allclose(volumes[0].affine @ [15.5, 17.5, 15.5, 1], [0, 0, 0, 1], atol=1e-6)
    assert (tmp_path / "samples.png").is_file() and (tmp_path / "sample_0002_decoded.png").is_file()


def test_a_sample_depends_on_its_seed_and_number(encoded: Path, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """Sample 1 of 1 is sample 1 of 2, byte by byte; another seed gives another."""
    for folder, n, seed in (("one", 1, 0), ("two", 2, 0), ("other", 1, 1)):
        more = ["--n_samples", str(n), "--seed", str(seed)]
        run_bundle(*sampling(encoded, tmp_path / folder, weights, *more))
    one, two, other = ((tmp_path / f / "sample_0001_decoded.nii.gz").read_bytes() for f in ("one", "two", "other"))
    assert one == two != other


def test_the_way_between_two_subjects(encoded: Path, weights: Path, run_bundle: Run, tmp_path: Path) -> None:
    """As many volumes as steps and one strip; the first is the decoded latent of the first subject."""
    names = ["sub-01_T1w", "sub-02_T1w"]
    run_bundle(*sampling(encoded, tmp_path / "way", weights, "--between", str(names), "--n_steps", "3"))
    assert (tmp_path / "way" / "interpolation.png").is_file()
    assert len(list((tmp_path / "way").glob("step_*_decoded.nii.gz"))) == 3
    latent = encoded / f"{names[0]}_latent.safetensors"
    run_bundle(
        "--config_file", "configs/decode.json", "--dataset_dir", str(latent), "--output_dir", str(tmp_path / "end"),
        "--weights", str(weights), "--space", "model", *TINY_JOB,
    )  # fmt: skip
    ends = [
        nib.load(p).get_fdata() for p in (tmp_path / "way" / "step_01_decoded.nii.gz", *tmp_path.glob("end/*.nii.gz"))
    ]
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_figures_stand_beside_their_yardsticks(
    encoded: Path,
    bids: Path,
    weights: Path,
    run_bundle: Run,
    tmp_path: Path,
) -> None:
    """Distances from the real scans and from the training set, in files and on the screen."""
    done = run_bundle(*sampling(encoded, tmp_path, weights, "--prior", "gaussian", "--compare_with", str(bids)))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["n_samples"] == 2 and figures["n_real"] == 8
    for key in ("histogram_distance", "mmd", "mmd_real", "nearest_median", "nearest_least", "nearest_among_training"):
        assert np.isfinite(figures[key]) and key in done.stdout
    assert list(pd.read_csv(tmp_path / "nearest.csv")["name"]) == ["sample_0001", "sample_0002"]


def test_one_sample_cannot_be_compared(
    encoded: Path, bids: Path, weights: Path, run_bundle: Run, tmp_path: Path
) -> None:
    """Said before anything is decoded."""
    more = ["--n_samples", "1", "--compare_with", str(bids)]
    done = run_bundle(*sampling(encoded, tmp_path / "out", weights, *more), check=False)
    assert done.returncode == 2 and "'compare_with' compares two sets" in done.stderr
    assert not list(tmp_path.glob("out/*.nii.gz"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_sentence(mistake: str, encoded: Path, weights: Path, tmp_path: Path) -> None:
    """The config's own content, resolved without a process: an error before the first sample is decoded."""
    changes, message = MISTAKES[mistake]
    parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "sample.json"))
    parser.update({"dataset_dir": str(encoded), "output_dir": str(tmp_path), "weights": str(weights), **TINY_KEYS})
    parser.update(changes)
    with pytest.raises((RuntimeError, InputError)) as raised:  # MONAI wraps what it evaluates
        parser.get_parsed_content("dataset")[0]
    errors = [raised.value]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(cause)
    assert any(isinstance(error, InputError) and message in str(error) for error in errors)


def test_latents_of_other_weights_give_no_prior(encoded: Path, run_bundle: Run, tmp_path: Path) -> None:
    """A prior fits the decoder of its encoder only: exit code 2, one line, no volume."""
    other = make_weights(tmp_path / "other.pt", 5)
    done = run_bundle(*sampling(encoded, tmp_path / "out", other, "--prior", "gaussian"), check=False)
    assert done.returncode == 2 and "encoded with other weights" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/*.nii.gz"))
