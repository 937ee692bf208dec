"""The network in operations that onnxruntime computes well; `scripts.export` rewrites it so before it writes ONNX.

Two layers change, their results only by rounding. onnxruntime sums millions of voxels one after the other in fp32,
which makes a group norm of full size wrong by a thousandth; and it unrolls a transposed convolution in memory.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from scripts.group_norm import GroupNormSiLU
from scripts.networks import FoldedUpsample

__all__ = ["StagedGroupNorm", "for_onnxruntime"]


class StagedGroupNorm(nn.Module):
    """`torch.nn.GroupNorm` whose means are taken axis by axis, so that no sum is longer than a few hundred values.

    Args:
        norm: the layer whose groups and parameters are taken.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups = norm.num_groups
        self.eps = norm.eps
        self.weight = norm.weight
        self.bias = norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) to the same shape."""
        grouped = x.unflatten(1, (self.num_groups, -1))
        centred = grouped - _mean(grouped)
        scaled = centred * torch.rsqrt(_mean(centred * centred) + self.eps)
        return scaled.flatten(1, 2) * self.weight.reshape(1, -1, 1, 1, 1) + self.bias.reshape(1, -1, 1, 1, 1)


def for_onnxruntime(network: nn.Module) -> nn.Module:
    """A copy of the network with both layers rewritten.

    Args:
        network: such as a `BrainVAE`.

    Returns:
        The copy; state and parameters are the network's.
    """
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FoldedUpsample):
                setattr(module, name, nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), child.postconv))
            elif isinstance(child, GroupNormSiLU):
                staged = StagedGroupNorm(child)
                setattr(module, name, nn.Sequential(staged, nn.SiLU()) if child.silu else staged)
    return network


def _mean(grouped: torch.Tensor) -> torch.Tensor:
    """(B, groups, C, D, H, W) to (B, groups, 1, 1, 1, 1)."""
    return grouped.mean(5, True).mean(4, True).mean((2, 3), True)
