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
PARAMETERS = [((), 2_728_072), (("lite",), 2_929_057), (("maisi",), 20_944_897)]  # as the documentation states
BOTH = pytest.mark.parametrize("arguments", [SMALL, TINY], ids=["default", "lite"])
SIZE = (1, 1, 12, 16, 8)


def image(size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random volumes in [0, 1]."""
    return torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("overlays", "n_parameters"), PARAMETERS)
def test_parameter_count(overlays: tuple[str, ...], n_parameters: int):
    """Each config's network is as large as it is said to be."""
    network = BrainVAE(**arguments_of("train", *overlays))
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters


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


@BOTH
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


@BOTH
def test_scripted_network_is_equal(arguments: dict[str, Any], tmp_path: Path):
    """TorchScript keeps encode and decode, survives a file, computes the same to the bit, and gives one tensor always."""
    network, x = BrainVAE(**arguments), image()
    assert torch.is_tensor(torch.jit.script(network.train())(x))
    torch.jit.script(network.eval()).save(tmp_path / "model.ts")
    scripted = torch.jit.load(tmp_path / "model.ts")
    with torch.no_grad():
        assert torch.equal(scripted(x), network(x))
        assert all(map(torch.equal, scripted.encode(x), network.encode(x)))
        mu = network.encode(x)[0]
        assert torch.equal(scripted.decode(mu), network.decode(mu))


def test_checkpointing_changes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    """MAISI's blocks with attention: recomputing activations gives the same loss and gradients, bit for bit."""
    calls: list[object] = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(a) or checkpoint(*a, **k))
    results, x = [], image((1, 1, 8, 8, 8))
    for use_checkpoint in (True, False):
        torch.manual_seed(3)
        network = BrainVAE(**{**MAISI, "use_checkpoint": use_checkpoint}).train()
        loss = VAELoss()(network(x), x)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in network.parameters())])
    assert len(calls) == 2  # encoder and decoder of the first
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_start_deterministic():
    """sigma is exp(logvar / 2) for every image, mu is not touched, and the head keeps learning."""
    network, x = BrainVAE(**TINY), image()
    mu = network.encode(x)[0]
    assert start_deterministic(network, -6.0) is network
    after, sigma = network.encode(x)
    assert torch.equal(mu, after)
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.0497870684))
    VAELoss(kl_weight=1.0)(network(x), x).backward()
    assert network.quant_conv_log_sigma.conv.weight.grad.abs().sum() > 0


REFUSED = [
    ("'norm' is 'batch'; give group or position", lambda: BrainVAE(**{**SMALL, "norm": "batch"})),
    ("'initial_logvar' is -31", lambda: start_deterministic(BrainVAE(**TINY), -31.0)),
    ("'initial_logvar' is nan", lambda: start_deterministic(BrainVAE(**TINY), float("nan"))),
]


@pytest.mark.parametrize(("message", "make"), REFUSED)
def test_settings_out_of_range_are_refused(message: str, make: Any):
    """The config's key is named."""
    with pytest.raises(InputError, match=message):
        make()


def test_a_training_begins_with_weights_or_a_quiet_posterior(tmp_path: Path):
    """Weights are taken as they are; a fresh network gets its log-variance, or keeps its own where none is given."""
    source = BrainVAE(**TINY)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    continued, quiet, plain = (BrainVAE(**TINY) for _ in range(3))
    before = plain.quant_conv_log_sigma.conv.weight.clone()
    assert start(continued, str(tmp_path / "model.pt"), -7.0) is continued
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in continued.state_dict().items())
    assert (start(quiet, "", -7.0).quant_conv_log_sigma.conv.bias == -7).all()
    assert torch.equal(start(plain, "", None).quant_conv_log_sigma.conv.weight, before)
