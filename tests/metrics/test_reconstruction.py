"""Figures of a reconstruction: their definitions, and their life inside MONAI's handlers."""

from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import MAEMetric, PSNRMetric, SSIMMetric

from scripts.metrics import VolumeMetric, reconstruction_metrics

SIZE = (12, 14, 13)  # SSIM's window is 11
CLOSE = 1e-5  # float32 sums over some thousand values against MONAI's in the same precision


def scan_and_reconstruction(batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A scan with an empty half and its reconstruction, both also outside [0, 1]: (B, 1, D, H, W)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 1, *SIZE, generator=generator) * 1.3
    x[..., : SIZE[2] // 2] = 0
    return x, x + 0.2 * torch.randn(x.shape, generator=generator)


def test_columns_are_monais_metrics_of_the_clamped_volumes() -> None:
    """L1, PSNR and SSIM agree with MONAI's, given both volumes clamped to [0, 1], in any form; LPIPS is called with
    both clamped, the reconstruction first. Autocast's bfloat16, whose steps near 1 are 0.008, would show in SSIM."""
    x, y = scan_and_reconstruction()
    a, b, seen = x.clamp(0, 1), y.clamp(0, 1), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = reconstruction_metrics(
            MetaTensor(x), MetaTensor(y), lambda *pair: seen.extend(pair) or torch.tensor([0.25])
        )
    assert list(row) == ["l1", "psnr", "psnr_brain", "ssim", "lpips"]
    assert row["l1"] == pytest.approx(float(MAEMetric()(b, a)), abs=CLOSE)
    assert row["psnr"] == pytest.approx(float(PSNRMetric(max_val=1.0)(b, a)), abs=1e-4)  # dB
    assert row["ssim"] == pytest.approx(float(SSIMMetric(spatial_dims=3, data_range=1.0)(b, a)), abs=CLOSE)
    assert row["lpips"] == 0.25
    torch.testing.assert_close(seen, [b, a], rtol=0, atol=0)


def test_psnr_brain_looks_at_the_scans_foreground_alone() -> None:
    """What the reconstruction adds in the background does not count, and 0.05 itself is background."""
    x = torch.zeros(SIZE)
    x[6:] = 0.5
    x[0] = 0.05
    y = x + 0.1
    assert reconstruction_metrics(x, y)["psnr_brain"] == pytest.approx(20.0, abs=1e-4)  # MSE 0.01
    y[:6] = 1.0
    assert reconstruction_metrics(x, y)["psnr_brain"] == pytest.approx(20.0, abs=1e-4)
    assert math.isnan(reconstruction_metrics(0 * x, y)["psnr_brain"])


@pytest.mark.parametrize("column", ["l1", "psnr_brain"])
def test_volume_metric_is_the_row_averaged(column: str) -> None:
    """A batch and a list of decollated volumes give each volume's own figure; aggregate is their mean."""
    x, y = scan_and_reconstruction(batch=3)
    metric = VolumeMetric(column)
    values = torch.cat([metric(y_pred=y[:1], y=x[:1]), metric(y_pred=list(y[1:]), y=list(x[1:]))])
    expected = [reconstruction_metrics(a[None], b[None])[column] for a, b in zip(x, y, strict=True)]
    assert values.flatten().tolist() == pytest.approx(expected, rel=CLOSE)
    assert float(metric.aggregate()) == pytest.approx(sum(expected) / 3, rel=CLOSE)
    with pytest.raises(ValueError, match="'lpips'"):  # needs a network
        VolumeMetric("lpips")
