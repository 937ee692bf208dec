"""Scaling and padding of latents for a diffusion model, and the way back."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDPMScheduler

from scripts.latents import LatentScaling

STATISTICS = {
    "scale_factor": {"channel": [0.5, 2.0, 1.0, 4.0], "overall": 0.75},
    "shift": {"channel": [1.0, -2.0, 0.0, 3.0], "overall": 0.5},
}
SCALED = {"channel": [0.5, 8.0, 2.0, -4.0], "overall": [1.125] * 4, "raw": [2.0] * 4}  # of 2, exact in binary


@pytest.mark.parametrize("kind", SCALED)
def test_scaling_and_its_inverse(kind: str) -> None:
    """(2 - shift) * factor by channel; padding is 0 after the scaling, the cohort's mean. The inverse is exact to
    float32's rounding, also where an odd number was padded."""
    scaling = LatentScaling(kind, STATISTICS, pad=True)
    scaled = scaling.apply(torch.full((4, 2, 4, 4), 2.0))
    assert scaled[:, 1, 0, 0].tolist() == SCALED[kind]
    assert (scaled[:, [0, 3]] == 0).all() and (scaled[:, 1:3] != 0).all()
    for sides in ((4, 6, 8), (1, 3, 5)):
        z = torch.randn(4, *sides, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(scaling.undo(scaling.apply(z), sides), z, rtol=1e-5, atol=1e-5)


def test_padding_is_that_of_monais_inferer() -> None:
    """28 x 34 x 28 becomes 28 x 36 x 28 as `LatentDiffusionInferer` pads it, and crops it back."""
    sides = (28, 34, 28)
    z, inferer = torch.randn(4, *sides), LatentDiffusionInferer(DDPMScheduler(10), 1.0, [28, 36, 28], list(sides))
    padded = LatentScaling("raw", pad=True).apply(z)
    assert torch.equal(padded, torch.as_tensor(inferer.ldm_resizer(z)))
    assert torch.equal(z, torch.as_tensor(inferer.autoencoder_resizer(padded)))
