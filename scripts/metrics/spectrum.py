"""Radial power spectra: which spatial frequencies an image, its reconstruction and its latent are made of.

Where a reconstruction's spectrum falls below the image's, detail is blurred. Where the latent's falls slower than the
image's, its channels hold more fine structure than the image has at that scale, which diffusion models find hard to
make (Skorokhodov et al. 2025, https://arxiv.org/abs/2502.14831).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

__all__ = ["MeanSpectra", "radial_power"]

BIN = 0.01  # cycles per mm: wider than the steps of the 168 to 204 mm long model space


def radial_power(volume: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """Power density by spatial frequency, mean over directions and channels.

    Args:
        volume: (C, D, H, W); each channel is put to mean 0 and standard deviation 1 first.
        spacing: voxel size by axis in mm.

    Returns:
        (n,) float64 density, of which entry i is the mean of |FFT|^2 over frequencies from i to i + 1 hundredths of a
        cycle per mm, over the number of values squared, times the volume in mm^3, so that spectra of different grids
        compare; NaN where a grid has no frequency; up to the Nyquist frequency of the coarsest axis.
    """
    values = volume.detach().as_subclass(torch.Tensor).double().cpu()
    axes = (1, 2, 3)
    values = values - values.mean(axes, keepdim=True)
    values = values / values.std(axes, correction=0, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    power = torch.fft.fftn(values, dim=axes).abs().square().mean(0)
    power[0, 0, 0] = 0  # the mean, but for rounding
    sides = volume.shape[1:]
    grids = torch.meshgrid(
        *[torch.fft.fftfreq(side, step, dtype=torch.float64) for side, step in zip(sides, spacing, strict=True)],
        indexing="ij",
    )
    index = (torch.stack(grids).square().sum(0).sqrt() / BIN).long().flatten()
    n_bins = int(0.5 / max(spacing) / BIN)
    total = torch.bincount(index, power.flatten(), minlength=n_bins)[:n_bins]
    count = torch.bincount(index, minlength=n_bins)[:n_bins]
    count[0] -= 1
    extent = float(np.prod([side * step for side, step in zip(sides, spacing, strict=True)]))
    return total / count * extent / float(np.prod(sides)) ** 2


class MeanSpectra:
    """Mean spectra over volumes, one at a time, of kinds that may differ in grid."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.n: dict[str, int] = {}

    def update(self, kind: str, volume: torch.Tensor, spacing: Sequence[float]) -> None:
        """Add a volume; arguments of `radial_power`."""
        self._add(kind, radial_power(volume, spacing), 1)

    def merge(self, other: MeanSpectra) -> None:
        """Add what another instance has seen."""
        for kind, total in other.sums.items():
            self._add(kind, total, other.n[kind])

    def result(self) -> pd.DataFrame:
        """One row a frequency: `frequency` (cycles per mm, middle of the bin) and each kind's mean density in mm^3."""
        columns = {kind: pd.Series((total / self.n[kind]).numpy()) for kind, total in self.sums.items()}
        frame = pd.DataFrame(columns)
        frame.insert(0, "frequency", (np.arange(len(frame)) + 0.5) * BIN)
        return frame

    def _add(self, kind: str, total: torch.Tensor, n: int) -> None:
        self.sums[kind] = self.sums[kind] + total if kind in self.sums else total
        self.n[kind] = self.n.get(kind, 0) + n
