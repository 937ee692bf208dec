"""A scan at its own voxel size, through the network plane by plane: exact, and no tensor larger than memory bears.

`configs/native.json` puts `stream` around the network. The one idea: a layer reads slabs along the first axis, hands
on slabs, and keeps the planes that its kernel needs again. Nothing is computed twice at a border, and zeros stand
beyond the ends of the volume only, so there are no seams. A group norm needs the whole volume's moments: they are
collected in a pass of their own before the norm lets anything through. A tensor that is small enough is held between
the passes; larger ones are computed anew in each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.blocks import Convolution, SpatialAttentionBlock
from monai.networks.nets.autoencoderkl import AEKLDownsample
from monai.utils import convert_to_dst_type
from torch import Tensor, nn

from scripts.errors import InputError
from scripts.group_norm import GroupNormSiLU, channel_moments, merged_moments, rows_of, scale_and_shift, scale_rows
from scripts.networks import BrainVAE, FoldedUpsample, Pointwise, ResBlock
from scripts.transforms import ToModelSpace, ToModelSpaced

__all__ = ["StreamedBlocks", "ToModelBox", "ToModelBoxd", "stream"]

KEEP_BYTES = 700_000_000  # as much as Lite needs to hold at half the resolution of 256 x 312 x 256 voxels
Slabs = Iterator[Tensor]  # (1, C, d, H, W) channels-last, neighbours along D
Layer = Callable[[Slabs], Slabs]
Size = tuple[int, int, int, int]  # C, D, H, W


def stream(network: BrainVAE, slab: int = 4, keep_bytes: float = KEEP_BYTES) -> BrainVAE:
    """Let a network encode and decode slab by slab.

    Weights, state dict and methods stay; gradients are no longer computed, and autocast has no effect on the blocks.

    Args:
        network: changed in place.
        slab: planes that are read at a time; upsampling doubles them.
        keep_bytes: the largest tensor that is held whole. Three of that size are needed at the same time.

    Returns:
        The network.

    Raises:
        InputError: `slab` is no positive whole number, or a block of the network cannot be computed slab by slab.
    """
    if not isinstance(slab, int) or slab < 1:
        raise InputError(f"'slab' is {slab!r}; give a positive whole number of planes.")
    network.encoder = StreamedBlocks(network.encoder, slab, keep_bytes)
    network.decoder = StreamedBlocks(network.decoder, slab, keep_bytes)
    return network


class StreamedBlocks(nn.Module):
    """The blocks of MONAI's `Encoder` or `Decoder`, computed slab by slab; the same parameters under the same names.

    Args:
        part: the encoder or decoder of a `BrainVAE`.
        slab: planes that are read at a time.
        keep_bytes: the largest tensor that is held whole.

    Raises:
        InputError: a block cannot be computed slab by slab.
    """

    def __init__(self, part: Any, slab: int, keep_bytes: float) -> None:
        super().__init__()
        self.blocks = part.blocks
        self.slab, self.keep_bytes = slab, keep_bytes
        for block in self.blocks:
            _check(block)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C', D', H', W'), fp32; a `MetaTensor` keeps what inverts it."""
        plain = x.as_subclass(Tensor).float()
        with torch.autocast(x.device.type, enabled=False):
            result = torch.cat([self._one(single) for single in plain.split(1)])
        return convert_to_dst_type(result, x, dtype=torch.float32)[0]

    def _one(self, x: Tensor) -> Tensor:
        volume = _Volume.of(x, self.slab)
        for block in self.blocks:
            if isinstance(block, (ResBlock, GroupNormSiLU, FoldedUpsample)):
                volume = self._kept(volume)  # what these make is gone through several times
            volume = self._residual(block, volume) if isinstance(block, ResBlock) else volume.through(block)
        return volume.whole()

    def _residual(self, block: ResBlock, x: _Volume) -> _Volume:
        hidden = x.through(block.norm1).through(block.conv1)
        kept = self._kept(hidden)
        result = kept.through(block.norm2).through(block.conv2)
        shortcut = _layer(block.nin_shortcut)
        if kept is not hidden:
            return _Volume(lambda: _sum(result.slabs(), shortcut(x.slabs())), result.size)
        return x.then(_fork(result.layers[len(x.layers) :], shortcut), result.size)

    def _kept(self, volume: _Volume) -> _Volume:
        """The volume, held from here on if it is small enough."""
        n_bytes = torch.float32.itemsize * math.prod(volume.size)
        return _Volume.of(volume.whole(), self.slab) if n_bytes <= self.keep_bytes else volume


class ToModelBox(ToModelSpace):
    """`ToModelSpace` for scans of any voxel size: a box of so many millimetres, each side a multiple of 4 voxels.

    The box of training matters though nothing is resampled: group norms see how much of a volume is head.

    Args:
        size_mm: the box in mm, (x, y, z); a side is rounded up to voxels.
    """

    def __init__(self, size_mm: Sequence[float]) -> None:
        super().__init__([1, 1, 1])  # no size but a scan's own is ever used
        self.size_mm = tuple(float(side) for side in size_mm)

    def compute_bounding_box(self, img: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of the box in voxels of `img` (1, x, y, z); it may reach out of the image."""
        if not isinstance(img, MetaTensor):
            raise ValueError("expected a MetaTensor, whose affine tells the size of its voxels")
        voxel = img.pixdim.tolist()
        sides = [4 * math.ceil(side / mm / 4 - 1e-3) for side, mm in zip(self.size_mm, voxel, strict=True)]
        return ToModelSpace(sides, self.threshold, self.percentile).compute_bounding_box(img)


class ToModelBoxd(ToModelSpaced):
    """Dictionary version of `ToModelBox`.

    Args:
        keys: volumes in RAS, in their own voxels.
        size_mm: see `ToModelBox`.

    Raises:
        InputError: `size_mm` is not three positive numbers.
    """

    def __init__(self, keys: KeysCollection, size_mm: Sequence[float]) -> None:
        if len(size_mm) != 3 or any(not isinstance(side, int | float) or side <= 0 for side in size_mm):
            raise InputError(f"'box_mm' is {size_mm!r}; give three positive numbers.")
        super().__init__(keys, [1, 1, 1])
        self.cropper = ToModelBox(size_mm)


@dataclass(frozen=True)
class _Volume:
    """A tensor (1, C, D, H, W) that need not exist: where its slabs come from, as often as they are asked for."""

    source: Callable[[], Slabs]
    size: Size
    layers: tuple[Layer, ...] = ()
    held: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, slab: int) -> _Volume:
        channels, depth, height, width = tensor.shape[1:]
        return cls(lambda: iter(tensor.split(slab, dim=2)), (channels, depth, height, width), held=tensor)

    def slabs(self) -> Slabs:
        return _apply(self.layers, self.source())

    def then(self, layer: Layer, size: Size) -> _Volume:
        return _Volume(self.source, size, (*self.layers, layer))

    def through(self, module: nn.Module) -> _Volume:
        """After a layer; a norm goes through all slabs once, for its statistics."""
        if isinstance(module, GroupNormSiLU):
            return self.then(_normalisation(module, self.slabs()), self.size)
        return self.then(_layer(module), _size_after(module, self.size))

    def whole(self) -> Tensor:
        """All slabs in one tensor, channels-last."""
        if self.held is not None:
            return self.held
        result: Tensor | None = None
        done = 0
        for slab in self.slabs():
            if result is None:
                result = torch.empty((1, *self.size), device=slab.device, memory_format=torch.channels_last_3d)
            result[:, :, done : done + slab.shape[2]] = slab
            done += slab.shape[2]
        if result is None or done != self.size[1]:
            raise RuntimeError(f"{done} planes came of a tensor of {self.size}")
        return result


def _check(block: nn.Module) -> None:
    """Raise an InputError for a block that `_layer` and `_residual` do not know."""
    if isinstance(block, SpatialAttentionBlock):
        raise InputError("attention looks at the whole volume and cannot be computed slab by slab; switch it off.")
    parts = (block.conv1, block.conv2, block.nin_shortcut) if isinstance(block, ResBlock) else (block,)
    for part in parts:
        known = (GroupNormSiLU, FoldedUpsample, AEKLDownsample, Pointwise, nn.Identity)
        if not isinstance(part, known) and not _is_plain(part):
            raise InputError(
                f"a {type(part).__name__} of the network cannot be computed slab by slab; only the convolutions, "
                "norms and samplings of BrainVAE's defaults can (no use_convtranspose, three dimensions)."
            )


def _is_plain(block: Any) -> bool:
    """Whether it is one 3x3x3 convolution that keeps the size, and nothing more."""
    if not isinstance(block, Convolution) or len(block) != 1 or not isinstance(block.conv, nn.Conv3d):
        return False
    conv = block.conv
    keeps_size = conv.kernel_size == (3, 3, 3) and conv.padding == conv.stride == conv.dilation == (1, 1, 1)
    return keeps_size and conv.groups == 1


def _size_after(block: nn.Module, size: Size) -> Size:
    _, depth, height, width = size
    if isinstance(block, AEKLDownsample):
        depth, height, width = depth // 2, height // 2, width // 2
    elif isinstance(block, FoldedUpsample):
        depth, height, width = 2 * depth, 2 * height, 2 * width
    return _conv(block).out_channels, depth, height, width


def _conv(block: Any) -> nn.Conv3d:
    """The one convolution of MONAI's `Convolution`, downsampling or upsampling."""
    holder = {AEKLDownsample: "conv", FoldedUpsample: "postconv"}.get(type(block))
    conv: nn.Conv3d = getattr(block, holder).conv if holder else block.conv
    return conv


def _layer(block: nn.Module) -> Layer:
    """A convolution, a sampling or nothing, as it goes over slabs."""
    if isinstance(block, (nn.Identity, Pointwise)):
        return lambda slabs: map(block, slabs)
    conv = _conv(block)
    if isinstance(block, AEKLDownsample):
        return _along(lambda x: F.conv3d(F.pad(x, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2), step=2, before=0)
    if isinstance(block, FoldedUpsample):
        kernel = block.kernel()
        # Of the 2n + 2 planes that n planes give, three at each end lack a neighbour: padding takes them off.
        return _along(lambda x: F.conv_transpose3d(x, kernel, conv.bias, stride=2, padding=(3, 1, 1)), step=1, before=1)
    return _along(lambda x: F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1)), step=1, before=1)


def _along(compute: Callable[[Tensor], Tensor], step: int, before: int) -> Layer:
    """A layer whose kernel of three moves by `step` along D; `map` holds no slab that has been worked on."""
    return lambda slabs: map(compute, _overlapping(slabs, step, before))


def _overlapping(slabs: Slabs, step: int, before: int) -> Slabs:
    """Planes for a kernel of three that moves by `step`, each slab beginning with what the kernel needs again.

    `before` planes of zeros stand before the first plane, and one behind the last.
    """
    rest: Tensor | None = None
    for slab in slabs:
        zeros = slab.new_zeros((1, slab.shape[1], 1, *slab.shape[3:]))
        planes = torch.cat([*[zeros] * before, slab] if rest is None else [rest, slab], dim=2)
        n_windows = max(0, (planes.shape[2] - 3) // step + 1)
        rest = planes[:, :, n_windows * step :].clone()  # a view would keep all planes alive
        ready = [_channels_last(planes)] if n_windows else []
        del slab, planes  # while later layers work, this one holds nothing but `rest`
        while ready:
            yield ready.pop()
    if rest is not None:
        planes = torch.cat([rest, zeros], dim=2)
        if planes.shape[2] >= 3:
            yield _channels_last(planes)


def _normalisation(norm: GroupNormSiLU, slabs: Slabs) -> Layer:
    """A group norm with its SiLU; goes through the slabs for the statistics."""
    sizes, means, variances = [], [], []
    for slab in slabs:
        mean, variance = channel_moments(rows_of(slab)[0])
        sizes.append(slab[0, 0].numel())
        means.append(mean)
        variances.append(variance)
    moments = merged_moments(sizes, means, variances)
    scale, shift = scale_and_shift(*moments, norm.weight, norm.bias, norm.num_groups, norm.eps)

    def normalised(slab: Tensor) -> Tensor:
        output = torch.empty_like(slab, memory_format=torch.channels_last_3d)
        scale_rows(rows_of(slab)[0], scale, shift, norm.silu, rows_of(output)[0])
        return output

    return lambda slabs: map(normalised, slabs)


def _fork(main: tuple[Layer, ...], shortcut: Layer) -> Layer:
    """A residual block, both of whose ways begin at the same slabs."""

    def layer(slabs: Slabs) -> Slabs:
        waiting: deque[Tensor] = deque()  # itertools.tee would hold up to 57 slabs

        def seen() -> Slabs:
            for slab in slabs:
                waiting.append(slab)
                yield slab

        return _sum(_apply(main, seen()), shortcut(waiting.popleft() for _ in count()))

    return layer


def _sum(slabs: Slabs, others: Slabs) -> Slabs:
    """Add volumes that are cut into slabs in different places; the first one's are changed in place.

    Of the others only as many are asked for as a slab needs: in a fork they exist no earlier.
    """
    rest: Tensor | None = None
    for slab in slabs:
        depth = slab.shape[2]
        while rest is None or rest.shape[2] < depth:
            rest = next(others) if rest is None else torch.cat([rest, next(others)], dim=2)
        yield slab.add_(rest[:, :, :depth])
        rest = rest[:, :, depth:].clone()  # a view would keep all planes alive


def _apply(layers: tuple[Layer, ...], slabs: Slabs) -> Slabs:
    for layer in layers:
        slabs = layer(slabs)
    return slabs


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
