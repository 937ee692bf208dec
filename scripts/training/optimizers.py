"""Muon for a 3D autoencoder: orthogonalised momentum on the hidden convolutions, AdamW on everything else.

A config chooses it by `_target_`; torch's own `torch.optim.Muon` takes matrices only. One optimizer with two kinds
of parameter groups, so that MONAI's trainer, its learning rate handlers and the checkpoints see nothing unusual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from scripts.networks import computes_bf16_fast
from scripts.run import InputError

__all__ = ["MuonAdamW", "orthogonalize"]

# Quintic Newton-Schulz coefficients of Jordan et al. (see MuonAdamW): steep at 0, singular values end near 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Move the singular values of a matrix towards 1 by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns), floating.
        steps: iterations of X <- aX + (bA + cA^2)X with A = X X^T.

    Returns:
        A matrix of the same shape with nearly the same singular vectors and singular values between about 0.7 and 1.2.
    """
    if matrix.ndim != 2:
        raise ValueError(f"matrix must have 2 dimensions, got {matrix.ndim}")
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon on the hidden 3x3x3 convolutions, AdamW on first and last layers, 1x1x1 convolutions, norms and biases.

    Muon: M <- momentum M + G, the step is `lr` times the weight's own Frobenius norm along the Nesterov momentum,
    orthogonalised as a matrix (out, in x 27). Scale-free: `lr` 0.02 changes a weight by 2 % of its norm whatever the
    gradient's size. Learning rate schedules scale both groups alike.

    Source: Jordan et al., Muon, https://kellerjordan.github.io/posts/muon/ (orthogonalised momentum); Bernstein,
    https://arxiv.org/abs/2409.20325 (steps in proportion to the weight's norm).

    Args:
        network: the network to train.
        lr: relative step of the hidden convolutions, those with 16 channels or more on both sides.
        adam_lr: learning rate of AdamW for the rest.
        momentum: momentum of Muon.
        betas: AdamW's betas.
        weight_decay: AdamW's decoupled weight decay (not applied to the hidden convolutions, whose norm sets the
            step).
    """

    def __init__(
        self,
        network: nn.Module,
        lr: float = 0.02,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or adam_lr <= 0:
            raise InputError(
                f"learning rates must be positive, got lr={lr} and adam_lr={adam_lr}; "
                "correct learning_rate and adam_learning_rate."
            )
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
        hidden = [m.weight for m in convolutions if min(m.in_channels, m.out_channels) >= 16]
        hidden_ids = {id(weight) for weight in hidden}
        rest = [p for p in network.parameters() if id(p) not in hidden_ids]
        groups = [
            {"params": hidden, "lr": lr, "momentum": momentum, "muon": True},
            {"params": rest, "lr": adam_lr, "betas": betas, "weight_decay": weight_decay, "muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both groups.

        Args:
            closure: evaluates the model again and returns the loss, as in every torch optimizer.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _muon(weight: torch.Tensor, grad: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].mul_(group["momentum"]).add_(grad)
        matrix = (grad + group["momentum"] * momentum).flatten(1)
        # The iterations are made to bear bf16, and their result is rescaled: its rounding is far below a step's noise.
        dtype = torch.bfloat16 if computes_bf16_fast(weight.device) else weight.dtype
        direction = orthogonalize(matrix.to(dtype)).to(weight.dtype).view_as(weight)
        weight.add_(direction, alpha=-group["lr"] * float(weight.norm() / (direction.norm() + 1e-12)))

    @staticmethod
    def _adamw(weight: torch.Tensor, grad: torch.Tensor, state: dict, group: dict) -> None:
        if not state:
            state.update(step=0, mean=torch.zeros_like(weight), square=torch.zeros_like(weight))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(grad, 1 - beta1)
        state["square"].lerp_(grad.square(), 1 - beta2)
        scale = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1 ** state["step"]))
