"""Latents as files and folders, their statistics and scaling, and distributions over them."""

from __future__ import annotations

from scripts.latents.dataset import *
from scripts.latents.foreign import *
from scripts.latents.priors import *
from scripts.latents.scaling import *
from scripts.latents.statistics import *
from scripts.latents.storage import *
