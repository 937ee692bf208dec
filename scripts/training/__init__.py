"""Losses, optimizer, batches, handlers and checkpoints of a training."""

from __future__ import annotations

from scripts.training.batches import *
from scripts.training.checkpoints import *
from scripts.training.handlers import *
from scripts.training.losses import *
from scripts.training.optimizers import *
from scripts.training.tensorboard import *
