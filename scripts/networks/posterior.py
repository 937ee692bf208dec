"""The posterior of a latent: what the encoder says of every value, and all that is computed from it.

N(mu, sigma^2) at every value of the latent, with logvar = 2 ln sigma held within [-30, 20] as MONAI's network does.
Training, encoding, statistics, priors and exports take it from here.

Source: Kingma and Welling, https://arxiv.org/abs/1312.6114.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scripts.conventions import LOGVAR_RANGE

__all__ = ["Posterior", "logvar_of", "sigma_of"]

LOW, HIGH = LOGVAR_RANGE


class Posterior:
    """A normal distribution at every value of a latent, in fp32.

    Args:
        mu: means, (B, C, D/4, H/4, W/4) or any other shape, any floating type.
        logvar: logs of the variances, the same shape.

    Attributes:
        mu: plain float32.
        logvar: plain float32, within [-30, 20].

    Raises:
        ValueError: the shapes differ.
    """

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        if mu.shape != logvar.shape:
            raise ValueError(f"mu and logvar must have one shape, got {tuple(mu.shape)} and {tuple(logvar.shape)}.")
        self.mu, logvar = (values.as_subclass(Tensor).float() for values in (mu, logvar))
        self.logvar = logvar.clamp(LOW, HIGH)

    @classmethod
    def of_sigma(cls, mu: Tensor, sigma: Tensor) -> Posterior:
        """From means and standard deviations, as `BrainVAE.encode` gives them."""
        return cls(mu, logvar_of(sigma.as_subclass(Tensor).float()))

    @property
    def sigma(self) -> Tensor:
        """Standard deviations."""
        return sigma_of(self.logvar)

    def sample(self) -> Tensor:
        """mu + sigma eps, with eps from torch's global generator."""
        return self.mu + self.sigma * torch.randn_like(self.mu)

    def kl(self) -> Tensor:
        """KL divergence from N(0, 1) of every value, in nats: 0.5 (mu^2 + sigma^2 - 1 - logvar); appendix B there."""
        # expm1 keeps the digits that sigma^2 - 1 loses near sigma = 1
        return 0.5 * (self.mu.square() + torch.expm1(self.logvar) - self.logvar)


def sigma_of(logvar: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Standard deviation of a log variance, held within the range; TorchScript compiles it."""
    return torch.exp(torch.clamp(logvar, low, high) / 2)


def logvar_of(sigma: Tensor, low: float = math.exp(LOW / 2), high: float = math.exp(HIGH / 2)) -> Tensor:
    """Log variance of a standard deviation, 2 ln sigma; TorchScript compiles it.

    The clamp stands before the logarithm: behind it, sigma = 0 would send an infinite gradient times zero, a NaN.
    """
    return 2 * torch.log(torch.clamp(sigma, low, high))
