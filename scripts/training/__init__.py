"""Losses, optimizer, batches, handlers and checkpoints of a training."""

from __future__ import annotations

from scripts.training.batches import (
    BalancedBatchSampler,
    ShuffledBatchSampler,
    batch_sampler,
)
from scripts.training.checkpoints import RunCheckpoint
from scripts.training.handlers import (
    EpochSeed,
    GradientClip,
    PerceptualStart,
    StartValidation,
    WarmEMA,
)
from scripts.training.losses import ScaleEquivariance, VAELoss
from scripts.training.optimizers import MuonAdamW, orthogonalize
from scripts.training.tensorboard import LatentLog, PictureLog, RunBoard, latent_scalars

__all__ = [
    "BalancedBatchSampler",
    "EpochSeed",
    "GradientClip",
    "LatentLog",
    "MuonAdamW",
    "PerceptualStart",
    "PictureLog",
    "RunBoard",
    "RunCheckpoint",
    "ScaleEquivariance",
    "ShuffledBatchSampler",
    "StartValidation",
    "VAELoss",
    "WarmEMA",
    "batch_sampler",
    "latent_scalars",
    "orthogonalize",
]
