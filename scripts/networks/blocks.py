"""The parts of `BrainVAE` that MONAI lacks: a Haar step, a normalisation a voxel, and faster forms of its layers.

Parameters keep MONAI's names and shapes. What is fast here is fast for channels-last memory on a CPU; on a GPU and in
exports each layer is the plain PyTorch expression of its formula.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

__all__ = ["FoldedUpsample", "Pointwise", "PositionNorm", "PositionResBlock", "haar", "inverse_haar"]

CHUNK = 2**16  # values, 0.25 MB in float32: the temporaries of a chunk stay in the second-level cache


def haar(image: Tensor) -> Tensor:
    """One orthonormal Haar step along all three axes: sums and differences of neighbours, divided by sqrt(8).

    Args:
        image: (B, C, D, H, W) with even sides, any floating type.

    Returns:
        (B, 8C, D/2, H/2, W/2); the first C channels are 8^-0.5 times the sums of 2 x 2 x 2 voxels.

    Source: Haar, Mathematische Annalen 69 (1910), 331; Mallat, A Wavelet Tour of Signal Processing, section 7.7.
    """
    for axis in (2, 3, 4):
        pairs = image.unflatten(axis, (-1, 2))
        first, second = pairs.select(axis + 1, 0), pairs.select(axis + 1, 1)
        image = torch.cat((first + second, first - second), 1)
    return image * 8**-0.5


def inverse_haar(bands: Tensor) -> Tensor:
    """The inverse of `haar`, which is its transpose.

    Args:
        bands: (B, 8C, D, H, W), any floating type.

    Returns:
        (B, C, 2D, 2H, 2W).
    """
    for axis in (4, 3, 2):
        low, high = bands.chunk(2, 1)
        bands = torch.stack((low + high, low - high), axis + 1).flatten(axis, axis + 1)
    return bands * 8**-0.5


class PositionNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each voxel with a gain, then SiLU.

    y = SiLU(weight x / sqrt(mean over channels of x^2 + eps)). It looks at nothing but the voxel itself, so a crop, a
    slab and a whole volume are treated alike.

    Args:
        channels: of the input.
        eps: added to the mean square.

    Source: Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W), any floating type and memory format, to the same."""
        if not torch.jit.is_scripting():  # noqa: SIM102  scripting compiles no condition that calls Python
            if _is_plain_channels_last(x):
                return self._in_chunks(x)
        values = x.float()
        scale = torch.rsqrt(values.square().mean(1, keepdim=True) + self.eps)
        return F.silu(values * scale * self.weight.view(-1, 1, 1, 1)).to(x.dtype)

    @torch.jit.unused
    def _in_chunks(self, x: Tensor) -> Tensor:
        output: Tensor = _ChunkedNorm.apply(x, self.weight, self.eps)
        return output


class PositionResBlock(nn.Module):
    """MONAI's `AEKLResBlock` with `PositionNorm` in place of group normalisation and SiLU; the same names.

    The second convolution starts small, so that a fresh network is nearly its linear path.

    Args:
        block: the block whose convolutions are taken.
    """

    def __init__(self, block: AEKLResBlock) -> None:
        super().__init__()
        self.norm1 = PositionNorm(block.in_channels, block.norm1.eps)
        self.conv1 = block.conv1
        self.norm2 = PositionNorm(block.out_channels, block.norm2.eps)
        self.conv2 = block.conv2
        shortcut = block.nin_shortcut
        self.nin_shortcut = shortcut if isinstance(shortcut, nn.Identity) else Pointwise(shortcut)
        last: Any = self.conv2.conv
        nn.init.normal_(last.weight, std=0.2 * (27 * block.out_channels) ** -0.5)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C', D, H, W)."""
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h.add_(self.nin_shortcut(x))  # in place: no layer's backward pass needs its convolution's output


class Pointwise(nn.Module):
    """A 1x1x1 convolution; channels-last on a CPU as the matrix product that it is, which PyTorch makes it seldom.

    Args:
        block: MONAI's `Convolution` whose layer is taken, under the same name.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv = block.conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C', D, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102  scripting compiles no condition that calls Python
            if _is_plain_channels_last(x):
                rows = x.permute(0, 2, 3, 4, 1)
                return F.linear(rows, self.conv.weight.flatten(1), self.conv.bias).permute(0, 4, 1, 2, 3)
        return self.conv(x)


class FoldedUpsample(nn.Module):
    """Nearest-neighbour x2 upsampling and a 3x3x3 convolution as one transposed convolution.

    In one dimension the output at o is the sum over i of x[i] W[o + 1 - 2i] with W = (w2, w1 + w2, w0 + w1, w0) for
    the convolution's kernel (w0, w1, w2): kernel 4, stride 2, padding 1; in three dimensions the same holds axis by
    axis. 8 multiplications an output instead of 27. The parameters stay those of the convolution, under the same
    names, so state dicts do not change and training goes on as before; results agree to rounding.

    Args:
        upsample: MONAI's `UpSample` block (nearest, factor 2, then a 3x3x3 convolution) whose convolution is taken.
    """

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.postconv = upsample.postconv
        fold = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        self.register_buffer("fold", fold, persistent=False)

    @staticmethod
    def replaces(block: nn.Module) -> bool:
        """Whether the block is one that this class computes exactly."""
        if not isinstance(block, UpSample):
            return False
        up, conv = (
            getattr(block, "upsample_non_trainable", None),
            getattr(getattr(block, "postconv", None), "conv", None),
        )
        return (
            isinstance(up, nn.Upsample)
            and not hasattr(block, "preconv")
            and up.mode == "nearest"
            and up.scale_factor in (2.0, (2.0, 2.0, 2.0))
            and isinstance(conv, nn.Conv3d)
            and conv.kernel_size == (3, 3, 3)
            and conv.stride == (1, 1, 1)
            and conv.padding == (1, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) to (B, C', 2D, 2H, 2W)."""
        return F.conv_transpose3d(x, self.kernel(), self.postconv.conv.bias, stride=2, padding=1)

    def kernel(self) -> Tensor:
        """The transposed convolution's, (C, C', 4, 4, 4), from the weights as they are now."""
        return torch.einsum("oixyz,ax,by,cz->ioabc", self.postconv.conv.weight, self.fold, self.fold, self.fold)


class _ChunkedNorm(torch.autograd.Function):
    """`PositionNorm` channels-last in chunks; only the input is kept, the backward pass computes the rest anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output = torch.empty_like(x, memory_format=torch.channels_last_3d)
        for chunk, target in zip(_chunks(x), _chunks(output), strict=True):
            normalised, _ = _normalised(chunk, eps)
            target.copy_(F.silu(normalised.mul_(weight), inplace=True))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: the result would silently lack its dependence on the input
            raise RuntimeError("PositionNorm can be differentiated once only; make the input contiguous for more.")
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        result = torch.empty_like(x, memory_format=torch.channels_last_3d)
        weight_gradient = torch.zeros_like(weight)
        for chunk, grad, target in zip(_chunks(x), _chunks(gradient), _chunks(result), strict=True):
            normalised, scale = _normalised(chunk, ctx.eps)
            grad = torch.ops.aten.silu_backward(grad.float(), normalised * weight)
            along = grad * normalised
            weight_gradient += along.sum(0)
            inner = along.mul_(weight).mean(1, keepdim=True)
            target.copy_(grad.mul_(weight).sub_(normalised.mul_(inner)).mul_(scale))
        return result, weight_gradient, None


def _normalised(chunk: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms and 1 / rms of rows (voxels, C), float32."""
    values = chunk.float()
    scale = torch.rsqrt(values.square().mean(1, keepdim=True) + eps)
    return values * scale, scale


def _is_plain_channels_last(x: Tensor) -> bool:
    """Whether a tensor is one for the ways of channels-last memory on a CPU, outside exports and compilation."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    channels_last = x.ndim == 5 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last_3d)
    return channels_last and x.device.type == "cpu"


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a channels-last volume's rows (voxels, C), of about CHUNK values each."""
    rows = x.permute(0, 2, 3, 4, 1).view(-1, x.shape[1])
    return rows.split(max(1, CHUNK // rows.shape[1]))
