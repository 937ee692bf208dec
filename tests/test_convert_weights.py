"""Weights of other systems: exact under this bundle's names, refused in one sentence where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_VAE
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from scripts.convert_weights import convert, from_generative, from_original
from scripts.networks import BrainVAE, load_weights
from scripts.run import InputError

TINY_ORIGINAL = {
    **{key: value for key, value in TINY_VAE.items() if key not in ("wavelet", "norm")},
    "channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "attention_levels": [False] * 3, "norm_num_groups": 4,
}  # fmt: skip
ORIGINAL = {**TINY_ORIGINAL, "channels": [32, 64, 128], "norm_num_groups": 16}
IMAGE = torch.rand(1, 1, 16, 20, 16, generator=torch.Generator().manual_seed(0))
MISTAKES = [
    ("generative", "is of another architecture"),
    ("original", "has no 'conv_mean.weight'"),
    ("brlp", "'kind' is 'brlp'"),
]


# overlay, class, millions of parameters as published
OVERLAYS = [("brlp", BrainVAE, 13.8), ("maisi_original", AutoencoderKlMaisi, 20.9)]


class OriginalVAE(nn.Module):
    """The original's VAE, built from its description: MONAI's encoder and decoder with two convolutions between."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        parts = AutoencoderKL(**sizes)
        self.encoder, self.decoder = parts.encoder, parts.decoder
        self.conv_mean = nn.Conv3d(4, 4, 1)
        self.conv_var = nn.Conv3d(4, 4, 1)


@pytest.fixture(scope="module")
def original() -> OriginalVAE:
    """Random weights."""
    torch.manual_seed(0)
    return OriginalVAE(TINY_ORIGINAL).eval()


@pytest.fixture
def tiny_config(tmp_path: Path) -> str:
    """A config with the tiny original's network."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"network_def": {"_target_": "scripts.networks.BrainVAE", **TINY_ORIGINAL}}))
    return str(path)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As MONAI Generative called them."""
    return {name.replace("postconv.conv", "conv.conv"): tensor for name, tensor in state.items()}


@torch.no_grad()
@pytest.mark.parametrize(("prefix", "ending"), [("", "pt"), ("module.", "pt"), ("", "safetensors")])
def test_the_original_encodes_and_decodes_the_same(
    original: OriginalVAE, tmp_path: Path, tiny_config: str, prefix: str, ending: str
) -> None:
    """Mean bit by bit, log variance and image to float32, from either file format, distributed or not."""
    state = {prefix + name: tensor.contiguous() for name, tensor in original.state_dict().items()}
    source, output = str(tmp_path / f"vae.{ending}"), tmp_path / f"ours.{ending}"
    if ending == "pt":
        torch.save({"vae_state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}}, source)
    else:
        save_file(state, source)
    convert(source, str(output), config_file=tiny_config)
    ours = load_weights(BrainVAE(**TINY_ORIGINAL), output).eval()
    h = original.encoder(IMAGE)
    mu, (mu_ours, sigma_ours) = original.conv_mean(h), ours.encode(IMAGE)
    torch.testing.assert_close(mu_ours, mu, atol=0, rtol=0)
    torch.testing.assert_close(2 * sigma_ours.log(), original.conv_var(h).clamp(-30, 20), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(mu), original.decoder(mu), atol=1e-5, rtol=1e-5)


def test_generatives_names_become_monais(original: OriginalVAE) -> None:
    """Old names are translated, MONAI's own stay; the original may have been built of either."""
    state = AutoencoderKL(**TINY_ORIGINAL).state_dict()
    old = old_names(state)
    assert list(from_generative(old)) == list(from_generative(state)) == list(state) != list(old)
    assert set(from_original(old_names(original.state_dict()))) == set(BrainVAE(**TINY_ORIGINAL).state_dict())


def test_the_original_fits_the_lite_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a config: the default is the overlay with the original's sizes."""
    monkeypatch.chdir(ROOT)
    torch.save({"vae_state_dict": OriginalVAE(ORIGINAL).state_dict()}, tmp_path / "vae.pt")
    convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"))
    load_weights(BrainVAE(**ORIGINAL), tmp_path / "ours.pt")


@pytest.mark.parametrize(("kind", "message"), MISTAKES)
def test_mistakes_are_named_and_leave_no_file(tmp_path: Path, kind: str, message: str) -> None:
    """Weights that do not fit the config's network, of another system, or of a system that nobody knows."""
    torch.save(AutoencoderKL(**TINY_ORIGINAL).state_dict(), tmp_path / "vae.pt")
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"), kind, str(ROOT / "configs/inference.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"]


@pytest.mark.parametrize(("overlay", "kind", "millions"), OVERLAYS)
def test_an_overlay_builds_the_peers_network(overlay: str, kind: type, millions: float) -> None:
    """As large as published."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/evaluate.json"), str(ROOT / f"configs/{overlay}.json")])
    network = parser.get_parsed_content("network_def")
    assert type(network) is kind
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
