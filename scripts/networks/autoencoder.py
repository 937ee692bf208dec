"""The autoencoder of the bundle: MONAI's `AutoencoderKL` with the calling conventions that MONAI's tools need.

Every config builds `BrainVAE`; training unpacks `(recon, mu, sigma)`, everything else (evaluators, MONAI Label,
exports) gets one tensor. Its two switches, `wavelet` and `norm`, make the network of the bundle; with both off it is
MONAI's, and weights move between the two classes in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import nn

from scripts.conventions import LOGVAR_RANGE
from scripts.networks.blocks import FoldedUpsample, PositionResBlock, haar, inverse_haar
from scripts.networks.posterior import sigma_of
from scripts.networks.weights import load_weights
from scripts.run import InputError

__all__ = ["BrainVAE", "start", "start_deterministic"]


class BrainVAE(AutoencoderKL):
    """`monai.networks.nets.AutoencoderKL` that returns one tensor in eval mode and can be scripted.

    Arguments are those of `AutoencoderKL`, and two more. In training mode `forward` returns `(recon, mu, sigma)` with
    `recon` decoded from one sample of the posterior, in eval mode and under TorchScript the tensor decoded from the
    posterior mean. `encode` and `decode` are exported to TorchScript; attention blocks cannot be scripted, and
    `scripts.export` traces them.

    Shapes for the bundle's configs: image (B, 1, D, H, W) with sides that are multiples of 4, latent
    (B, 4, D/4, H/4, W/4). `logvar` is 2 ln sigma and lies within [-30, 20].

    Args:
        wavelet: an orthonormal Haar step before the encoder and its inverse after the decoder. The blocks then see 8
            channels an input channel at half the resolution, and `channels` begins there.
        norm: "group", MONAI's, whose statistics are the whole volume's; or "position", `PositionNorm` inside the
            residual blocks and none before the last convolutions, so that a linear path leads from image to latent and
            from latent to image. Then no voxel depends on others beyond the convolutions' reach.

    Raises:
        InputError: `norm` is neither.

    Source: Kingma and Welling, https://arxiv.org/abs/1312.6114; Rombach et al., https://arxiv.org/abs/2112.10752;
    MAISI, https://arxiv.org/abs/2409.11169; a wavelet entry: WF-VAE, https://arxiv.org/abs/2411.17459.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 1,
        *args,
        wavelet: bool = False,
        norm: str = "group",
        **kwargs,  # MONAI's own signature, forwarded whole
    ) -> None:
        if norm not in ("group", "position"):
            raise InputError(f"'norm' is {norm!r}; give group or position.")
        bands = 8 if wavelet else 1
        if norm == "position":
            kwargs = {**kwargs, "norm_num_groups": 1}  # MONAI's group norms are replaced, for any number of channels
        super().__init__(spatial_dims, bands * in_channels, bands * out_channels, *args, **kwargs)
        self.wavelet = wavelet
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if FoldedUpsample.replaces(child):
                    setattr(module, name, FoldedUpsample(child))
                elif norm == "position" and isinstance(child, AEKLResBlock):
                    setattr(module, name, PositionResBlock(child))
                elif norm == "position" and isinstance(child, nn.GroupNorm) and not isinstance(module, AEKLResBlock):
                    setattr(module, name, nn.Identity())
        if norm == "position":  # the linear path begins without detours
            for name in ("quant_conv_mu.conv", "post_quant_conv.conv"):
                pointwise: Any = self.get_submodule(name)
                nn.init.dirac_(pointwise.weight)
                nn.init.zeros_(pointwise.bias)

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior of an image.

        Args:
            x: image (B, C, D, H, W).

        Returns:
            mu and sigma, each (B, latent_channels, D/4, H/4, W/4).
        """
        x = haar(x) if self.wavelet else x
        h = self.encoder(x) if torch.jit.is_scripting() else self._run(self.encoder, x)
        mu = self.quant_conv_mu(h)
        return mu, sigma_of(self.quant_conv_log_sigma(h))

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image of a latent.

        Args:
            z: latent (B, latent_channels, D/4, H/4, W/4).

        Returns:
            image (B, C, D, H, W).
        """
        z = self.post_quant_conv(z)
        x = self.decoder(z) if torch.jit.is_scripting() else self._run(self.decoder, z)
        if not self.wavelet:
            return x
        return inverse_haar(x if x.dtype == torch.float64 else x.float())  # autocast's bf16 would round each sum

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
    low, high = LOGVAR_RANGE
    if not low <= logvar <= high:
        raise InputError(f"'initial_logvar' is {logvar}; give a number from {low:g} to {high:g}.")
    head: Any = network.get_submodule("quant_conv_log_sigma.conv")
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, logvar)
    return network


def start(network: nn.Module, weights: str = "", logvar: float | None = None) -> nn.Module:
    """What a training begins with: weights, or a fresh network whose posterior is almost free of noise.

    Args:
        network: a `BrainVAE`, changed in place.
        weights: see `load_weights`; "" for a fresh network.
        logvar: see `start_deterministic`; None leaves a fresh network's posterior as it is.
    """
    if weights:
        return load_weights(network, weights)
    return network if logvar is None else start_deterministic(network, logvar)
