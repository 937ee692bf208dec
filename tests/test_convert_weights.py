"""Weights of other systems: exact under this bundle's names, refused in one sentence where they do not fit."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_VAE, write_scan
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from torch import nn

from scripts.convert_weights import convert, from_generative, from_original
from scripts.networks import BrainVAE, load_weights
from scripts.run import InputError

TINY_ORIGINAL = {
    **{key: value for key, value in TINY_VAE.items() if key not in ("wavelet", "norm")},
    "channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "attention_levels": [False] * 3, "norm_num_groups": 4,
}  # fmt: skip
ORIGINAL = {**TINY_ORIGINAL, "channels": [32, 64, 128], "norm_num_groups": 16}
PREFIXES = ["", "module."]
IMAGE = torch.rand(1, 1, 16, 20, 16, generator=torch.Generator().manual_seed(0))


class OriginalVAE(nn.Module):
    """The original's VAE, built from its description: MONAI's encoder and decoder with two convolutions between."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        parts = AutoencoderKL(**sizes)
        self.encoder, self.decoder = parts.encoder, parts.decoder
        self.conv_mean = nn.Conv3d(4, 4, 1)
        self.conv_var = nn.Conv3d(4, 4, 1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.encoder(x)
        return self.conv_mean(h), self.conv_var(h)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)


@pytest.fixture(scope="module")
def original() -> OriginalVAE:
    torch.manual_seed(0)
    return OriginalVAE(TINY_ORIGINAL).eval()


@pytest.fixture
def tiny_config(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"network_def": {"_target_": "scripts.networks.BrainVAE", **TINY_ORIGINAL}}))
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("prefix", PREFIXES)
def test_original_encodes_and_decodes_the_same(original, tmp_path, tiny_config, prefix):
    state = {prefix + name: tensor for name, tensor in original.state_dict().items()}
    torch.save({"vae_state_dict": state, "epoch": 7, "optimizer": {"lr": 0.1}}, tmp_path / "vae.pt")
    convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"), config_file=tiny_config)
    ours = load_weights(BrainVAE(**TINY_ORIGINAL), tmp_path / "ours.pt").eval()
    mu, logvar = original.encode(IMAGE)
    mu_ours, sigma_ours = ours.encode(IMAGE)
    torch.testing.assert_close(mu_ours, mu, atol=0, rtol=0)
    torch.testing.assert_close(2 * sigma_ours.log(), logvar.clamp(-30, 20), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.decode(mu), original.decode(mu), atol=1e-5, rtol=1e-5)


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As MONAI Generative called them."""
    return {name.replace("postconv.conv", "conv.conv"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("rename", [dict, old_names])
def test_generative_names_become_monais(rename):
    state = AutoencoderKL(**TINY_ORIGINAL).state_dict()
    assert list(from_generative(rename(state))) == list(state)


def test_original_may_have_generative_names(original):
    assert set(from_original(old_names(original.state_dict()))) == set(BrainVAE(**TINY_ORIGINAL).state_dict())


def test_safetensors_both_ways(original, tmp_path, tiny_config):
    from safetensors.torch import save_file

    save_file({n: t.contiguous() for n, t in original.state_dict().items()}, tmp_path / "vae.safetensors")
    convert(str(tmp_path / "vae.safetensors"), str(tmp_path / "ours.safetensors"), config_file=tiny_config)
    load_weights(BrainVAE(**TINY_ORIGINAL), tmp_path / "ours.safetensors")


def test_the_original_fits_the_lite_network(tmp_path, monkeypatch):
    """Without a config: the default is the overlay with the original's sizes."""
    monkeypatch.chdir(ROOT)
    torch.save({"vae_state_dict": OriginalVAE(ORIGINAL).state_dict()}, tmp_path / "vae.pt")
    convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"))
    load_weights(BrainVAE(**ORIGINAL), tmp_path / "ours.pt")


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"vae_state_dict": Evil()}))
    with pytest.raises(InputError, match=r"evil\.pt is damaged or holds more than tensors"):
        convert("evil.pt", "ours.pt")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "ours.pt").exists()


def test_another_architecture_leaves_no_file(original, tmp_path):
    """The tiny original does not fit the shipped network: the sentence says so, and nothing is written."""
    torch.save({"vae_state_dict": original.state_dict()}, tmp_path / "vae.pt")
    with pytest.raises(InputError, match="is of another architecture than network_def"):
        convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"), config_file=str(ROOT / "configs/inference.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pt"]


@pytest.mark.parametrize("kind, message", [("brlp", "'kind' is 'brlp'"), ("original", "has no 'conv_mean.weight'")])
def test_mistakes_are_named(tmp_path, kind, message):
    torch.save(AutoencoderKL(**TINY_ORIGINAL).state_dict(), tmp_path / "vae.pt")
    with pytest.raises(InputError, match=message):
        convert(str(tmp_path / "vae.pt"), str(tmp_path / "ours.pt"), kind=kind)


def test_command_reports_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "scripts.convert_weights", "convert", "--source", "none.pt", "--output", "x.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip().startswith("error: none.pt does not exist")


# overlay, class, millions of parameters
OVERLAYS = [("brlp", BrainVAE, 13.8), ("maisi_original", AutoencoderKlMaisi, 20.9)]


@pytest.mark.parametrize("overlay, kind, millions", OVERLAYS)
def test_overlay_builds_the_peers_network(overlay, kind, millions):
    """As large as published: BrLP 13.8 M, MAISI 20.9 M."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/evaluate.json"), str(ROOT / f"configs/{overlay}.json")])
    network = parser.get_parsed_content("network_def")
    assert type(network) is kind
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_maisi_is_measured_by_evaluate(run_bundle, tmp_path):
    """MAISI's class with its overlay, small: encode and decode are all that the job needs."""
    small = {"num_channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "norm_num_groups": 4, "num_splits": 1}
    overlay = json.loads((ROOT / "configs/maisi_original.json").read_text())["network_def"]
    network = AutoencoderKlMaisi(**{key: value for key, value in {**overlay, **small}.items() if key != "_target_"})
    torch.save(network.state_dict(), tmp_path / "maisi.pt")
    write_scan(tmp_path / "scans" / "a.nii.gz")
    run_bundle(
        "--config_file", "['configs/evaluate.json','configs/maisi_original.json']", "--dataset_dir",
        str(tmp_path / "scans"), "--split", "all", "--weights", str(tmp_path / "maisi.pt"), "--output_dir",
        str(tmp_path / "out"), "--baselines", "[]", "--spatial_size", "[32, 36, 32]", "--spacing", "4.0",
        *[word for key, value in small.items() for word in (f"--network_def#{key}", str(value))],
    )  # fmt: skip
    assert "psnr_brain" in (tmp_path / "out" / "table.txt").read_text()
