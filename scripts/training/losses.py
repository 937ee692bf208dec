"""The training loss of the VAE: reconstruction, Kullback-Leibler divergence, perceptual term, scale equivariance.

`train.json` gives it to MONAI's `SupervisedTrainer`, which calls it with the network's `(recon, mu, sigma)` and the
image. Each term is a mean over values, so that a weight means the same at every crop and size, and each is kept apart
for the logs. Everything is computed in fp32, also where the network ran under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from scripts.networks import AutocastInferer, Posterior
from scripts.run import InputError

__all__ = ["ScaleEquivariance", "VAELoss"]


class ScaleEquivariance:
    """How far the decoder is from giving a half-size image for a half-size latent.

    mean |D(P z) - P x| with P the mean over 2 x 2 x 2 values, D the decoder, z a sample of the posterior, x the image.
    It keeps power out of the latent's finest frequencies, which a diffusion model would have to learn.

    Args:
        decode: the network's.
        inferer: whose autocast the decoder runs under.

    Source: Kouzelis et al., EQ-VAE, https://arxiv.org/abs/2502.09509; Skorokhodov et al.,
    https://arxiv.org/abs/2502.14831, section 3.3.
    """

    def __init__(self, decode: Callable[[torch.Tensor], torch.Tensor], inferer: AutocastInferer) -> None:
        self.decode, self.inferer = decode, inferer

    def __call__(self, mu: torch.Tensor, sigma: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """A scalar in fp32.

        Args:
            mu: posterior means, (B, C, D/4, H/4, W/4).
            sigma: posterior standard deviations, the same shape.
            image: (B, 1, D, H, W).
        """
        half = F.avg_pool3d(Posterior.of_sigma(mu, sigma).sample(), 2)
        with self.inferer.autocast():
            decoded = self.decode(half).float()
        depth, height, width = decoded.shape[2:]  # an odd latent's last plane has no partner
        return F.l1_loss(decoded, F.avg_pool3d(image.float(), 2)[:, :, :depth, :height, :width])


class VAELoss(nn.Module):
    """The weighted sum of L1, MSE, KL, a perceptual distance and scale equivariance; a term of weight 0 is left out.

    Args:
        perceptual: a callable of (recon, target) that returns a scalar, such as `LPIPS3D`.
        equivariance: a callable of (mu, sigma, target) that returns a scalar, `ScaleEquivariance`.
        recon_weight: weight of the mean absolute error.
        mse_weight: weight of the mean squared error.
        kl_weight: weight of the mean KL per latent value, in nats. A KL that is summed over a latent of 106,624 values
            with weight 1e-6 is this one with weight 0.107.
        perceptual_weight: weight of the perceptual distance.
        equivariance_weight: weight of the mean absolute error at half scale.

    Raises:
        InputError: a negative weight, or a weight without the callable that it is for.
    """

    def __init__(
        self,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        equivariance: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        recon_weight: float = 1.0,
        mse_weight: float = 0.0,
        kl_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        equivariance_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = {
            "l1": recon_weight,
            "mse": mse_weight,
            "kl": kl_weight,
            "lpips": perceptual_weight,
            "equivariance": equivariance_weight,
        }
        for name, weight in self.weights.items():
            if weight < 0:
                raise InputError(f"the weight of {name} must not be negative, got {weight}; give 0 to leave it out.")
        for name, weight, term in (
            ("perceptual", perceptual_weight, perceptual),
            ("equivariance", equivariance_weight, equivariance),
        ):
            if weight > 0 and term is None:
                raise InputError(f"{name}_weight is {weight}, but nothing is given that computes it; give 0.")
        self.perceptual, self.equivariance = perceptual, equivariance
        self.parts: dict[str, float] = {}

    def forward(self, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """Total loss; the unweighted terms of this call stand in `parts` afterwards.

        Args:
            output: recon (B, 1, D, H, W), mu and sigma (B, C, D/4, H/4, W/4), any floating type.
            target: the image (B, 1, D, H, W).

        Returns:
            A scalar in fp32.
        """
        recon, mu, sigma = output
        with torch.autocast(recon.device.type, enabled=False):
            recon, target = recon.float(), target.float()
            terms = {"l1": F.l1_loss(recon, target)}
            if self.weights["mse"] > 0:
                terms["mse"] = F.mse_loss(recon, target)
            terms["kl"] = Posterior.of_sigma(mu, sigma).kl().mean()
            if self.perceptual is not None and self.weights["lpips"] > 0:
                terms["lpips"] = self.perceptual(recon, target)
            if self.equivariance is not None and self.weights["equivariance"] > 0:
                terms["equivariance"] = self.equivariance(mu, sigma, target)
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self.parts = {"loss": total.item(), **{name: term.item() for name, term in terms.items()}}
        return total
