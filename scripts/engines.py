"""What MONAI's `SupervisedTrainer` and `SupervisedEvaluator` are given so that they run an autoencoder.

The configs name these as `prepare_batch`, `inferer` and `iteration_update`. An autoencoder's target is its input;
mixed precision is bf16 in the inferer, because MONAI's own `amp` switch is CUDA-only; evaluation keeps the posterior
beside the reconstruction; training on crops takes the normalisations' statistics from the whole volume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer

from scripts.errors import InputError, as_flag
from scripts.group_norm import held_statistics, noted_statistics

__all__ = [
    "AutocastInferer",
    "CropSteps",
    "decode_iteration",
    "encode_iteration",
    "posterior_iteration",
    "prepare_batch",
]

FOREGROUND = 0.05  # of the 99.5th percentile, as in the metrics
STRIDE = 4  # voxels of the image a voxel of the latent


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


class CropSteps:
    """One iteration of a `SupervisedTrainer` on crops: several steps of the optimizer (its `iteration_update`).

    Group normalisation over a crop is not that over a volume, and weights learnt on crops fail on volumes. So the whole
    volumes go through once without gradients, and every crop is normalised by their statistics, held constant. Crops
    are centred on random voxels of the foreground, one time in ten on any voxel. Where a crop cuts the volume, zeros
    stand in for its neighbours, and `margin` voxels there do not count in the loss. All volumes of a batch are cut at
    the same place. Events fire at every step, `MODEL_COMPLETED` once.

    Args:
        size: of a crop in voxels, (x, y, z), multiples of 4.
        steps: crops, each a step of the optimizer, that follow one pass of the whole volumes.
        margin: voxels at a cut face that do not count.

    Raises:
        InputError: `steps` is no positive whole number, or `margin` leaves nothing of a crop.
    """

    def __init__(self, size: Sequence[int], steps: int = 8, margin: int = 4) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"'crops_per_scan' is {steps!r}; give a positive whole number.")
        if not isinstance(margin, int) or not 0 <= 2 * margin < min(size):
            raise InputError(f"'crop_margin' is {margin!r}; give a whole number below half of {min(size)} voxels.")
        self.size = tuple(size)
        self.steps = steps
        self.margin = margin

    def __call__(self, engine: Any, batchdata: dict[str, Any]) -> dict[str, Any]:
        """Train on crops of one batch.

        Args:
            engine: a `SupervisedTrainer`.
            batchdata: a batch with the key `image`, (B, 1, D, H, W).

        Returns:
            `image` and `label`, the last crop, `pred`, the network's output for it, and `loss`, the mean of the steps.
        """
        volumes, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
        engine.network.train()
        with torch.no_grad(), noted_statistics(engine.network) as statistics:
            engine.inferer(volumes, engine.network)
        losses = []
        with held_statistics(engine.network, statistics):
            for _ in range(self.steps):
                crop, counted = self._crop(volumes)
                losses.append(self._step(engine, crop, counted))
        engine.state.output["loss"] = torch.stack(losses).mean()
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output

    @staticmethod
    def _step(engine: Any, crop: torch.Tensor, counted: tuple[slice, ...]) -> torch.Tensor:
        engine.optimizer.zero_grad(set_to_none=engine.optim_set_to_none)
        recon, mu, sigma = engine.inferer(crop, engine.network)
        engine.state.output = {"image": crop, "label": crop, "pred": (recon, mu, sigma)}
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        loss = engine.loss_function((recon[counted], mu, sigma), crop[counted])
        engine.fire_event(IterationEvents.LOSS_COMPLETED)
        loss.backward()
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        engine.optimizer.step()
        return loss.detach()

    def _crop(self, volumes: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
        """A crop of all volumes, and what of it counts in the loss."""
        whole = volumes.shape[2:]
        volume = volumes[torch.randint(len(volumes), ())]
        foreground = (volume[0] > FOREGROUND).nonzero()
        if torch.rand(()) < 0.1 or not len(foreground):
            centre = [int(torch.randint(side, ())) for side in whole]
        else:
            centre = foreground[torch.randint(len(foreground), ())].tolist()
        taken, counted = [slice(None)] * 2, [slice(None)] * 2
        for middle, asked, side in zip(centre, self.size, whole, strict=True):
            length = min(asked, side)
            start = min(max(middle - length // 2, 0), side - length) // STRIDE * STRIDE
            end = start + length
            taken.append(slice(start, end))
            counted.append(slice(self.margin if start else 0, length - (self.margin if end < side else 0)))
        return volumes[tuple(taken)], tuple(counted)


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
    return image, {"mu": mu.float(), "logvar": 2 * sigma.float().log()}


def _finished(engine: Any, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    engine.state.output = output
    engine.fire_event(IterationEvents.FORWARD_COMPLETED)
    engine.fire_event(IterationEvents.MODEL_COMPLETED)
    return engine.state.output  # decollated by MODEL_COMPLETED
