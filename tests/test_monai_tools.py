"""MONAI's own tools accept the bundle: metadata, network data format, TorchScript export, `load`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest
import torch
from conftest import ROOT


def bundle_tool(*arguments: str) -> str:
    """Run a tool of monai.bundle from the bundle's root; its output."""
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_verify_metadata_passes(tmp_path: Path) -> None:
    """Against the stand-in schema, which the tool takes instead of a download."""
    schema = tmp_path / "schema.json"
    schema.write_text((ROOT / "tests" / "metadata_schema.json").read_text())
    output = bundle_tool("verify_metadata", "--meta_file", "configs/metadata.json", "--filepath", str(schema))
    assert "verified with no error" in output


def test_verify_net_in_out_passes() -> None:
    """Channels and type of the network's input and output are what metadata.json says."""
    output = bundle_tool(
        "verify_net_in_out", "--net_id", "network_def", "--meta_file", "configs/metadata.json",
        "--config_file", "configs/inference.json", "--device", "cpu",
    )  # fmt: skip
    assert "verified with no error" in output


def test_exported_torchscript_equals_the_network(tmp_path: Path) -> None:
    """ckpt_export scripts the network; the file reconstructs alike and keeps encode and decode."""
    bundle_tool(
        "ckpt_export", "--net_id", "network_def", "--filepath", str(tmp_path / "model.ts"), "--ckpt_file",
        "models/model.pt", "--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json",
    )  # fmt: skip
    exported = torch.jit.load(str(tmp_path / "model.ts")).eval()
    network = load().eval()
    image = torch.rand(1, 1, 32, 36, 32)
    with torch.no_grad():
        # Scripting keeps the operations and their order: equal but for fused kernels.
        torch.testing.assert_close(exported(image), network(image), rtol=1e-4, atol=1e-5)
        mu, _ = exported.encode(image)
        torch.testing.assert_close(exported.decode(mu), exported(image))


def load() -> torch.nn.Module:
    """The bundle as a researcher loads it."""
    return monai.bundle.load(
        ROOT.name, bundle_dir=str(ROOT.parent), workflow_type="inference", model_file="models/model.pt"
    )


def test_monai_load_gives_the_shipped_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`monai.bundle.load` returns the network with models/model.pt."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    shipped = torch.load(ROOT / "models" / "model.pt", weights_only=True)
    state = load().state_dict()
    assert all(torch.equal(state[name], value) for name, value in shipped.items())
