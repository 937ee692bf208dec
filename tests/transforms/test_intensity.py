"""Intensities on one scale: numpy's percentile, nothing clipped, the scanner's unit never lost."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import preprocessing

from scripts.run import InputError
from scripts.transforms import FACTOR_KEY, ScaleByPercentile, foreground_mask, percentile_of


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), percentile=st.sampled_from([50.0, 99.5, 100.0]))
def test_factor_is_numpys_percentile(seed: int, percentile: float) -> None:
    """The same linear interpolation between ranks, to float32."""
    values = np.random.default_rng(seed).gamma(2.0, 100.0, (1, 7, 8, 9)).astype(np.float32)
    values[:, :2] = 0  # air counts, too
    scaled = ScaleByPercentile(percentile)(torch.from_numpy(values))
    assert scaled.meta[FACTOR_KEY] == pytest.approx(np.percentile(values.astype(np.float64), percentile), rel=1e-6)
    assert percentile_of(scaled, percentile) == pytest.approx(1.0, rel=1e-5)


def test_scaling_twice_keeps_the_whole_factor() -> None:
    """The meta's factor leads back to the scanner's unit, and the inverses take it and the values back; to float32."""
    volume, scale = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 500, ScaleByPercentile()
    twice = scale(scale(volume) * 2)
    torch.testing.assert_close(twice.as_tensor() * twice.meta[FACTOR_KEY], volume * 2)
    back = scale.inverse(scale.inverse(twice) / 2)
    torch.testing.assert_close(back.as_tensor(), volume)
    assert back.meta[FACTOR_KEY] == pytest.approx(1)


def test_foreground_is_above_a_twentieth_of_the_percentile() -> None:
    """0 to 1000 in steps of 1: the 99.5th percentile is 995, and 50 the first above 49.75."""
    mask = foreground_mask(torch.arange(1001.0))
    assert int(mask.int().argmax()) == 50 and int(mask.sum()) == 951


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_scan_without_a_head_is_named(tmp_path: Path, value: float) -> None:
    """Where the percentile is not positive, one sentence with the file and what to do."""
    path = tmp_path / "sub-07_T1w.nii.gz"
    nib.save(nib.Nifti1Image(np.full((30, 30, 30), value, np.float32), np.diag([4.0, 4.0, 4.0, 1.0])), path)
    with pytest.raises(RuntimeError) as caught:  # MONAI's wrapper; `report_input_errors` looks through it
        preprocessing()({"image": str(path)})
    assert isinstance(caught.value.__cause__, InputError)
    assert all(word in str(caught.value.__cause__) for word in ("sub-07_T1w.nii.gz", "leave it out"))
