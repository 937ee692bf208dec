"""Volumes of any size through the network in one pass of slabs: exact, in memory that a slab sets.

`inference.json` puts `in_slabs` around its network, so that scans at their own voxel size need no more memory than
others. Each layer takes slabs along the first axis, keeps the planes that its kernel needs again, and
hands on what it can compute. Nothing is computed twice, zeros stand beyond the ends of the volume only, and so there is
no seam. Normalisation a voxel makes this possible: a group norm needs the whole volume before it lets anything through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution, SpatialAttentionBlock, UpSample
from monai.networks.nets.autoencoderkl import AEKLDownsample, AEKLResBlock
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from scripts.networks.autoencoder import BrainVAE
from scripts.networks.blocks import FoldedUpsample, Pointwise, PositionResBlock, haar, inverse_haar
from scripts.networks.posterior import sigma_of
from scripts.run import InputError

__all__ = ["SlabVAE", "in_slabs"]

Slab = Tensor | None  # (B, C, d, H, W), neighbours along D; None where a layer has too few planes yet
Layer = Callable[[Slab, bool], Slab]  # of the next slab, and whether it is the last, which may be None
SLABWISE = (PositionResBlock, AEKLDownsample, FoldedUpsample, Convolution, Pointwise, nn.Identity)
OTHERS = {
    AEKLResBlock: "group normalisation", nn.GroupNorm: "group normalisation", SpatialAttentionBlock: "attention",
    UpSample: "use_convtranspose",
}  # fmt: skip


def in_slabs(network: nn.Module, slab: int, above: int) -> nn.Module:
    """Let a network encode and decode large volumes in slabs.

    Args:
        network: a `BrainVAE`; another class is returned as it is.
        slab: planes of the latent that are computed at a time. Each is 4 planes of the image.
        above: voxels (D x H x W of the image); volumes of more go through in slabs, others whole.

    Returns:
        A `SlabVAE` of the same parameters: moving or loading one moves or loads both.

    Raises:
        InputError: `slab` or `above` is no whole number, or too small.
    """
    for name, value, least in (("slab", slab, 1), ("whole_voxels", above, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"'{name}' is {value!r}; give a whole number of at least {least}.")
    return SlabVAE(network, slab, above) if isinstance(network, BrainVAE) else network


class SlabVAE(BrainVAE):
    """A `BrainVAE` that goes through volumes of more than `above` voxels in slabs, exact to rounding.

    In slabs it computes in float32 whatever autocast says, and no gradients. See `in_slabs`.
    """

    def __init__(self, network: BrainVAE, slab: int, above: int) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(network))
        self.slab, self.above = slab, above
        encoder: Any = network.encoder
        self.stride = 2 ** (len(encoder.channels) - 1 + network.wavelet)  # image voxels along a latent voxel

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `BrainVAE.encode`.

        Raises:
            InputError: the volume is larger than `above`, and a block of the network needs the whole of it.
        """
        if self._goes_whole(x.shape[2:]):
            return super().encode(x)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            slabs = x.as_subclass(Tensor).float().split(self.slab * self.stride, dim=2)
            h = _whole(_through(self._layers(self.encoder), slabs), x.shape[2] // self.stride)
            mu = self.quant_conv_mu(h)
            sigma = sigma_of(self.quant_conv_log_sigma(h))
        return _like(x, mu), _like(x, sigma)

    def decode(self, z: Tensor) -> Tensor:
        """See `BrainVAE.decode`.

        Raises:
            InputError: the volume is larger than `above`, and a block of the network needs the whole of it.
        """
        if self._goes_whole([self.stride * side for side in z.shape[2:]]):
            return super().decode(z)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            slabs = self.post_quant_conv(z.as_subclass(Tensor).float()).split(self.slab, dim=2)
            image = _whole(_through(self._layers(self.decoder), slabs), z.shape[2] * self.stride)
        return _like(z, image)

    def _goes_whole(self, size: Iterable[int]) -> bool:
        sides = [int(side) for side in size]
        if math.prod(sides) <= self.above:
            return True
        parts: tuple[Any, ...] = (self.encoder, self.decoder)
        blocks = [block for part in parts for block in part.blocks]
        needs = {OTHERS.get(type(block), type(block).__name__) for block in blocks if not isinstance(block, SLABWISE)}
        if needs:
            raise InputError(
                f"{' x '.join(map(str, sides))} voxels are more than 'whole_voxels' ({self.above}), and a network with "
                f"{' and '.join(sorted(needs))} takes no slabs; raise whole_voxels if the volume fits into memory."
            )
        return False

    def _layers(self, part: Any) -> list[Layer]:
        """The encoder's or the decoder's layers, with its Haar step."""
        layers = [_layer(block) for block in part.blocks]
        if not self.wavelet:
            return layers
        return [_by_itself(haar), *layers] if part is self.encoder else [*layers, _by_itself(inverse_haar)]


class _Kernel:
    """A kernel of three that moves by `step` along D; between slabs it keeps the planes that it needs again.

    Args:
        compute: of planes (B, C, d, H, W) with d >= 3, without padding along D.
        step: planes from one window to the next.
        before: planes of zeros before the first plane; behind the last there is one.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], step: int = 1, before: int = 1) -> None:
        self.compute, self.step, self.before = compute, step, before
        self.rest: Slab = None

    def __call__(self, slab: Slab, last: bool) -> Slab:
        if slab is None and not last:
            return None
        known = [planes for planes in (self.rest, slab) if planes is not None]
        zeros = torch.zeros_like(known[0][:, :, :1])
        planes = torch.cat([*[zeros] * (self.before if self.rest is None else 0), *known, *[zeros] * last], dim=2)
        n_windows = max(0, (planes.shape[2] - 3) // self.step + 1)
        self.rest = planes[:, :, n_windows * self.step :].clone()  # a view would keep all planes alive
        return self.compute(planes) if n_windows else None


class _Residual:
    """A residual block; the planes that its convolutions have not yet let through wait for them."""

    def __init__(self, block: PositionResBlock) -> None:
        parts = (block.norm1, block.conv1, block.norm2, block.conv2)
        self.layers = [_layer(part) for part in parts]
        self.shortcut = block.nin_shortcut
        self.waiting: Slab = None

    def __call__(self, slab: Slab, last: bool) -> Slab:
        if slab is not None:
            self.waiting = slab if self.waiting is None else torch.cat([self.waiting, slab], dim=2)
        for layer in self.layers:
            slab = layer(slab, last)
        if slab is None or self.waiting is None:
            return None
        slab.add_(self.shortcut(self.waiting[:, :, : slab.shape[2]]))
        self.waiting = self.waiting[:, :, slab.shape[2] :].clone()
        return slab


def _layer(block: Any) -> Layer:
    """A block of the encoder or the decoder, as it goes over slabs."""
    if isinstance(block, PositionResBlock):
        return _Residual(block)
    if isinstance(block, AEKLDownsample):
        conv: Any = block.conv.conv
        return _Kernel(lambda x: _convolved(F.pad(x, (0, 1, 0, 1)), conv, (0, 0, 0)), step=2, before=0)
    if isinstance(block, FoldedUpsample):
        kernel, bias = block.kernel(), block.postconv.conv.bias
        # Of the 2n + 6 planes that n + 2 planes give, three at each end lack a neighbour: padding takes them off.
        return _Kernel(lambda x: F.conv_transpose3d(x, kernel, bias, stride=2, padding=(3, 1, 1)))
    if isinstance(block, Convolution):
        conv = block.conv
        return _Kernel(lambda x: _convolved(x, conv, (0, 1, 1)))
    return _by_itself(block)


def _convolved(x: Tensor, conv: nn.Conv3d, padding: tuple[int, int, int]) -> Tensor:
    """The convolution with another padding."""
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        # F.conv3d takes it for large tensors only; a third of the time for a thin slab of the Haar step's 8 channels
        return torch.mkldnn_convolution(x, conv.weight, conv.bias, padding, conv.stride, conv.dilation, 1)
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, padding)


def _by_itself(compute: Callable[[Tensor], Tensor]) -> Layer:
    """A layer that needs no neighbours of a plane; or pairs of planes, which slabs of the image never part."""
    return lambda slab, last: None if slab is None else compute(slab)


def _through(layers: Sequence[Layer], slabs: Iterable[Tensor]) -> Iterator[Tensor]:
    """What comes out of the last layer, slab by slab.

    The layers end one after the other: if all ended with the last slab, what they have kept would make it thicker.
    """
    for slab in slabs:
        yield from _after(layers, slab)
    for index, layer in enumerate(layers):
        yield from _after(layers[index + 1 :], layer(None, True))


def _after(layers: Sequence[Layer], slab: Slab) -> Iterator[Tensor]:
    for layer in layers:
        slab = layer(slab, False)
    if slab is not None:
        yield slab


def _whole(slabs: Iterator[Tensor], depth: int) -> Tensor:
    """All slabs in one tensor of so many planes."""
    first = next(slabs)
    result = first.new_empty((*first.shape[:2], depth, *first.shape[3:]))
    done = 0
    for slab in itertools.chain([first], slabs):
        result[:, :, done : done + slab.shape[2]] = slab
        done += slab.shape[2]
    return result


def _like(source: Tensor, result: Tensor) -> Tensor:
    """The result, as a `MetaTensor` with the source's meta where that is one."""
    converted: Tensor = convert_to_dst_type(result, source, dtype=result.dtype)[0]
    return converted
