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
from conftest import ROOT, TINY_JOB, TINY_VAE, make_weights, write_scan
from monai.bundle import ConfigParser

from scripts import export
from scripts.export import StagedGroupNorm, onnx, torchscript
from scripts.networks import BrainVAE, OnnxNetwork, exported, load_torchscript, load_weights
from scripts.run import InputError, file_sha256

Run = Callable[..., subprocess.CompletedProcess[str]]

TINY = {
    "network_def#channels": [4, 8], "spatial_size": [32, 36, 32], "spacing": 4.0,
}  # fmt: skip
LITE = {
    "wavelet": False, "norm": "group", "channels": [4, 8, 8], "num_res_blocks": [1, 1, 1], "norm_num_groups": 4,
    "attention_levels": [False] * 3,
}  # fmt: skip
ATTENTION = {
    **LITE, "attention_levels": [False, False, True], "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": True,
}  # fmt: skip
FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "ts": (torchscript, load_torchscript),
    "onnx": (onnx, OnnxNetwork),
}
STEMS = {"whole": "model", "encoder": "encoder", "decoder": "decoder"}
FILES = [(part, ending) for ending in FORMATS for part in STEMS]
# Batch and sides that the export has not seen.
SHAPES = [(1, 1, 32, 36, 32), (2, 1, 24, 36, 16)]
# TorchScript runs torch's own kernels; onnxruntime's sum in another order. In units of the scan's percentile.
OVERLAYS = {"ts": 1e-5, "onnx": 1e-4}


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
@pytest.mark.parametrize(("part", "ending"), FILES)
def test_a_file_computes_what_the_network_does(
    files: Path, weights: Path, part: str, ending: str, shape: tuple[int, ...]
) -> None:
    """Each part in each format, for other batches and sizes than it was made with."""
    network = load_weights(BrainVAE(**TINY_VAE), weights).eval()
    given, outputs = expected(network, part, torch.rand(shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        result = FORMATS[ending][1](files / f"{STEMS[part]}.{ending}", part)(given)
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


def test_a_traced_part_holds_no_other_parts_weights(tmp_path: Path) -> None:
    """Encoder and decoder apart are together no larger than the whole."""
    torch.manual_seed(0)
    torch.save(BrainVAE(**{**TINY_VAE, **ATTENTION}).state_dict(), tmp_path / "other.pt")
    torchscript(str(tmp_path / "other.pt"), str(tmp_path), config_file=config_files(tmp_path, **ATTENTION))
    whole, *parts = (len(load_torchscript(tmp_path / f"{STEMS[part]}.ts", part).state_dict()) for part in STEMS)
    assert sum(parts) <= whole + 6, "the 1x1x1 convolutions between them may be in both"


def test_the_staged_group_norm_is_torchs() -> None:
    """Same values, on data far from zero, where the order of summation shows."""
    norm = torch.nn.GroupNorm(2, 4, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.rand(2, 4, 6, 5, 7) + 3
    torch.testing.assert_close(StagedGroupNorm(norm)(x), norm(x), rtol=0, atol=1e-5)


def test_onnxruntime_sums_no_long_rows(tmp_path: Path) -> None:
    """No norm is left to the runtime: its own is off by a thousandth for millions of voxels."""
    package = pytest.importorskip("onnx")
    torch.save(BrainVAE(**{**TINY_VAE, **LITE}).state_dict(), tmp_path / "lite.pt")
    onnx(str(tmp_path / "lite.pt"), str(tmp_path), "encoder", config_files(tmp_path, **LITE))
    kinds = {node.op_type for node in package.load(tmp_path / "encoder.onnx").graph.node}
    assert "ReduceMean" in kinds and not any("Normalization" in kind for kind in kinds)


def test_the_scripted_network_keeps_encode_and_decode(files: Path) -> None:
    """model.ts alone serves for all three, as the file of ckpt_export does."""
    module: Any = load_torchscript(files / "model.ts")
    image = torch.rand(SHAPES[0])
    with torch.no_grad():
        torch.testing.assert_close(module.decode(module.encode(image)[0]), module(image))


@pytest.mark.parametrize("part", STEMS)
def test_a_torchscript_file_says_what_it_is(files: Path, weights: Path, part: str) -> None:
    """metadata.json of the bundle with the origin added; in the whole the config and overlay, for the Deploy SDK."""
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


@pytest.mark.parametrize("part", STEMS)
def test_an_onnx_file_says_what_it_is(files: Path, weights: Path, part: str) -> None:
    """Texts among the file's properties, named inputs and outputs, a free batch, no path of this machine."""
    path = files / f"{STEMS[part]}.onnx"
    network = OnnxNetwork(path, part=part)
    about = network.metadata
    assert about["part"] == part and about["weights_sha256"] == file_sha256(weights)
    assert json.loads(about["spatial_size"]) == TINY["spatial_size"]
    assert [value.name for value in network.session.get_inputs()] == json.loads(about["inputs"])
    assert [value.name for value in network.session.get_outputs()] == json.loads(about["outputs"])
    assert network.session.get_inputs()[0].shape[0] == "batch"
    assert str(ROOT).encode() not in path.read_bytes()


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


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("weights", "broken.pt", "broken.pt is damaged"),
        ("weights", "wide.pt", "wide.pt is of another architecture"),
        ("weights", "none.pt", "none.pt does not exist"),
        ("config_file", "none.json", "none.json does not exist"),
        ("scan", "none.nii.gz", "none.nii.gz does not exist"),
        ("part", "head", "'part' is 'head'"),
    ],
)
def test_bad_input_is_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, value: str, message: str
) -> None:
    """One sentence, before anything is written."""
    arguments: dict[str, Any] = {"weights": str(weights), "config_file": config_files(tmp_path), argument: value}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    torch.save(BrainVAE(**{**TINY_VAE, "channels": [8, 8]}).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(InputError, match=message):
        torchscript(output_dir=str(tmp_path / "out"), **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(
    ("name", "message"), [("none", "does not exist"), ("broken", "is damaged"), ("encoder", "holds the encoder")]
)
def test_a_file_that_cannot_run_is_named(files: Path, tmp_path: Path, ending: str, name: str, message: str) -> None:
    """A missing file, a damaged one, and another part than the one that is needed."""
    (tmp_path / f"broken.{ending}").write_bytes(b"nothing")
    folder = tmp_path if name == "broken" else files
    with pytest.raises(InputError, match=message):
        FORMATS[ending][1](folder / f"{name}.{ending}")


def test_a_missing_onnxruntime_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no requirement of the bundle."""
    monkeypatch.setattr(exported, "has_onnxruntime", False)
    with pytest.raises(InputError, match="needs onnxruntime"):
        OnnxNetwork(files / "model.onnx")


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


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny head."""
    return write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz")


def reconstruct(run_bundle: Run, scan: Path, output: Path, overlay: str, weights: Path, *more: str) -> np.ndarray:
    """Run inference.json, with an overlay or without, on one scan."""
    names = ["configs/inference.json", *([f"configs/inference_{overlay}.json"] if overlay else [])]
    run_bundle(
        "--config_file", str(names), "--dataset_dir", str(scan), "--output_dir", str(output),
        "--weights", str(weights), *more,
    )  # fmt: skip
    return np.asarray(nib.load(output / "scan_recon.nii.gz").dataobj)


@pytest.fixture(scope="module")
def plain(run_bundle: Run, scan: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The reconstruction by the network itself."""
    return reconstruct(run_bundle, scan, tmp_path_factory.mktemp("plain"), "", weights, *TINY_JOB)


VOLUME = TINY_JOB[2:]  # size, spacing and device; the file knows its own channels


@pytest.mark.parametrize(("overlay", "tolerance"), OVERLAYS.items())
def test_inference_through_a_file_gives_the_same_nifti(
    run_bundle: Run, scan: Path, files: Path, plain: np.ndarray, tmp_path: Path, overlay: str, tolerance: float
) -> None:
    """inference_ts.json and inference_onnx.json over inference.json."""
    recon = reconstruct(run_bundle, scan, tmp_path, overlay, files / f"model.{overlay}", *VOLUME)
    factor = np.percentile(np.asarray(nib.load(scan).dataobj), 99.5)
    np.testing.assert_allclose(recon, plain, rtol=0, atol=tolerance * factor)


def test_the_tensorrt_overlay_runs_but_for_the_engine(
    run_bundle: Run, scan: Path, files: Path, plain: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an empty torch_tensorrt and a plain TorchScript file: all of inference_trt.json that needs no GPU."""
    (tmp_path / "torch_tensorrt.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recon = reconstruct(run_bundle, scan, tmp_path / "out", "trt", files / "model.ts", *VOLUME)
    np.testing.assert_allclose(recon, plain, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("name", ["ts", "onnx", "trt"])
def test_an_overlay_changes_the_network_alone(name: str) -> None:
    """The files that it expects by default are those that the export and trt_export write."""
    overlay = json.loads((ROOT / "configs" / f"inference_{name}.json").read_text())
    assert set(overlay) <= {"+imports", "weights", "network_def", "network"}
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{file}.json") for file in ("inference", f"inference_{name}")])
    file = {"ts": "model.ts", "onnx": "model.onnx", "trt": "model_trt.ts"}[name]
    assert parser.get_parsed_content("weights") == f"./models/{file}"


def test_other_weights_give_other_files(files: Path, tmp_path: Path) -> None:
    """The comparison is not one of a file with itself: a file of other weights differs."""
    other = make_weights(tmp_path / "other.pt", 1)
    network = load_weights(BrainVAE(**TINY_VAE), other).eval()
    given, (pred,) = expected(network, "whole", torch.rand(SHAPES[0]))
    with torch.no_grad():
        assert not torch.allclose(load_torchscript(files / "model.ts")(given), pred, atol=1e-4)
