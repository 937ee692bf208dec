"""The figures of a reconstruction, defined once for training's validation, the evaluation and the report.

`x` is the scan in model space and `y` its reconstruction, both are clamped to [0, 1], and each volume gives one figure
a column. `reconstruction_metrics` makes the row of a volume; `VolumeMetric` brings the same columns into MONAI's
validation handlers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from monai.metrics import CumulativeIterationMetric, SSIMMetric

from scripts.conventions import FOREGROUND

__all__ = ["COLUMNS", "VolumeMetric", "reconstruction_metrics"]

# Column: whether a large figure is a good one. The order is that of every table.
COLUMNS: dict[str, bool] = {"l1": False, "psnr": True, "psnr_brain": True, "ssim": True, "lpips": False, "kl": False}
SSIM_WINDOW = 11


def reconstruction_metrics(
    x: torch.Tensor,
    y: torch.Tensor,
    lpips: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, float]:
    """Compare one volume with its reconstruction.

    Args:
        x: the scan in model space, (1, 1, D, H, W) or (D, H, W), sides of 11 voxels or more (SSIM's window).
        y: its reconstruction, same shape.
        lpips: called with y and x as (1, 1, D, H, W) in [0, 1]; gives one value. None leaves the column out.

    Returns:
        l1, psnr (dB), psnr_brain (dB, voxels where x > 0.05), ssim and, if asked for, lpips. A PSNR is inf where
        both are equal, psnr_brain is nan where there is no foreground.

    Raises:
        ValueError: the shapes differ, or are none of those above.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    if x.ndim != 3 and not (x.ndim == 5 and x.shape[:2] == (1, 1)):
        raise ValueError(f"x must be (1, 1, D, H, W) or (D, H, W), got {tuple(x.shape)}.")
    x, y = (_clamped(volume.reshape(1, 1, *volume.shape[-3:])) for volume in (x, y))
    row = {column: float(figure(x, y)) for column, figure in _FIGURES.items()}
    if lpips is not None:
        with torch.no_grad():
            row["lpips"] = float(lpips(y, x))
    return row


class VolumeMetric(CumulativeIterationMetric):
    """One column of `reconstruction_metrics` as a MONAI metric, averaged over all volumes of all ranks.

    In a config: `IgniteMetricHandler(metric_fn=VolumeMetric("psnr_brain"), output_transform=from_engine(["pred",
    "image"]))`. Mind the order, MONAI's: first the reconstruction, then the scan.

    Args:
        column: l1, psnr, psnr_brain or ssim; ValueError for another.
    """

    def __init__(self, column: str) -> None:
        if column not in _FIGURES:
            raise ValueError(f"column must be one of {', '.join(_FIGURES)}, got {column!r}.")
        super().__init__()
        self.column = column

    def aggregate(self) -> torch.Tensor:
        """Mean over the volumes since the last reset, a scalar, nan and inf included; ValueError if there are none."""
        values = self.get_buffer()
        if not isinstance(values, torch.Tensor):
            raise ValueError(f"{self.column} of no volumes; call the metric before aggregate.")
        return values.mean()

    def _compute_tensor(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Figures (B, 1) of reconstructions `y_pred` and scans `y`, both (B, 1, D, H, W)."""
        if y_pred.shape != y.shape or y.ndim != 5 or y.shape[1] != 1:
            raise ValueError(f"y_pred and y must be (B, 1, D, H, W), got {tuple(y_pred.shape)} and {tuple(y.shape)}.")
        return _FIGURES[self.column](_clamped(y), _clamped(y_pred))[:, None]


def _clamped(volume: torch.Tensor) -> torch.Tensor:
    """Plain float32 in [0, 1], without MetaTensor's bookkeeping and without a graph."""
    return volume.detach().as_subclass(torch.Tensor).float().clamp(0, 1)


def _l1(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x - y).abs().flatten(1).mean(1)


def _psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return -10 * torch.log10((x - y).square().flatten(1).mean(1))


def _psnr_brain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    foreground = (x > FOREGROUND).float()
    squares = ((x - y).square() * foreground).flatten(1).sum(1)
    return -10 * torch.log10(squares / foreground.flatten(1).sum(1))


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs sides of {SSIM_WINDOW} voxels or more, got {tuple(x.shape[2:])}.")
    # Autocast's half precision would drown the variances, which are differences of nearly equal numbers.
    with torch.autocast(x.device.type, enabled=False):
        return torch.as_tensor(SSIMMetric(spatial_dims=3, data_range=1.0)(y, x)).flatten()


# Each takes clamped x and y, (B, 1, D, H, W), and gives (B,).
_FIGURES = {"l1": _l1, "psnr": _psnr, "psnr_brain": _psnr_brain, "ssim": _ssim}
