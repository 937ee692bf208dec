"""The training loss of the VAE: reconstruction, Kullback-Leibler divergence and a perceptual term.

`train.json` gives it to MONAI's `SupervisedTrainer`, which calls it with the network's `(recon, mu, sigma)` and the
image. Each term is a mean over values, so that a weight means the same at every crop and grid, and each is kept apart
for the logs. Everything is computed in fp32, also where the network ran under autocast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from scripts.errors import InputError

__all__ = ["VAELoss", "kl_divergence"]

LOGVAR_RANGE = (-30.0, 20.0)


def kl_divergence(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of N(mu, sigma^2) from N(0, 1), in nats per latent value.

    0.5 (mu^2 + exp(logvar) - 1 - logvar) with logvar = 2 ln sigma held within [-30, 20], as MONAI's network does;
    Kingma and Welling, https://arxiv.org/abs/1312.6114, appendix B. It stays finite for sigma of 0 and infinity.

    Args:
        mu: posterior means, any shape and floating type.
        sigma: posterior standard deviations, the shape of mu.

    Returns:
        A scalar in fp32.
    """
    low, high = LOGVAR_RANGE
    # The clamp stands before the logarithm: past it, sigma = 0 would send an infinite gradient times zero, a NaN.
    bounds = torch.exp(torch.tensor([low / 2, high / 2], device=sigma.device))
    logvar = 2 * torch.log(sigma.float().clamp(bounds[0], bounds[1]))
    return 0.5 * (mu.float().square() + logvar.exp() - 1 - logvar).mean()


class VAELoss(nn.Module):
    """`recon_weight` L1 + `mse_weight` MSE + `kl_weight` KL + `perceptual_weight` perceptual distance.

    The defaults are the original recipe's: its KL is summed over the volume and weighted by 1e-6, which is 0.107 for
    a mean over 106,624 latent values.

    Args:
        perceptual: a callable of (recon, target) that returns a scalar, such as `LPIPS3D`; needed only where
            `perceptual_weight` is above 0.
        recon_weight: weight of the mean absolute error.
        kl_weight: weight of the mean KL per latent value, in nats.
        perceptual_weight: weight of the perceptual distance.
        mse_weight: weight of the mean squared error.

    Raises:
        InputError: a negative weight, or a perceptual weight without a perceptual distance.
    """

    def __init__(
        self,
        perceptual: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        recon_weight: float = 1.0,
        kl_weight: float = 0.107,
        perceptual_weight: float = 0.6,
        mse_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights = {"l1": recon_weight, "mse": mse_weight, "kl": kl_weight, "lpips": perceptual_weight}
        for name, weight in self.weights.items():
            if weight < 0:
                raise InputError(f"the weight of {name} must not be negative, got {weight}; give 0 to leave it out.")
        if perceptual_weight > 0 and perceptual is None:
            raise InputError(f"perceptual_weight is {perceptual_weight}, but no perceptual distance is given; give 0.")
        self.perceptual = perceptual
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
            terms = {"l1": F.l1_loss(recon, target), "kl": kl_divergence(mu, sigma)}
            if self.weights["mse"] > 0:
                terms["mse"] = F.mse_loss(recon, target)
            if self.perceptual is not None and self.weights["lpips"] > 0:
                terms["lpips"] = self.perceptual(recon, target)
            total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        self.parts = {"loss": total.item(), **{name: term.item() for name, term in terms.items()}}
        return total
