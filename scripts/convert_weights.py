"""Weights of other systems under this bundle's names, so that every job can use them and `evaluate` compare them.

    python -m scripts.convert_weights convert --kind original --source vae.pt --output models/original.pt
    python -m scripts.convert_weights convert --kind generative --source autoencoder.pth --output models/brlp.pt
        --config_file "['configs/inference.json','configs/brlp.json']"

`original` is a checkpoint of the system that this bundle follows, whose network is that of `configs/lite.json`:
`{"vae_state_dict": ...}` with MONAI's encoder and decoder, `conv_mean` and `conv_var` (log variance) as 1x1x1
convolutions between them, and no convolution after the latent. `generative` is an `AutoencoderKL` of MONAI Generative,
such as BrLP's. Nothing in a file is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigParser
from safetensors.torch import save_file

from scripts.networks import UNREADABLE, load_state, read_state_dict
from scripts.run import InputError, replacing, report_input_errors

__all__ = ["convert", "from_generative", "from_original"]

State = Mapping[str, torch.Tensor]
ORIGINAL_KEY = "vae_state_dict"
# What runs from the start of a name; the rest stays.
HEADS = {"conv_mean.": "quant_conv_mu.conv.", "conv_var.": "quant_conv_log_sigma.conv."}
UPSAMPLING = re.compile(r"^(decoder\.blocks\.\d+)\.conv\.conv\.(weight|bias)$")


def from_original(state: State) -> dict[str, torch.Tensor]:
    """Rename the state dict of the original's VAE.

    Args:
        state: names to tensors, with or without the prefix `module.` of a distributed training.

    Returns:
        The state dict of a `BrainVAE`. The convolution after the latent, which the original lacks, is the identity.

    Raises:
        InputError: `conv_mean` or `conv_var` is missing.
    """
    state = from_generative(state)
    for head in HEADS:
        if not any(name.startswith(head) for name in state):
            raise InputError(f"the state dict has no '{head}weight'; is it a checkpoint of the original's VAE?")
    renamed = {}
    for name, tensor in state.items():
        head = next((head for head in HEADS if name.startswith(head)), "")
        tail = name.removeprefix(head).removeprefix("conv.") if head else name
        renamed[HEADS.get(head, "") + tail] = tensor
    weight = renamed["quant_conv_mu.conv.weight"]
    channels = weight.shape[0]
    identity = torch.eye(channels, dtype=weight.dtype).reshape(channels, channels, 1, 1, 1)
    renamed["post_quant_conv.conv.weight"] = identity
    renamed["post_quant_conv.conv.bias"] = torch.zeros(channels, dtype=weight.dtype)
    return renamed


def from_generative(state: State) -> dict[str, torch.Tensor]:
    """Rename the state dict of an `AutoencoderKL` of MONAI Generative (without attention) or of MONAI.

    Args:
        state: names to tensors, with or without the prefix `module.`.

    Returns:
        The state dict under MONAI's names: the convolution after an upsampling is called `postconv` there.
    """
    return {UPSAMPLING.sub(r"\1.postconv.conv.\2", name.removeprefix("module.")): t for name, t in state.items()}


KINDS: dict[str, Callable[[State], dict[str, torch.Tensor]]] = {
    "original": from_original,
    "generative": from_generative,
}


def convert(
    source: str,
    output: str,
    kind: str = "original",
    config_file: str | Sequence[str] = ("configs/inference.json", "configs/lite.json"),
) -> None:
    """Convert a checkpoint, and check that every tensor fits the network of a config.

    Args:
        source: the foreign checkpoint, `.pt`, `.pth` or `.safetensors`.
        output: the file to write, `.pt` or `.safetensors`.
        kind: `original` or `generative`.
        config_file: the config whose network the weights are for, with its overlays; the original's by default.

    Raises:
        InputError: `kind` is unknown, the file cannot be read, or a tensor is missing, unknown or of another shape.
    """
    if kind not in KINDS:
        raise InputError(f"'kind' is {kind!r}; give one of {', '.join(KINDS)}.")
    state = KINDS[kind](_read(source))
    parser = ConfigParser()
    parser.read_config(list(config_file) if isinstance(config_file, list | tuple) else config_file)
    load_state(parser.get_parsed_content("network_def"), state, source)
    with replacing(output) as temporary:
        if temporary.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        else:
            torch.save(state, temporary)
    print(f"{len(state)} tensors of {source} are in {output}", flush=True)


def _read(source: str) -> State:
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise InputError(f"{path} is damaged or holds more than tensors; save its state dict alone.") from error
        if isinstance(content, Mapping) and isinstance(content.get(ORIGINAL_KEY), Mapping):
            return content[ORIGINAL_KEY]
    return read_state_dict(path)


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"convert": convert})
