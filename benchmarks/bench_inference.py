"""Encode and decode: `BrainVAE` against MONAI's plain networks, in one run.

    python benchmarks/bench_inference.py [--volume scan.nii.gz] [--ways "fp32,bf16"] [--repeats 2] [--calls 2]

Each way runs in fresh processes (see `fresh_process`). Printed: the ratio of the time of the original's network (Lite)
in MONAI's `AutoencoderKL` as it is (fp32, contiguous) to each way's, for encoder and decoder; the process's peak
memory; and for ways of one network the largest difference of mu and of the volume from its plain result, fp32 in
contiguous memory. The networks of others have random weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fresh_process import arguments, measure, run_in_turns, time_key
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.networks import BrainVAE, load_weights  # noqa: E402

MODEL_SPACE = (112, 136, 112)  # voxels
PLAIN = "Lite in MONAI's class"
NO_ATTENTION = {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}
BRATS = {  # as in the model zoo's brats_mri_generative_diffusion
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 8, "channels": [64, 128, 256],
    "num_res_blocks": [2, 2, 2], "norm_num_groups": 32, "norm_eps": 1e-6, "attention_levels": [False] * 3,
    **NO_ATTENTION,
}  # fmt: skip


def arguments_of(*configs: str) -> dict[str, Any]:
    """The network's arguments in these configs of the bundle."""
    parser = ConfigParser(ConfigParser.load_config_files([str(ROOT / "configs" / name) for name in configs]))
    definition = dict(parser.get_parsed_content("network_def", instantiate=False).get_config())
    return {key: value for key, value in definition.items() if key != "_target_"}


def lite(cls: type[nn.Module]) -> nn.Module:
    """The Lite network in one class."""
    given = arguments_of("inference.json", "lite.json")
    if cls is AutoencoderKL:
        given = {key: value for key, value in given.items() if key not in ("wavelet", "norm")}
    return load_weights(cls(**given), ROOT / "models" / "lite.safetensors")


def default() -> nn.Module:
    """The bundle's network."""
    return load_weights(BrainVAE(**arguments_of("inference.json")), ROOT / "models" / "model.pt")


def maisi() -> nn.Module:
    """MAISI's network in MONAI's own class, unsplit and in fp32."""
    given = {"num_channels" if key == "channels" else key: value for key, value in BRATS.items()}
    return AutoencoderKlMaisi(**given | {"latent_channels": 4, "num_splits": 1, "norm_float16": False})


def brlp() -> nn.Module:
    """BrLP's network in MONAI's class."""
    given = arguments_of("inference.json", "brlp.json")
    return AutoencoderKL(**{key: value for key, value in given.items() if key not in ("wavelet", "norm")})


class Way(NamedTuple):
    """A network, how it computes, and the way from which its results may differ by rounding alone."""

    build: Callable[[], nn.Module]
    memory_format: torch.memory_format = torch.contiguous_format
    half: bool = False
    compiled: bool = False
    reference: str = ""


CHANNELS_LAST = torch.channels_last_3d
WAYS = {
    PLAIN: Way(lambda: lite(AutoencoderKL)),
    "Lite fp32": Way(lambda: lite(BrainVAE), reference=PLAIN),
    "Lite bf16": Way(lambda: lite(BrainVAE), CHANNELS_LAST, half=True, reference=PLAIN),
    "fp32 contiguous": Way(default),
    "fp32": Way(default, CHANNELS_LAST, reference="fp32 contiguous"),
    "bf16": Way(default, CHANNELS_LAST, half=True, reference="fp32 contiguous"),
    "fp32 compiled": Way(default, CHANNELS_LAST, compiled=True, reference="fp32 contiguous"),
    "BrLP's network": Way(brlp),
    "BraTS bundle's network": Way(lambda: AutoencoderKL(**BRATS)),
    "MAISI's network": Way(maisi),
}


def read_volume(path: str) -> Tensor:
    """A volume (1, 1, 112, 136, 112), a scan through the bundle's preprocessing or smooth noise."""
    if path:
        parser = ConfigParser(ConfigParser.load_config_file(ROOT / "configs" / "inference.json"))
        image = parser.get_parsed_content("preprocessing")({"image": path})["image"]
        return image.as_tensor()[None]
    torch.manual_seed(0)
    return nn.functional.interpolate(torch.rand(1, 1, 28, 34, 28), size=MODEL_SPACE, mode="trilinear")


@torch.no_grad()
def run(name: str, volume: Tensor, calls: int, results: Path) -> dict[str, float]:
    """One way, in this process: figures of encoder and decoder; mu and volume go to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    way = WAYS[name]
    network: Any = way.build().eval().to(device=device, memory_format=way.memory_format)
    encode, decode = network.encode, network.decode
    if way.compiled:
        encode, decode = torch.compile(encode), torch.compile(decode)
    volume = volume.to(device)
    found: dict[str, Tensor] = {}

    def encoding() -> None:
        found["mu"] = encode(volume)[0]

    def decoding() -> None:
        found["recon"] = decode(found["mu"])

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=way.half):
        parts = {part: measure(call, calls, call) for part, call in (("encode", encoding), ("decode", decoding))}
    torch.save({key: value.float().cpu() for key, value in found.items()}, results)
    figures = {f"{part} {key}": value for part, result in parts.items() for key, value in result.items()}
    total = {key: parts["encode"][key] + parts["decode"][key] for key in ("seconds", "cpu_seconds")}
    return figures | total | {"process_gigabytes": parts["decode"]["process_gigabytes"]}


def main() -> None:
    """Measure and print the table."""
    parser = arguments(__doc__ or "", calls=2)
    parser.add_argument("--volume", default="", help="NIfTI file; without it a synthetic volume")
    parser.add_argument("--ways", default=",".join(name for name in WAYS if "compiled" not in name))
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run:
        figures = run(given.run, read_volume(given.volume), given.calls, given.results)
        print(json.dumps(figures))
        return

    names = list(dict.fromkeys([PLAIN, *given.ways.split(",")]))
    with tempfile.TemporaryDirectory() as folder:

        def options(name: str) -> Sequence[str]:
            kept = ["--volume", given.volume, "--results", f"{folder}/{name}.pth"]
            return [*kept, "--calls", str(given.calls), "--threads", str(given.threads)]

        figures = run_in_turns(__file__, names, given.repeats, options)
        tensors = {name: torch.load(f"{folder}/{name}.pth", weights_only=True) for name in names}

    key = time_key(given.threads)
    print(f"torch {torch.__version__}, {given.threads} threads, {key}, best of {given.repeats} x {given.calls}")
    print("| way | encode | decode | both | process's peak, GB | largest difference of mu | of the volume |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        ratios = [figures[PLAIN][k] / figures[name][k] for k in (f"encode {key}", f"decode {key}", key)]
        cells = [f"{ratio:.2f}" for ratio in ratios] + [f"{figures[name]['process_gigabytes']:.2f}"]
        for part in ("mu", "recon"):
            plain = tensors.get(WAYS[name].reference)
            cells.append(f"{(tensors[name][part] - plain[part]).abs().max():.1e}" if plain else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
