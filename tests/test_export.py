"""Exported files compute what the network computes, and run through the bundle's own inference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_JOB, TINY_VAE, RunBundle, write_scan
from monai.bundle import ConfigParser

from scripts import export
from scripts.export import onnx, torchscript
from scripts.networks import BrainVAE, OnnxNetwork, exported, load_torchscript, load_weights
from scripts.run import InputError, file_sha256

TINY = {"network_def#channels": [4, 8], "spatial_size": [32, 36, 32], "spacing": 4.0}
LITE = {
    "wavelet": False, "norm": "group", "channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "norm_num_groups": 4,
    "attention_levels": [False] * 3,
}  # fmt: skip
ATTENTION = {**LITE, "attention_levels": [False, False, True], "with_encoder_nonlocal_attn": True}
FORMATS: dict[str, tuple[Any, Any]] = {"ts": (torchscript, load_torchscript), "onnx": (onnx, OnnxNetwork)}
STEMS = {"whole": "model", "encoder": "encoder", "decoder": "decoder"}
SHAPES = [(1, 1, 32, 36, 32), (2, 1, 24, 36, 16)]  # batch and sides that the export has not seen
# By overlay: the file that it takes for its own, and the tolerance in units of the scan's percentile: TorchScript runs
# torch's own kernels; onnxruntime's sum in another order.
OVERLAYS = {"_ts": ("model.ts", 1e-5), "_onnx": ("model.onnx", 1e-4), "_trt": ("model_trt.ts", 3e-5)}


def config_files(folder: Path, **network: Any) -> list[str]:
    """inference.json with an overlay for the tiny network."""
    overlay = folder / "tiny.json"
    overlay.write_text(json.dumps(TINY | {f"network_def#{key}": value for key, value in network.items()}))
    return [str(ROOT / "configs" / "inference.json"), str(overlay)]


def expected(network: Any, part: str, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Input and outputs of a part, by the plain network."""
    with torch.no_grad():
        mu, sigma = network.encode(image)
        pred = network.decode(mu)
    return (mu if part == "decoder" else image), ([mu, 2 * sigma.log()] if part == "encoder" else [pred])


@pytest.fixture(scope="module")
def files(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all six files of the tiny network."""
    folder = tmp_path_factory.mktemp("exported")
    configs = config_files(tmp_path_factory.mktemp("configs"))
    torchscript(str(weights), str(folder), config_file=configs)
    onnx(str(weights), str(folder), config_file=configs)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", STEMS)
@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_computes_what_the_network_does(
    files: Path, weights: Path, part: str, ending: str, shape: tuple[int, ...]
) -> None:
    """Each part in each format, for other batches and sizes than it was made with."""
    network = load_weights(BrainVAE(**TINY_VAE), weights).eval()
    given, outputs = expected(network, part, torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    module = FORMATS[ending][1](files / f"{STEMS[part]}.{ending}", part)
    with torch.no_grad():
        result = module(given)
        if (ending, part) == ("ts", "whole"):  # alone it serves for all three, as the file of ckpt_export does
            torch.testing.assert_close(module.decode(module.encode(given)[0]), result)
    # fp32 through some twenty layers whose sums run in another order.
    for own, other in zip([result] if torch.is_tensor(result) else result, outputs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("arguments", [LITE, ATTENTION], ids=["lite", "attention"])
def test_other_networks_are_exported(tmp_path: Path, ending: str, arguments: dict[str, Any]) -> None:
    """Group normalisation, and attention, which cannot be scripted and is traced, take other sizes all the same."""
    torch.manual_seed(0)
    network = BrainVAE(**{**TINY_VAE, **arguments}).eval()
    torch.save(network.state_dict(), tmp_path / "other.pt")
    save, load = FORMATS[ending]
    save(str(tmp_path / "other.pt"), str(tmp_path), "whole", config_files(tmp_path, **arguments))
    given, (pred,) = expected(network, "whole", torch.rand(SHAPES[1]))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / f"model.{ending}")(given), pred, rtol=0, atol=1e-4)
    if ending == "onnx" and arguments is LITE:  # the runtime's own norm is off by a thousandth for millions of voxels
        graph = pytest.importorskip("onnx").load(tmp_path / "model.onnx").graph
        kinds = {node.op_type for node in graph.node}
        assert "ReduceMean" in kinds and not any("Normalization" in kind for kind in kinds)


@pytest.mark.parametrize("part", STEMS)
def test_a_file_says_what_it_is(files: Path, weights: Path, part: str) -> None:
    """TorchScript: metadata.json of the bundle with the origin added; in the whole the config and overlay, for the
    Deploy SDK. ONNX: texts among the properties, named inputs and outputs, a free batch, no path of this machine."""
    extra = {"metadata.json": "", "inference.json": ""}
    torch.jit.load(files / f"{STEMS[part]}.ts", _extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    about = metadata["export"]
    assert about["part"] == part and about["weights_sha256"] == file_sha256(weights)
    assert about["spatial_size"] == TINY["spatial_size"] and about["spacing"] == TINY["spacing"]
    assert about["bundle_version"] == metadata["version"]
    assert ("network_data_format" in metadata) == bool(extra["inference.json"]) == (part == "whole")
    if part == "whole":
        assert json.loads(extra["inference.json"])["spatial_size"] == TINY["spatial_size"]
    network = OnnxNetwork(files / f"{STEMS[part]}.onnx", part=part)
    texts, inputs = network.metadata, network.session.get_inputs()
    assert texts["part"] == part and texts["weights_sha256"] == about["weights_sha256"]
    assert json.loads(texts["spatial_size"]) == TINY["spatial_size"]
    assert [value.name for value in inputs] == json.loads(texts["inputs"]) and inputs[0].shape[0] == "batch"
    assert [value.name for value in network.session.get_outputs()] == json.loads(texts["outputs"])
    assert str(ROOT).encode() not in (files / f"{STEMS[part]}.onnx").read_bytes()


@pytest.mark.parametrize("save", [torchscript, onnx])
def test_a_file_that_differs_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None]
) -> None:
    """Neither under its name nor under another."""
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    output = tmp_path / "out"
    with pytest.raises(RuntimeError, match="differs from the network"):
        save(str(weights), str(output), "decoder", config_files(tmp_path))
    assert list(output.iterdir()) == []


def test_bad_input_is_named(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, before anything is written."""
    monkeypatch.chdir(tmp_path)
    torch.save(BrainVAE(**{**TINY_VAE, "channels": [8, 8]}).state_dict(), tmp_path / "wide.pt")
    for argument, value, message in [
        ("weights", "wide.pt", "wide.pt is of another architecture"),
        ("config_file", "none.json", "none.json does not exist"),
        ("scan", "none.nii.gz", "none.nii.gz does not exist"),
        ("part", "head", "'part' is 'head'"),
    ]:
        arguments: dict[str, Any] = {"weights": str(weights), "config_file": config_files(tmp_path), argument: value}
        with pytest.raises(InputError, match=message):
            torchscript(output_dir=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_that_cannot_run_is_named(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A missing file, a damaged one, another part than the one that is needed, and no onnxruntime."""
    broken, load = tmp_path / f"broken.{ending}", FORMATS[ending][1]
    broken.write_bytes(b"nothing")
    wrong = {files / f"none.{ending}": "does not exist", broken: "is damaged", files / f"encoder.{ending}": "holds the"}
    for path, message in wrong.items():
        with pytest.raises(InputError, match=message):
            load(path)
    monkeypatch.setattr(exported, "has_onnxruntime", False)
    if ending == "onnx":
        with pytest.raises(InputError, match="needs onnxruntime"):
            load(files / "model.onnx")


def test_the_command_compares_on_a_scan(weights: Path, tmp_path: Path) -> None:
    """As a user starts it: one line a file with size and difference."""
    command = [
        sys.executable, "-W", "ignore", "-m", "scripts.export", "torchscript", "--weights", str(weights), "--scan",
        str(write_scan(tmp_path / "scan.nii.gz")), "--output_dir", str(tmp_path), "--part", "encoder",
        "--config_file", str(config_files(tmp_path)),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/encoder.ts: " in done.stdout and "largest difference from the network" in done.stdout


def test_inference_through_a_file_gives_the_same_nifti(
    run_bundle: RunBundle, weights: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each overlay, which changes the network alone and expects the file that is written by default; in that for
    TensorRT everything but the engine, which needs a GPU, with an empty torch_tensorrt and a plain TorchScript file."""
    scan, recons = write_scan(tmp_path / "scan.nii.gz"), {}
    for name, file in {"": weights, "_ts": "model.ts", "_onnx": "model.onnx", "_trt": "model.ts"}.items():
        if name == "_trt":
            (tmp_path / "torch_tensorrt.py").touch()
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        configs = ["configs/inference.json", f"configs/inference{name}.json"]
        run_bundle(
            "--config_file", str(configs), "--dataset_dir", str(scan), "--output_dir", str(tmp_path / f"out{name}"),
            "--weights", str(files / file), *(TINY_JOB[2:] if name else TINY_JOB),  # a file knows its own channels
        )  # fmt: skip
        recons[name] = np.asarray(nib.load(tmp_path / f"out{name}" / "scan_recon.nii.gz").dataobj)
    factor = np.percentile(np.asarray(nib.load(scan).dataobj), 99.5)
    for name, (default, tolerance) in OVERLAYS.items():
        np.testing.assert_allclose(recons[name], recons[""], rtol=0, atol=tolerance * factor)
        paths = [ROOT / "configs" / f"inference{ending}.json" for ending in ("", name)]
        assert set(json.loads(paths[1].read_text())) <= {"+imports", "weights", "network_def", "network"}
        parser = ConfigParser(ConfigParser.load_config_files(paths))
        assert parser.get_parsed_content("weights") == f"./models/{default}"
