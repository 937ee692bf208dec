"""Power spectra: what is known of waves, noise and blur."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from scripts.metrics import MeanSpectra, radial_power

SPACING = (1.5, 1.5, 1.5)
SHAPE = (1, 48, 56, 48)


def noise(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """White."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spacing", [SPACING, (1.5, 1.5, 3.0)])
def test_white_noise_is_flat_at_the_volume_of_a_voxel(spacing: tuple[float, ...]) -> None:
    """Parseval: variance 1 is spread over 1 / voxel volume, up to the coarsest axis' Nyquist frequency."""
    voxel = spacing[0] * spacing[1] * spacing[2]
    power = radial_power(noise(shape=(1, 64, 64, 64)), spacing)
    assert len(power) == int(0.5 / max(spacing) / 0.01)
    assert power[6:].numpy() == pytest.approx(voxel, rel=0.25)  # lower bins hold few frequencies


def test_the_mean_is_no_frequency() -> None:
    """The first bin holds the wave of one period, twice, and not the zero frequency: half of the variance each."""
    volume = torch.sin(2 * torch.pi * torch.arange(128) / 128).view(1, 128, 1, 1).expand(1, 128, 16, 16)
    extent = 128 * 1.5 * (16 * 1.5) ** 2
    assert float(radial_power(volume, SPACING)[0]) == pytest.approx(extent / 2)


def test_two_shares_are_the_mean_of_all() -> None:
    """Of volumes on two grids; the coarse one ends at its own Nyquist frequency."""
    parts = [MeanSpectra(), MeanSpectra()]
    for seed in range(3):
        parts[seed % 2].update("image", noise(seed), SPACING)
        parts[seed % 2].update("latent", noise(seed, (4, 12, 14, 12)), (6.0, 6.0, 6.0))
    parts[0].merge(parts[1])
    frame = parts[0].result()
    mean = torch.stack([radial_power(noise(seed), SPACING) for seed in range(3)]).mean(0)
    pd.testing.assert_series_equal(frame["image"], pd.Series(mean.numpy()), check_names=False)
    assert frame["frequency"][1] == pytest.approx(0.015)
    assert frame["frequency"][frame["latent"].last_valid_index()] < 1 / 12 < frame["frequency"].iloc[-1]
