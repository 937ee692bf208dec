"""The autoencoder, its posterior and its weights, and how MONAI's engines run it."""

from __future__ import annotations

from scripts.networks.autoencoder import *
from scripts.networks.blocks import *
from scripts.networks.exported import *
from scripts.networks.posterior import *
from scripts.networks.slabs import *
from scripts.networks.steps import *
from scripts.networks.weights import *
