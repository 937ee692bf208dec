"""A folder of latents as the data of a diffusion training.

    data = LatentDataset("output/latents", split="train", pad=True)
    loader = DataLoader(data, batch_size=8, shuffle=True)          # batch["latent"]: (8, 4, 28, 36, 28)

A volume's posterior is stored and a fresh sample is drawn each time it is loaded, then scaled by the
statistics of the whole cohort. `FirstStage` is the other half: it gives MONAI's `LatentDiffusionInferer` the decoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import Dataset
from monai.transforms import MapTransform
from torch import nn

from scripts.latents.scaling import LatentScaling
from scripts.latents.storage import RECORD_KEYS, read_latent, read_manifest, read_statistics
from scripts.run import InputError, file_sha256

__all__ = ["DrawLatentd", "FirstStage", "LatentDataset", "latent_datalist"]

DRAWS = ("sample", "mean")


def latent_datalist(folder: str | Path, split: str = "all", check_hashes: bool = False) -> list[dict[str, str]]:
    """A folder's latents as a MONAI datalist, for `DrawLatentd`.

    Args:
        folder: a finished folder of latents.
        split: `train`, `val`, `test` or `all`.
        check_hashes: whether every file is read and compared with the manifest's sha256.

    Returns:
        Dicts with latent (the file's path), name, subject, session, label, split.

    Raises:
        InputError: the folder is not finished, a file is missing or changed, or the split is empty.
    """
    chosen = []
    for entry in read_manifest(folder):
        if split not in ("all", entry["split"]):
            continue
        path = Path(folder) / entry["file"]
        if not path.is_file():
            raise InputError(f"{path} is in the manifest but does not exist; run encode.json again.")
        if check_hashes and file_sha256(path) != entry["sha256"]:
            raise InputError(f"{path} is not the file of the manifest (its sha256 differs); run encode.json again.")
        chosen.append({"latent": str(path), **{key: entry[key] for key in RECORD_KEYS}})
    if not chosen:
        raise InputError(f"{folder} has no latents in the split {split!r}; give train, val, test or all.")
    return chosen


class DrawLatentd(MapTransform):
    """Read a latent file and give its posterior mean or a fresh sample, scaled.

    Samples come from torch's global generator, which torch and MONAI seed anew in each worker.

    Args:
        keys: keys that hold paths of latent files.
        scaling: how to scale and pad.
        draw: `sample` (mu + sigma eps) or `mean`.
        allow_missing_keys: as in MONAI.

    Raises:
        InputError: `draw` is none of its values.
    """

    def __init__(
        self, keys: KeysCollection, scaling: LatentScaling, draw: str = "sample", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if draw not in DRAWS:
            raise InputError(f"'draw' is {draw!r}; give one of {', '.join(DRAWS)}.")
        self.scaling, self.draw = scaling, draw

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each key's latent, float32 (C, D, H, W)."""
        drawn: dict[Hashable, Any] = dict(data)
        for key in self.key_iterator(drawn):
            latent = read_latent(drawn[key])
            posterior = latent.posterior
            z = posterior.sample() if self.draw == "sample" else posterior.mu
            drawn[key] = self.scaling.apply(z)
        return drawn


class LatentDataset(Dataset):
    """Latents of a folder: dicts with latent (C, D, H, W) float32, name, subject, session, label, split.

    Args:
        folder: a finished folder of latents.
        split: `train`, `val`, `test` or `all`.
        draw: `sample`, a fresh one each time, or `mean`.
        scaling: `channel`, `overall` or `raw`.
        pad: whether the sides are padded to multiples of 4 (28 x 34 x 28 to 28 x 36 x 28).
        check_hashes: whether every file is compared with the manifest first.

    Attributes:
        scaling: the `LatentScaling`, whose `undo` leads back.
        sides: of the raw latent, (D, H, W).

    Raises:
        InputError: as in `latent_datalist`, or an argument is none of its values.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str = "all",
        draw: str = "sample",
        scaling: str = "channel",
        pad: bool = False,
        check_hashes: bool = False,
    ) -> None:
        statistics = read_statistics(folder)
        self.scaling = LatentScaling(scaling, statistics, pad)
        self.sides: list[int] = statistics["shape"][1:]
        super().__init__(latent_datalist(folder, split, check_hashes), DrawLatentd("latent", self.scaling, draw))


class FirstStage(nn.Module):
    """What MONAI's `LatentDiffusionInferer` takes for an autoencoder, where latents are stored already.

    Args:
        network: a `BrainVAE` in eval mode.
        scaling: the one of the `LatentDataset` that the diffusion model is trained on.
        sides: of the raw latent, (D, H, W).
    """

    def __init__(self, network: Any, scaling: LatentScaling, sides: list[int]) -> None:
        super().__init__()
        self.network, self.scaling, self.sides = network, scaling, sides

    def encode_stage_2_inputs(self, z: torch.Tensor) -> torch.Tensor:
        """The batch itself: `LatentDataset` has drawn and scaled it."""
        return z

    def decode_stage_2_outputs(self, z: torch.Tensor) -> torch.Tensor:
        """Unpad, unscale and decode (B, C, D', H', W') to (B, 1, D, H, W)."""
        return self.network.decode(torch.stack([self.scaling.undo(latent, self.sides) for latent in z]))
