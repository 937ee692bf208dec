"""LPIPS over volumes: the published 2D perceptual distance (AlexNet, v0.1) on every slice of all three axes.

`VAELoss` trains with it and the evaluation reports it. LPIPS is a sum over slices, so `LPIPS3D` goes through small
chunks of slices and adds each chunk's gradient to the volume's at once: one chunk's features are in memory at a time,
and no slice is selected from a volume that keeps a graph. Slices are grey, so the three equal colour channels and
LPIPS's input scaling are folded into one-channel first filters. The target's features are computed without a graph.

    loss = LPIPS3D()(recon, scan)     # both (B, 1, D, H, W), intensities in [0, 1]

Source: Zhang R., Isola P., Efros A. A., Shechtman E., Wang O., The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric, CVPR 2018.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.metrics.alexnet import CONVOLUTIONS, DEFAULT_WEIGHTS, read_weights
from scripts.run import InputError

__all__ = ["LPIPS3D", "MIN_SIDE"]

MIN_SIDE = 31  # voxels or pixels; the second max-pooling has no output below

Slices = list[tuple[Tensor, Tensor]]  # for each axis: indices (n,), and their weights in the mean (n,)

EPS = 1e-10  # in the unit normalisation, as published
SHIFT = (-0.030, -0.088, -0.188)  # LPIPS's ScalingLayer: the mean of ImageNet's colours on [-1, 1] ...
SCALE = (0.458, 0.448, 0.450)  # ... and their standard deviation
STRIDE = 4  # of AlexNet's first convolution


class LPIPS3D(nn.Module):
    """Mean LPIPS over the slices of all three axes of a volume, as a loss and as a metric.

    Each of the D + H + W slices weighs the same. Gradients flow to `input` alone and once only (create_graph
    raises). The weights are buffers that are neither trained nor written into a state dict. Everything is computed in
    float32, also under autocast; in float64 after `.double()`.

    Args:
        weights: safetensors file with AlexNet's five convolutions and LPIPS's five heads; None is the bundle's own.
        slice_fraction: share of slices in (0, 1]. Below 1, each axis is cut into runs of neighbouring slices and one
            slice drawn from each run, anew each call and the same for the whole batch, from torch's global CPU
            generator (`torch.manual_seed`). An unbiased estimate of the mean, in training and evaluation mode alike.
        chunk_size: slices that go through the network at once; more only takes more memory on a CPU.
        reduction: "mean" over the batch, a scalar, or "none", one value a sample, (B,).

    Raises:
        InputError: the weights' file is absent, damaged, or not AlexNet's LPIPS.
        ValueError: another argument is out of range.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        slice_fraction: float = 1.0,
        chunk_size: int = 16,
        reduction: str = "mean",
    ) -> None:
        if not 0.0 < slice_fraction <= 1.0:
            raise InputError(f"slice_fraction is {slice_fraction}; give a number above 0 and at most 1.")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}.")
        super().__init__()
        self.slice_fraction = slice_fraction
        self.chunk_size = chunk_size
        self.reduction = reduction
        for name, tensor in read_weights(DEFAULT_WEIGHTS if weights is None else Path(weights)).items():
            self.register_buffer(name.replace(".", "_"), tensor, persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compare volumes with intensities in [0, 1]; what lies outside is clamped for the network's sake.

        The gradient passes through that clamp unchanged, so that a voxel beyond the range is still pulled back.

        Args:
            input: (B, 1, D, H, W), any floating-point type; takes the gradient.
            target: the same shape; takes none.

        Returns:
            The batch's mean, a scalar, or (B,) with reduction "none"; float32.

        Raises:
            InputError: a side is shorter than 31 voxels.
            ValueError: shapes differ or are not (B, 1, D, H, W), or the target wants a gradient.
        """
        _check_pair(input, target, "B1DHW")
        wants_gradient = torch.is_grad_enabled() and input.requires_grad
        if torch.is_grad_enabled() and target.requires_grad:
            raise ValueError("target requires a gradient, which LPIPS3D does not compute: detach it or swap the two.")
        # as_subclass: MONAI's MetaTensor would carry its metadata through every operation on every chunk.
        volumes = [v.as_subclass(torch.Tensor).to(self._precision) for v in (input, target.detach())]
        with torch.autocast(device_type=input.device.type, enabled=False):
            values: Tensor = _ChunkedDistance.apply(*volumes, self._draw(input.shape[2:]), self, wants_gradient)
        return values.mean() if self.reduction == "mean" else values

    @torch.no_grad()
    def lpips_2d(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the published metric on colour pictures; without gradient.

        Args:
            input: (N, 3, H, W) in [-1, 1].
            target: the same shape.

        Returns:
            (N,) float32.

        Raises:
            InputError: a side is shorter than 31 pixels.
            ValueError: shapes differ or are not (N, 3, H, W).
        """
        _check_pair(input, target, "N3HW")
        with torch.autocast(device_type=input.device.type, enabled=False):
            weight, bias = self._buffer("features_0_weight"), self._buffer("features_0_bias")
            shift, scale = (weight.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
            scaled = ((picture.to(weight) - shift) / scale for picture in (input, target))
            first = (F.conv2d(picture, weight, bias, stride=STRIDE, padding=2) for picture in scaled)
            return self._compare(*map(self._trunk, first))[0]

    @torch.no_grad()
    def features(self, volume: Tensor, slice_step: int = 1) -> Tensor:
        """Means of AlexNet's five layers over positions and over every so many slices of each axis.

        Args:
            volume: (D, H, W) float32 in [0, 1], sides of 31 voxels or more.
            slice_step: 1 to 31.

        Returns:
            (1152,) float32.
        """
        sums, n_slices = [], 0
        with torch.autocast(volume.device.type, enabled=False):  # half precision would round away what tells sets apart
            for axis in range(3):
                slices = volume.movedim(axis, 0)[slice_step // 2 :: slice_step]
                filters, bias_map = self._grey_first_layer(*slices.shape[1:])
                for chunk in slices.split(self.chunk_size):
                    layers = self._trunk(_first_layer(chunk, filters, bias_map))
                    sums.append(torch.cat([layer.mean((2, 3)) for layer in layers], 1).sum(0))
                    n_slices += len(chunk)
        return torch.stack(sums).sum(0) / n_slices

    @property
    def _precision(self) -> torch.dtype:
        """Type of all computation: the weights', but at least float32, whatever a parent's `.half()` made of them."""
        return torch.promote_types(self.get_buffer("features_0_weight").dtype, torch.float32)

    def _buffer(self, name: str) -> Tensor:
        """Give one of the weights in the type of computation."""
        return self.get_buffer(name).to(self._precision)

    def _draw(self, sides: torch.Size) -> Slices:
        """Choose the slices; their weights add up to 1 over all axes."""
        drawn = []
        for side in sides:
            n_slices = max(1, round(self.slice_fraction * side))
            edges = torch.arange(n_slices + 1) * side // n_slices
            runs = edges.diff()
            offsets = torch.rand(n_slices, dtype=torch.float64) * runs if n_slices < side else torch.zeros(n_slices)
            drawn.append((edges[:-1] + offsets.long(), runs.double() / sum(sides)))
        return drawn

    def _grey_first_layer(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Fold three equal channels and the input scaling into the first layer, for slices in [0, 1].

        A grey value x enters channel c as (2 x - 1 - shift_c) / scale_c: one filter for x, and a constant. The padding
        comes after the scaling, so the constant's share is a convolution of ones with zero padding: a map, not a bias.

        Returns:
            Filters for `_first_layer`, (64, 16, 3, 3), and the map, (1, 64, H', W').
        """
        weight, bias = self._buffer("features_0_weight"), self._buffer("features_0_bias")
        shift, scale = (weight.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        grey = (weight * (2 / scale)).sum(1, keepdim=True)
        constant = (weight * (-(1 + shift) / scale)).sum(1, keepdim=True)
        bias_map = F.conv2d(weight.new_ones(1, 1, height, width), constant, bias, stride=STRIDE, padding=2)
        return F.pixel_unshuffle(F.pad(grey, (0, 1, 0, 1)), STRIDE), bias_map

    def _trunk(self, first: Tensor) -> list[Tensor]:
        """Run AlexNet from the first convolution's output, which is overwritten; the five layers' features."""
        features = [first.relu_()]
        for layer in list(CONVOLUTIONS)[1:]:
            weight, bias = (self._buffer(f"features_{layer}_{part}") for part in ("weight", "bias"))
            previous = features[-1]
            if layer in (3, 6):
                previous = F.max_pool2d(previous, kernel_size=3, stride=2)
            features.append(F.conv2d(previous, weight, bias, padding="same").relu_())
        return features

    def _compare(self, features: list[Tensor], targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Compute the distance of each slice, (N,), and its gradients for the five layers' features.

        Written out by hand, because autograd would keep some ten more tensors as large as the features. For
        u = f / |f| and the weighted difference r = w (u - v), the gradient is 2 (r - u (u . r)) / |f|.
        """
        distance = features[0].new_zeros(len(features[0]))
        gradients = []
        for layer, (feature, target) in enumerate(zip(features, targets, strict=True)):
            head = self._buffer(f"lin{layer}_weight")
            unit, inverse_norm = _normalise(feature.detach())
            difference = unit - _normalise(target)[0]
            weighted = difference * head
            n_positions = feature.shape[-2] * feature.shape[-1]
            distance += difference.mul_(weighted).sum((1, 2, 3)) / n_positions
            along = torch.mul(unit, weighted, out=difference).sum(1, keepdim=True)
            gradients.append(weighted.sub_(unit.mul_(along)).mul_(inverse_norm * (2 / n_positions)))
        return distance, gradients


class _ChunkedDistance(torch.autograd.Function):
    """LPIPS of volumes whose gradient is finished when the value is."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, drawn: Slices, module: LPIPS3D, wants_gradient: bool
    ) -> Tensor:
        """Compare (B, 1, D, H, W) volumes: (B,) values; keeps their gradient, of the input's shape."""
        values = input.new_zeros(len(input))
        gradient = torch.zeros_like(input) if wants_gradient else None
        for axis, (indices, weights) in enumerate(drawn, start=1):
            slices, targets = (volume[:, 0].movedim(axis, 0) for volume in (input, target))  # (side, B, h, w) views
            batch = len(input)
            rows = indices.to(input.device).repeat_interleave(batch)
            columns = torch.arange(batch, device=input.device).repeat(len(indices))
            shares = weights.to(input).repeat_interleave(batch)
            filters, bias_map = module._grey_first_layer(*slices.shape[2:])
            distances = []
            for chunk in torch.arange(len(rows), device=input.device).split(module.chunk_size):
                where = (rows[chunk], columns[chunk])
                target_features = module._trunk(_first_layer(targets[where].clamp_(0, 1), filters, bias_map))
                # A leaf made after the clamp: its gradient is the volume's, as if nothing had been clamped.
                picture = slices[where].clamp_(0, 1).requires_grad_(wants_gradient)
                with torch.set_grad_enabled(wants_gradient):
                    features = module._trunk(_first_layer(picture, filters, bias_map))
                distance, feature_gradients = module._compare(features, target_features)
                distances.append(distance)
                if gradient is not None:
                    (picture_gradient,) = torch.autograd.grad(features, picture, feature_gradients)
                    gradient[:, 0].movedim(axis, 0)[where] += picture_gradient * shares[chunk, None, None]
            values += (torch.cat(distances) * shares).view(-1, batch).sum(0)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Scale each sample's gradient."""
        if torch.is_grad_enabled():  # create_graph: the result would silently lack its dependence on the input
            raise RuntimeError("LPIPS3D can be differentiated once only; create_graph=True does not work with it.")
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.view(-1, 1, 1, 1, 1), None, None, None, None


def _first_layer(slices: Tensor, filters: Tensor, bias_map: Tensor) -> Tensor:
    """Apply the folded first convolution to grey slices (N, h, w) in [0, 1]: (N, 64, H', W').

    A 4 x 4 block of pixels becomes 16 channels, so that the convolution of 11 x 11 pixels with stride 4 is one of
    3 x 3 blocks with stride 1: the same sums, cheaper on a CPU, above all backwards.
    """
    height, width = slices.shape[1:]
    below, right = (STRIDE * (n + 2) - side - 2 for n, side in zip(bias_map.shape[2:], (height, width), strict=True))
    blocks = F.pixel_unshuffle(F.pad(slices[:, None], (2, right, 2, below)), STRIDE)
    # Channels-last from here on: fifteen times cheaper max-pooling on a CPU, nothing dearer.
    return F.conv2d(blocks.contiguous(memory_format=torch.channels_last), filters).add_(bias_map)


def _normalise(features: Tensor) -> tuple[Tensor, Tensor]:
    """Scale features (N, C, H, W) to unit length over channels; with the inverse of that length, (N, 1, H, W)."""
    inverse_norm = features.square().sum(1, keepdim=True).sqrt_().add_(EPS).reciprocal_()
    return features * inverse_norm, inverse_norm


def _check_pair(input: Tensor, target: Tensor, layout: str) -> None:
    """Refuse tensors that are not of the layout, say "B1DHW", or too small for AlexNet."""
    shapes = tuple(input.shape), tuple(target.shape)
    if input.ndim != len(layout) or input.shape[1] != int(layout[1]) or shapes[0] != shapes[1]:
        raise ValueError(f"input and target must both be ({', '.join(layout)}), got {shapes[0]} and {shapes[1]}.")
    if min(input.shape[2:]) < MIN_SIDE:
        raise InputError(
            f"LPIPS needs at least {MIN_SIDE} voxels along every axis, got {' x '.join(map(str, input.shape[2:]))}: "
            "use a larger region, or leave LPIPS out (perceptual_weight 0)."
        )
