"""What MONAI's `SupervisedTrainer` and `SupervisedEvaluator` are given so that they run an autoencoder.

The configs name these as `prepare_batch`, `inferer` and `iteration_update`. An autoencoder's target is its input;
mixed precision is bf16 in the inferer, because MONAI's own `amp` switch is CUDA-only; evaluation keeps the posterior
beside the reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from torch import nn

from scripts.networks.posterior import Posterior
from scripts.networks.slabs import in_slabs
from scripts.networks.weights import load_weights
from scripts.run import as_flag

__all__ = [
    "AutocastInferer",
    "computes_bf16_fast",
    "decode_iteration",
    "encode_iteration",
    "place",
    "posterior_iteration",
    "prepare_batch",
    "trained",
]


def prepare_batch(
    batchdata: dict[str, Any], device: torch.device, non_blocking: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image as input and as target.

    Args:
        batchdata: a batch with the key `image`, (B, 1, D, H, W).
        device: where the network is.
        non_blocking: as in `torch.Tensor.to`.

    Returns:
        The same tensor twice.
    """
    image = batchdata["image"].to(device=device, non_blocking=non_blocking)
    return image, image


def computes_bf16_fast(device: torch.device | str) -> bool:
    """Whether the device has instructions for bf16: a GPU, or a CPU with AMX or AVX-512 BF16."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def place(network: nn.Module, device: torch.device | str, channels_last: bool | str = True) -> nn.Module:
    """Move a network to its device and memory format.

    Args:
        network: changed in place.
        device: where to.
        channels_last: whether channels stand next to each other in memory, which convolutions are faster with.

    Returns:
        The network.
    """
    is_last = as_flag(channels_last, "channels_last")
    memory_format = torch.channels_last_3d if is_last else torch.contiguous_format
    placed: nn.Module = network.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    return placed


def trained(
    network: nn.Module,
    weights: str,
    device: torch.device | str,
    channels_last: bool | str = True,
    slab: int = 2,
    whole_voxels: int = 2_000_000,
) -> nn.Module:
    """A network with its weights, ready to run on volumes of any size.

    Args:
        network: filled and moved in place.
        weights: see `load_weights`.
        device: see `place`.
        channels_last: see `place`.
        slab: see `in_slabs`.
        whole_voxels: volumes of more voxels go through in slabs.

    Raises:
        InputError: as in `load_weights` and `in_slabs`.
    """
    return in_slabs(place(load_weights(network, weights), device, channels_last), slab, whole_voxels)


class AutocastInferer(SimpleInferer):
    """`SimpleInferer` under bf16 autocast where the device has bf16, in fp32 elsewhere.

    bf16 has the range of fp32, so no gradient scaler is needed. Older cards without it run in fp32.

    Args:
        amp: whether to use bf16 at all; a text such as "false" is understood.
        device: where the network is.
    """

    def __init__(self, amp: bool | str, device: torch.device | str) -> None:
        super().__init__()
        self.device_type = torch.device(device).type
        has_bf16 = self.device_type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        self.amp = as_flag(amp, "amp") and has_bf16

    def __call__(self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the network on the inputs; see `SimpleInferer`."""
        with self.autocast():
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float() if torch.is_tensor(output) else output

    def autocast(self) -> torch.autocast:
        """The context in which the network runs, for callers that encode and decode apart."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.amp)


def posterior_iteration(engine: Any, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One step of an evaluator that keeps the posterior (for `iteration_update`).

    Args:
        engine: a `SupervisedEvaluator` whose network has `encode` and `decode`.
        batchdata: a batch with the key `image`, (B, 1, D, H, W).

    Returns:
        `image` and `pred` (B, 1, D, H, W), and `mu`, `logvar` (B, C, D/4, H/4, W/4), fp32. `pred` is decoded from mu.
    """
    image, posterior = _encoded(engine, batchdata)
    with engine.mode(engine.network), engine.inferer.autocast():
        pred = engine.network.decode(posterior["mu"])
    return _finished(engine, {"image": image, "pred": pred.float(), **posterior})


def encode_iteration(engine: Any, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One step of an evaluator that only encodes (for `iteration_update`).

    Args and returns as in `posterior_iteration`, without `pred`.
    """
    image, posterior = _encoded(engine, batchdata)
    return _finished(engine, {"image": image, **posterior})


def decode_iteration(engine: Any, batchdata: dict[str, Any]) -> dict[str, torch.Tensor]:
    """One step of an evaluator that only decodes (for `iteration_update`).

    Args:
        engine: a `SupervisedEvaluator` whose network has `decode`.
        batchdata: a batch with the key `latent`, (B, C, D/4, H/4, W/4).

    Returns:
        `latent`, and `pred` (B, 1, D, H, W), fp32.
    """
    latent = batchdata["latent"].to(device=engine.state.device, non_blocking=engine.non_blocking)
    with engine.mode(engine.network), engine.inferer.autocast():
        pred = engine.network.decode(latent)
    return _finished(engine, {"latent": latent, "pred": pred.float()})


def _encoded(engine: Any, batchdata: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The image, and its posterior in fp32."""
    image, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking)
    with engine.mode(engine.network), engine.inferer.autocast():
        mu, sigma = engine.network.encode(image)
    posterior = Posterior.of_sigma(mu, sigma)
    return image, {"mu": posterior.mu, "logvar": posterior.logvar}


def _finished(engine: Any, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    engine.state.output = output
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
    engine.fire_event(IterationEvents.MODEL_COMPLETED)
    return engine.state.output  # decollated by MODEL_COMPLETED
