"""The autoencoder of the bundle: MONAI's `AutoencoderKL` with the calling conventions that MONAI's tools need.

Every config builds `BrainVAE`; training unpacks `(recon, mu, sigma)`, everything else (evaluators, MONAI Label,
exports) gets one tensor. Constructor arguments and state-dict keys are MONAI's, so weights move between the two
classes in both directions. The one addition is faster exact arithmetic: nearest-neighbour upsampling followed by a
3x3x3 convolution is computed as one transposed convolution, with the kernel folded on the fly from the trained weights,
and a group normalisation together with its SiLU (`scripts.group_norm`).
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UpSample
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scripts.errors import InputError
from scripts.files import is_packed
from scripts.group_norm import GroupNormSiLU, is_plain_channels_last

__all__ = [
    "UNREADABLE",
    "BrainVAE",
    "FoldedUpsample",
    "Pointwise",
    "ResBlock",
    "load_state",
    "load_weights",
    "read_state_dict",
    "start_deterministic",
]


# What torch's restricted unpickler and safetensors raise for files that are cut off or of another kind.
UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError, struct.error,
    SafetensorError, pickle.UnpicklingError,
)  # fmt: skip


class BrainVAE(AutoencoderKL):
    """`monai.networks.nets.AutoencoderKL` that returns one tensor in eval mode and can be scripted.

    Arguments are those of `AutoencoderKL`. In training mode `forward` returns `(recon, mu, sigma)` with `recon`
    decoded from one sample of the posterior, in eval mode and under TorchScript the tensor decoded from the
    posterior mean. `encode` and `decode` are exported to TorchScript; attention blocks cannot be scripted, and
    `scripts.export` traces them.

    Shapes for the default strides: image (B, 1, D, H, W) with sides that are multiples of 4, latent
    (B, 4, D/4, H/4, W/4). `logvar` is 2 ln sigma and lies within [-30, 20].

    Source: Kingma and Welling, https://arxiv.org/abs/1312.6114; Rombach et al., https://arxiv.org/abs/2112.10752;
    MAISI, https://arxiv.org/abs/2409.11169.
    """

    def __init__(self, *args, **kwargs) -> None:  # MONAI's own signature, forwarded whole
        super().__init__(*args, **kwargs)
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if FoldedUpsample.replaces(child):
                    setattr(module, name, FoldedUpsample(child))
                elif isinstance(child, AEKLResBlock):
                    setattr(module, name, ResBlock(child))
                elif isinstance(child, nn.GroupNorm) and not isinstance(module, AEKLResBlock):
                    setattr(module, name, GroupNormSiLU(child, silu=False))

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of an image.

        Args:
            x: image (B, C, D, H, W).

        Returns:
            mu and sigma, each (B, latent_channels, D/4, H/4, W/4).
        """
        h = self.encoder(x) if torch.jit.is_scripting() else self._run(self.encoder, x)
        mu = self.quant_conv_mu(h)
        logvar = torch.clamp(self.quant_conv_log_sigma(h), -30.0, 20.0)
        return mu, torch.exp(logvar / 2)

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image of a latent.

        Args:
            z: latent (B, latent_channels, D/4, H/4, W/4).

        Returns:
            image (B, C, D, H, W).
        """
        z = self.post_quant_conv(z)
        return self.decoder(z) if torch.jit.is_scripting() else self._run(self.decoder, z)

    def forward(self, x: torch.Tensor):
        """Reconstruct.

        Args:
            x: image (B, C, D, H, W).

        Returns:
            `(recon, mu, sigma)` in training mode, else the reconstruction from the posterior mean, (B, C, D, H, W).
        """
        mu, sigma = self.encode(x)
        if torch.jit.is_scripting():
            return self.decode(mu)
        else:  # scripting compiles only one side of this branch, so the two return types never meet
            if self.training:
                return self.decode(self.sampling(mu, sigma)), mu, sigma
            return self.decode(mu)

    @torch.jit.unused
    def _run(self, part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        return part(x)


class ResBlock(nn.Module):
    """MONAI's `AEKLResBlock` whose SiLUs are computed with the normalisations; the same parameters and names.

    Args:
        block: the block whose layers are taken.
    """

    def __init__(self, block: AEKLResBlock) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(block.norm1, silu=True)
        self.conv1 = block.conv1
        self.norm2 = GroupNormSiLU(block.norm2, silu=True)
        self.conv2 = block.conv2
        shortcut = block.nin_shortcut
        self.nin_shortcut = shortcut if isinstance(shortcut, nn.Identity) else Pointwise(shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) to (B, C', D, H, W)."""
        if not torch.jit.is_scripting():  # noqa: SIM102  scripting compiles no condition that calls Python
            if is_plain_channels_last(x):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) to (B, C', 2D, 2H, 2W)."""
        return F.conv_transpose3d(x, self.kernel(), self.postconv.conv.bias, stride=2, padding=1)

    def kernel(self) -> torch.Tensor:
        """The transposed convolution's, (C, C', 4, 4, 4), from the weights as they are now."""
        return torch.einsum("oixyz,ax,by,cz->ioabc", self.postconv.conv.weight, self.fold, self.fold, self.fold)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict without executing anything that the file may hold.

    Args:
        path: a `.safetensors` file, or a `torch.save` file that holds a state dict, bare or under the key `model`.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        InputError: the file is missing, is not a weights file, or holds something else than tensors.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"'weights' is {path!r}; give the path of a weights file.")
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give the path of a weights file as 'weights'.")
    try:
        if path.suffix == ".safetensors":
            return _real_numbers(load_file(path), path)
        if is_packed(path):
            raise ValueError("a compressed archive, which torch.save never writes")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged or no weights file; copy it again.") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise InputError(f"{path} holds no state dict (names to tensors); export the network's state_dict().")
    return _real_numbers(content, path)


def _real_numbers(state: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """The state dict, if its tensors hold finite real numbers; with others a network gives black or nothing."""
    for name, tensor in state.items():
        has_values = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
        # one number of an expanded tensor is all that it has, however many it declares
        if not has_values or tensor.is_complex() or not torch.isfinite(_stored(tensor)).all():
            raise InputError(f"{path}: '{name}' holds NaN, infinite, complex or no values; export the weights again.")
    return dict(state)


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[tuple(slice(None) if stride else slice(1) for stride in tensor.stride())]


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load weights strictly: every name and every shape must fit.

    Args:
        network: the network to fill, in place.
        path: see `read_state_dict`.

    Returns:
        The network.

    Raises:
        InputError: the file cannot be read, or is of another architecture.
    """
    return load_state(network, read_state_dict(path), path)


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: str | Path) -> nn.Module:
    """`load_weights` of a state dict that has been read already; `path` is where from, for the message."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    if missing or unknown or reshaped:
        example = (
            f"'{reshaped[0]}' is {tuple(state[reshaped[0]].shape)} there and {tuple(own[reshaped[0]].shape)} here"
            if reshaped
            else f"'{missing[0]}' is missing"
            if missing
            else f"'{unknown[0]}' is not known here"
        )
        raise InputError(
            f"{path} is of another architecture than network_def: {len(missing)} missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape ({example}); use the config that trained it, or an overlay such as "
            "configs/maisi.json."
        )
    network.load_state_dict(state)
    return network


def start_deterministic(network: nn.Module, logvar: float = -8.0) -> nn.Module:
    """Start training with an almost noise-free posterior: the log-variance head begins at a constant.

    A fresh network has sigma near 1, noise as loud as the signal, and learns slowly until it has pushed it down.
    From sigma = exp(logvar / 2) = 0.018 it is an autoencoder first, and the KL raises sigma where that costs nothing.

    Args:
        network: a `BrainVAE`, changed in place.
        logvar: the constant, within [-30, 20].

    Returns:
        The network.
    """
    if not -30.0 <= logvar <= 20.0:
        raise InputError(f"logvar must lie within [-30, 20], got {logvar}; mend initial_logvar.")
    head: Any = network.get_submodule("quant_conv_log_sigma.conv")
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, logvar)
    return network
