"""The autoencoder: MONAI's weights and results, its calling conventions, and what a training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from torch import nn

from scripts.networks import BrainVAE, start, start_deterministic
from scripts.run import InputError
from scripts.training import VAELoss


def arguments_of(*names: str) -> dict[str, Any]:
    """The network's arguments in a config with its overlays."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in names])
    return {key: parser.get_parsed_content(f"network_def#{key}") for key in parser["network_def"] if key[0] != "_"}


DEFAULT = arguments_of("train")
SMALL = {**DEFAULT, "channels": [8, 16]}
LITE = {key: value for key, value in arguments_of("train", "lite").items() if key not in ("wavelet", "norm")}
TINY = {**LITE, "channels": [8, 8, 16], "norm_num_groups": 4}
MAISI = {
    **LITE, "channels": [16, 32, 64], "num_res_blocks": [2, 2, 2], "attention_levels": [False, False, True],
    "with_encoder_nonlocal_attn": True, "with_decoder_nonlocal_attn": True, "use_checkpoint": True,
}  # fmt: skip
SIZE = (1, 1, 12, 16, 8)


def image(size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random volumes in [0, 1]."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("arguments", [LITE, MAISI], ids=["lite", "maisi"])
def test_weights_are_monais(arguments: dict[str, Any]):
    """Names fit MONAI's class, which encodes equally to the bit and decodes to the folds' rounding, 1e-16 a sum."""
    torch.manual_seed(1)
    ours, theirs = BrainVAE(**arguments).eval().double(), AutoencoderKL(**arguments).eval().double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        (mu, sigma), (mu_monai, sigma_monai) = ours.encode(x), theirs.encode(x)
        assert torch.equal(mu, mu_monai) and torch.equal(sigma, sigma_monai)
        decoded = theirs.decode(mu)
        torch.testing.assert_close(ours.decode(mu), decoded, rtol=0, atol=1e-12 * float(decoded.abs().max()))


def test_a_linear_path_leads_through_the_network():
    """Without what the residual blocks add and without biases, twice the image is twice the latent and the result.

    Fresh 1x1x1 convolutions at the latent hand each channel on as it is.
    """
    network, z = BrainVAE(**SMALL).eval().double(), torch.randn(1, 4, 2, 3, 2, dtype=torch.float64)
    assert torch.equal(network.quant_conv_mu(z), z) and torch.equal(network.post_quant_conv(z), z)
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "conv2" in name:
            nn.init.zeros_(parameter)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        mu = network.encode(x)[0]
        assert mu.abs().max() > 0.01
        torch.testing.assert_close(network.encode(2 * x)[0], 2 * mu)
        torch.testing.assert_close(network.decode(2 * mu), 2 * network.decode(mu))


def test_no_voxel_depends_on_others_beyond_the_reach_of_convolutions():
    """Far from a change nothing changes: there is no statistic of a whole volume."""
    network, x = BrainVAE(**DEFAULT).eval().to(memory_format=torch.channels_last_3d), image((1, 1, 96, 8, 8))
    changed = x.clone()
    changed[:, :, :8] += 5
    with torch.no_grad():
        before, after = network.encode(x)[0], network.encode(changed)[0]
    assert torch.equal(before[:, :, 12:], after[:, :, 12:])
    assert not torch.equal(before[:, :, :2], after[:, :, :2])


@pytest.mark.parametrize("arguments", [SMALL, TINY], ids=["default", "lite"])
def test_calling_conventions(arguments: dict[str, Any]):
    """In training a reconstruction from a sample, mu and sigma; else one tensor, the posterior mean decoded."""
    network, x = BrainVAE(**arguments).train(), image()
    torch.manual_seed(2)
    recon, mu, sigma = network(x)
    assert recon.shape == SIZE and mu.shape == sigma.shape == (1, 4, 3, 4, 2)
    torch.manual_seed(2)
    torch.testing.assert_close(recon, network.decode(mu + sigma * torch.randn_like(mu)))
    with torch.no_grad():
        assert torch.equal(network.eval()(x), network.decode(network.encode(x)[0]))


def test_the_inverse_wavelet_is_computed_in_fp32():
    """Under bf16 the last eight channels are summed without rounding each sum: more than 8 bits come out."""
    network = BrainVAE(**SMALL).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoded = network.decode(torch.randn(1, 4, 3, 4, 2))
    assert decoded.dtype == torch.float32 and not torch.equal(decoded, decoded.bfloat16().float())


def test_a_training_begins_with_weights_or_a_quiet_posterior(tmp_path: Path):
    """Weights are taken as they are; a fresh network's sigma becomes exp(logvar / 2) for every image, mu stays and the
    head keeps learning; None changes nothing."""
    source, x = BrainVAE(**TINY), image()
    torch.save(source.state_dict(), tmp_path / "model.pt")
    network = start(BrainVAE(**TINY), str(tmp_path / "model.pt"), -6.0)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in network.state_dict().items())
    (mu, sigma), unchanged = network.encode(x), start(network, "", None).encode(x)
    assert torch.equal(mu, unchanged[0]) and torch.equal(sigma, unchanged[1])
    after, sigma = start(network, "", -6.0).encode(x)
    assert torch.equal(mu, after)
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.0497870684))
    VAELoss(kl_weight=1.0)(network(x), x).backward()
    assert network.quant_conv_log_sigma.conv.weight.grad.abs().sum() > 0


def test_settings_out_of_range_are_refused():
    """The config's key is named."""
    with pytest.raises(InputError, match="'norm' is 'batch'; give group or position"):
        BrainVAE(**{**SMALL, "norm": "batch"})
    with pytest.raises(InputError, match="'initial_logvar' is -31"):
        start_deterministic(BrainVAE(**TINY), -31.0)
