"""How much of the loss's gradient is about the level of the whole volume, which decoding restores anyway.

    python benchmarks/bench_gradient.py [--dataset_dir path/to/BIDS] [--weights models/model.pt] [--scans 3]

Printed, for `level_weight` null and that of `configs/recipe.json`: the norm of the gradient of each of the first
training scans, and the cosine between those of every two, mean over the hidden convolutions. Whole volumes, the
recipe's loss, bf16.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import fire
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.networks import load_weights  # noqa: E402
from scripts.optimizers import MuonAdamW  # noqa: E402


def main(dataset_dir: str = "", weights: str = str(ROOT / "models" / "model.pt"), scans: int = 3) -> None:
    """Print the two blocks."""
    parser = ConfigParser(
        ConfigParser.load_config_files([str(ROOT / "configs" / name) for name in ("train.json", "recipe.json")])
    )
    settings = {"bundle_root": str(ROOT), "dataset_dir": dataset_dir, "amp": True, "augment": False}
    settings["train#dataset#data"] = f"$select(@cohort, 'train')[:{scans}]"
    for key, value in settings.items():
        parser[key] = value
    network = load_weights(parser.get_parsed_content("network"), weights).train()
    dataset: Any = parser.get_parsed_content("train#dataset")
    inferer: Any = parser.get_parsed_content("inferer")
    hidden = MuonAdamW(network).param_groups[0]["params"]
    images = [dataset[index]["image"][None].to(parser.get_parsed_content("device")) for index in range(scans)]
    for level_weight in (None, parser["level_weight"]):
        parser["level_weight"] = level_weight
        loss: Any = parser.get_parsed_content("loss")
        gradients: list[list[Tensor]] = []
        for image in images:
            network.zero_grad()
            loss(inferer(image, network), image).backward()
            gradients.append([weight.grad.flatten().clone() for weight in hidden])
        print(f"level_weight {level_weight}")
        print("  norms  ", "  ".join(f"{torch.cat(gradient).norm():.2f}" for gradient in gradients))
        pairs = [f"{_cosine(one, other):.2f}" for one, other in combinations(gradients, 2)]
        print("  cosines", "  ".join(pairs), flush=True)


def _cosine(one: list[Tensor], other: list[Tensor]) -> float:
    return sum(float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(one, other, strict=True)) / len(one)


if __name__ == "__main__":
    fire.Fire(main)
