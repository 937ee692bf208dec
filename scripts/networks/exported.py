"""What `scripts.export` has written, in the network's place: a TorchScript or an ONNX file as a module.

`configs/inference_ts.json`, `inference_onnx.json` and `inference_trt.json` load their files by it, and the export
checks with it what it has written. onnxruntime is optional: only who runs ONNX files needs it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from monai.utils import convert_to_dst_type, optional_import
from torch import nn

from scripts.networks.weights import UNREADABLE
from scripts.run import InputError

__all__ = ["OnnxNetwork", "load_torchscript"]

onnxruntime, has_onnxruntime = optional_import("onnxruntime")


def load_torchscript(
    path: str | Path, part: str = "whole", device: torch.device | str = "cpu"
) -> torch.jit.ScriptModule:
    """Load a file that `scripts.export`, or `ckpt_export` of `monai.bundle`, has written.

    Args:
        path: the `.ts` file.
        part: which part of the autoencoder is wanted: whole, encoder or decoder.
        device: where to.

    Returns:
        The module, in eval mode.

    Raises:
        InputError: the file is missing, no TorchScript file, or holds another part.
    """
    _check_exists(path, "torchscript")
    extra = {"metadata.json": ""}
    try:
        module = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except UNREADABLE as error:
        raise InputError(f"{path} is damaged or no TorchScript file; export it again.") from error
    _check_part(path, json.loads(extra["metadata.json"] or "{}").get("export", {}).get("part", part), part)
    return module.eval()


class OnnxNetwork(nn.Module):
    """Run an ONNX file that `scripts.export` or `onnx_export` of `monai.bundle` has written.

    Args:
        path: the `.onnx` file.
        part: which part of the autoencoder is wanted: whole, encoder or decoder.
        device: on "cuda" onnxruntime's CUDA provider computes, where the installed onnxruntime has it; else the CPU.

    Attributes:
        metadata: texts that stand in the file, such as `bundle_version` and `weights_sha256`.

    Raises:
        InputError: onnxruntime is not installed, the file is missing, no ONNX file, or holds another part.
    """

    def __init__(self, path: str | Path, part: str = "whole", device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not has_onnxruntime:
            raise InputError("running an ONNX file needs onnxruntime; pip install onnxruntime.")
        _check_exists(path, "onnx")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()  # OMP_NUM_THREADS and torch's own limit hold here too
        wanted = ["CUDAExecutionProvider"] if torch.device(device).type == "cuda" else []
        available = onnxruntime.get_available_providers()
        providers = [name for name in [*wanted, "CPUExecutionProvider"] if name in available]
        try:
            self.session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            raise InputError(f"{path} is damaged or no ONNX file; export it again.") from error
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        _check_part(path, self.metadata.get("part", part), part)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the file.

        Args:
            x: image (B, 1, D, H, W), or latent (B, C, D/4, H/4, W/4) for a decoder.

        Returns:
            The file's one output, or a tuple of its outputs, on the device of `x` and with its metadata.
        """
        values = x.detach().as_subclass(torch.Tensor).float().contiguous().cpu().numpy()
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: values})
        # Of the kind of x: a MetaTensor keeps what is needed to invert the preprocessing.
        tensors = tuple(convert_to_dst_type(output, x, dtype=torch.float32)[0] for output in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


def _check_exists(path: str | Path, command: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; write it with python -m scripts.export {command}.")


def _check_part(path: str | Path, found: str, part: str) -> None:
    if found != part:
        raise InputError(f"{path} holds the {found}, and the {part} is needed; give the file of that part.")
