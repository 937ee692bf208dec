"""The trained network as TorchScript or ONNX files, for use without this bundle or without Python.

    python -m scripts.export torchscript --weights models/model.pt --output_dir output/export
    python -m scripts.export onnx --weights models/model.pt --output_dir output/export --scan scan.nii.gz

Three files each: `model` (image to reconstruction from the posterior mean), `encoder` (image to `mu` and `logvar`, the
two tensors that `encode.json` stores) and `decoder` (latent to image). A file appears under its name only after it
has been loaded again and compared with the network it was made of. Batch and sides are free in all of them.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fire
import torch
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from monai.networks.blocks import SpatialAttentionBlock
from monai.networks.utils import convert_to_onnx, convert_to_torchscript
from monai.utils import optional_import
from torch import nn

from scripts.networks import BrainVAE, FoldedUpsample, OnnxNetwork, load_torchscript, load_weights, logvar_of
from scripts.run import METADATA, InputError, file_sha256, replacing, report_input_errors

__all__ = ["DecoderPart", "EncoderPart", "StagedGroupNorm", "WholePart", "onnx", "torchscript"]

STEMS = {"whole": "model", "encoder": "encoder", "decoder": "decoder"}
INPUT = {"whole": "image", "encoder": "image", "decoder": "latent"}
OUTPUTS = {"whole": ["pred"], "encoder": ["mu", "logvar"], "decoder": ["pred"]}
TOLERANCE = 1e-4  # fp32, absolute, on images in [0, 1]; other kernels than torch's sum in another order
OPSET = 18  # the lowest that torch's exporter writes
EXAMPLE_SIDE, EXAMPLE_LATENT_SIDE = 32, 8  # what tracing sees; nothing in the graph depends on it


class _Part(nn.Module):
    """A copy of the network without the submodules that the part leaves out, so that its file is no larger."""

    left_out: str = ""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        if self.left_out:
            setattr(self.network, self.left_out, nn.Identity())


class EncoderPart(_Part):
    """Image (B, 1, D, H, W) to mu and logvar, each (B, C, D/4, H/4, W/4)."""

    left_out = "decoder"

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mu, sigma = self.network.encode(image)
        return mu, logvar_of(sigma)


class DecoderPart(_Part):
    """Latent (B, C, D/4, H/4, W/4), not scaled, to image (B, 1, D, H, W)."""

    left_out = "encoder"

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.network.decode(latent)


class WholePart(_Part):
    """Image to reconstruction from the posterior mean, (B, 1, D, H, W) both."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network.decode(self.network.encode(image)[0])


class StagedGroupNorm(nn.Module):
    """`torch.nn.GroupNorm` whose means are taken axis by axis, so that no sum is longer than a few hundred values.

    Args:
        norm: the layer whose groups and parameters are taken.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) to the same shape."""
        grouped = x.unflatten(1, (self.num_groups, -1))
        centred = grouped - self._mean(grouped)
        scaled = centred * torch.rsqrt(self._mean(centred * centred) + self.eps)
        return scaled.flatten(1, 2) * self.weight.reshape(1, -1, 1, 1, 1) + self.bias.reshape(1, -1, 1, 1, 1)

    @staticmethod
    def _mean(grouped: torch.Tensor) -> torch.Tensor:
        return grouped.mean(5, True).mean(4, True).mean((2, 3), True)


PARTS: dict[str, type[_Part]] = {"whole": WholePart, "encoder": EncoderPart, "decoder": DecoderPart}


class _Export:
    """What both formats share: the network, the volume to check it on, what goes into the files; see `torchscript`."""

    def __init__(self, weights: str, config_file: str | Sequence[str], scan: str, part: str) -> None:
        if part != "all" and part not in STEMS:
            raise InputError(f"'part' is {part!r}; give one of all, {', '.join(STEMS)}.")
        self.parts = list(STEMS) if part == "all" else [part]
        self.files = [str(f) for f in config_file] if isinstance(config_file, list | tuple) else [str(config_file)]
        for file in [*self.files, *([scan] if scan else [])]:
            if not Path(file).is_file():
                raise InputError(f"{file} does not exist; check the path, and start in the bundle's folder.")
        parser = ConfigParser()
        parser.read_config(self.files)
        self.network: Any = load_weights(parser.get_parsed_content("network_def"), weights).eval()
        attention = any(isinstance(module, SpatialAttentionBlock) for module in self.network.modules())
        self.traced = attention or not isinstance(self.network, BrainVAE)
        self.metadata = json.loads(METADATA.read_text(encoding="utf-8"))
        self.about = {
            "bundle_version": self.metadata["version"],
            "weights_sha256": file_sha256(weights),
            "spatial_size": parser["spatial_size"],
            "spacing": parser["spacing"],
        }
        self.tensors = self._reference(parser, scan)

    def _reference(self, parser: ConfigParser, scan: str) -> dict[str, torch.Tensor]:
        """A volume, and what the plain network makes of it: image, latent, mu, logvar, pred."""
        if scan:
            image = parser.get_parsed_content("preprocessing")({"image": scan})["image"].as_tensor()[None]
        else:
            shape = (1, parser["network_def#in_channels"], *parser["spatial_size"])
            image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            mu, sigma = self.network.encode(image)
            pred = self.network.decode(mu)
        return {"image": image, "latent": mu, "mu": mu, "logvar": logvar_of(sigma), "pred": pred}

    def example(self, part: str, batch: int) -> torch.Tensor:
        """A small input."""
        side = EXAMPLE_LATENT_SIDE if part == "decoder" else EXAMPLE_SIDE
        return self.tensors[INPUT[part]][..., :side, :side, :side].repeat(batch, 1, 1, 1, 1)

    def difference(self, part: str, exported: Callable[[torch.Tensor], Any]) -> float:
        """Largest absolute difference between a loaded file and the network."""
        with torch.no_grad():
            result = exported(self.tensors[INPUT[part]])
        outputs = [result] if torch.is_tensor(result) else list(result)
        references = [self.tensors[name] for name in OUTPUTS[part]]
        return max(float((a - b).abs().max()) for a, b in zip(references, outputs, strict=True))

    def write(self, part: str, path: Path, save: Callable[[Path], None], load: Callable[[Path], Any]) -> None:
        """Save, load again, compare, and only then give the file its name.

        Raises:
            RuntimeError: the file computes something else than the network.
        """
        with replacing(path) as temporary, TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            file = Path(folder) / path.name  # its final name: a TorchScript archive holds its own stem
            save(file)
            difference = self.difference(part, load(file))
            if not difference <= TOLERANCE:
                raise RuntimeError(f"{path} differs from the network by {difference:.3g}, more than {TOLERANCE:g}")
            os.replace(file, temporary)
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, largest difference from the network {difference:.2g}",
            flush=True,
        )


def torchscript(
    weights: str = "models/model.pt",
    output_dir: str = "models",
    part: str = "all",
    config_file: str | Sequence[str] = "configs/inference.json",
    scan: str = "",
) -> None:
    """Write `model.ts`, `encoder.ts` and `decoder.ts`.

    Args:
        weights: the state dict, `.pt` or `.safetensors`.
        output_dir: where to write; files of the same name are replaced.
        part: all, whole, encoder or decoder.
        config_file: the config whose network the weights are for, with its overlays as a list.
        scan: a scan to compare on; without it, noise of the config's spatial_size.

    Raises:
        InputError: a file is missing, the weights are of another architecture, or there is no such part.
        RuntimeError: a written file differs from the network by more than 1e-4.
    """
    _write_parts(_Export(weights, config_file, scan, part), output_dir, "ts", _save_torchscript, load_torchscript)


def onnx(
    weights: str = "models/model.pt",
    output_dir: str = "models",
    part: str = "all",
    config_file: str | Sequence[str] = "configs/inference.json",
    scan: str = "",
) -> None:
    """Write `model.onnx`, `encoder.onnx` and `decoder.onnx`.

    Args and raises as in `torchscript`; InputError too where onnx, onnxscript or onnxruntime is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not optional_import(name)[1]]
    if missing:
        raise InputError(f"the export to ONNX needs {', '.join(missing)}; pip install -r requirements-dev.txt.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, of which nothing is used
    _write_parts(_Export(weights, config_file, scan, part), output_dir, "onnx", _save_onnx, OnnxNetwork)


def _write_parts(export: _Export, output_dir: str, ending: str, save: Callable, load: Callable) -> None:
    for part in export.parts:
        path = Path(output_dir) / f"{STEMS[part]}.{ending}"
        export.write(part, path, partial(save, export, part), partial(load, part=part))


def _save_torchscript(export: _Export, part: str, file: Path) -> None:
    # Scripted, the whole keeps the methods encode and decode.
    network = export.network
    if export.traced:
        # `torch.jit.trace` also scripts every `torch.jit.export` method it meets, and attention cannot be scripted.
        network = copy.copy(network)
        network.encode, network.decode = partial(network.encode), partial(network.decode)
    module = PARTS[part](network) if export.traced or part != "whole" else network
    inputs = (export.example(part, 1),) if export.traced else None
    script = convert_to_torchscript(module, inputs=inputs, use_trace=export.traced)
    # For the Deploy App SDK, which reads this one name and no overlay; a part is of no use to it.
    config = json.dumps(ConfigParser.load_config_files(export.files)).encode()
    extra = {"inference.json": config} if part == "whole" else {}
    save_net_with_metadata(script, str(file), False, meta_values=_metadata(export, part), more_extra_files=extra)


def _metadata(export: _Export, part: str) -> dict[str, Any]:
    """metadata.json, and under `export` what the file is and where it comes from.

    The format of input and output there is the whole's; in the files of the parts it would mislead.
    """
    about = {"part": part, "inputs": [INPUT[part]], "outputs": OUTPUTS[part], **export.about}
    kept = {k: v for k, v in export.metadata.items() if part == "whole" or k != "network_data_format"}
    return {**kept, "export": about}


def _save_onnx(export: _Export, part: str, file: Path) -> None:
    axes = {0: "batch", 2: "depth", 3: "height", 4: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about torch
        model = convert_to_onnx(
            _for_onnxruntime(PARTS[part](export.network)),
            [export.example(part, 2)],  # two of a batch: torch.export takes a 1 for a constant
            input_names=[INPUT[part]],
            output_names=OUTPUTS[part],
            opset_version=OPSET,
            filename=str(file),
            use_trace=True,
            dynamo=True,
            dynamic_shapes=(axes,),
            external_data=False,
            verbose=False,
        )
    for node in model.graph.node:  # source lines and paths of the machine that exports
        del node.metadata_props[:]
    package, metadata = optional_import("onnx")[0], _metadata(export, part)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata["export"].items()}
    package.helper.set_model_props(model, {**texts, "metadata": json.dumps(metadata)})
    package.save(model, str(file))


def _for_onnxruntime(module: nn.Module) -> nn.Module:
    """Change a part, in place, to operations that onnxruntime computes well; results change by rounding only.

    It sums millions of voxels one after the other in fp32, which makes a group norm of full size wrong by a
    thousandth; and it unrolls a transposed convolution in memory.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FoldedUpsample):
                setattr(parent, name, nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), child.postconv))
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, StagedGroupNorm(child))
    return module


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"torchscript": torchscript, "onnx": onnx})
