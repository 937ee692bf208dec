"""The autoencoder, its posterior and its weights, and how MONAI's engines run it."""

from __future__ import annotations

from scripts.networks.autoencoder import BrainVAE, start, start_deterministic
from scripts.networks.blocks import (
    FoldedUpsample,
    Pointwise,
    PositionNorm,
    PositionResBlock,
    haar,
    inverse_haar,
)
from scripts.networks.exported import OnnxNetwork, load_torchscript
from scripts.networks.posterior import Posterior, logvar_of, sigma_of
from scripts.networks.slabs import SlabVAE, in_slabs
from scripts.networks.steps import (
    AutocastInferer,
    computes_bf16_fast,
    decode_iteration,
    encode_iteration,
    place,
    posterior_iteration,
    prepare_batch,
    trained,
)
from scripts.networks.weights import (
    UNREADABLE,
    is_packed,
    load_state,
    load_weights,
    read_state_dict,
)

__all__ = [
    "AutocastInferer",
    "BrainVAE",
    "FoldedUpsample",
    "OnnxNetwork",
    "Pointwise",
    "PositionNorm",
    "PositionResBlock",
    "Posterior",
    "SlabVAE",
    "UNREADABLE",
    "computes_bf16_fast",
    "decode_iteration",
    "encode_iteration",
    "haar",
    "in_slabs",
    "inverse_haar",
    "is_packed",
    "load_state",
    "load_torchscript",
    "load_weights",
    "logvar_of",
    "place",
    "posterior_iteration",
    "prepare_batch",
    "read_state_dict",
    "sigma_of",
    "start",
    "start_deterministic",
    "trained",
]
