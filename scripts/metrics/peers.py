"""Other models beside the one that is evaluated: their weights, or folders of what they made of the same scans.

`evaluate.json` gives them as `peers`. Each goes through the figures of the protocol volume by volume.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Orientation, ResampleToMatch
from torch import nn

from scripts.metrics.baselines import BASELINES
from scripts.networks import AutocastInferer, load_weights
from scripts.run import InputError
from scripts.transforms import FACTOR_KEY

__all__ = ["Peer", "PeerFolder", "PeerWeights", "read_peers"]

RESERVED = ("model", "identity", *BASELINES)
NIFTI = (".nii", ".nii.gz")


class Peer(ABC):
    """Something that reconstructs the same scans as the model.

    Args:
        name: in tables and pictures.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, names: Iterable[str]) -> None:
        """Raise an InputError if a scan of these names cannot be had; called before the run."""
        return None

    @abstractmethod
    def __call__(self, name: str, image: MetaTensor) -> torch.Tensor:
        """Reconstruct.

        Args:
            name: of the scan.
            image: the scan in model space (1, D, H, W), with its affine and intensity factor.

        Returns:
            The reconstruction in model space (1, D, H, W), float32.
        """


class PeerWeights(Peer):
    """Other weights of the same architecture.

    Args:
        name: in tables and pictures.
        network: with `encode` and `decode`, on its device.
        inferer: as the model's.
    """

    def __init__(self, name: str, network: nn.Module, inferer: AutocastInferer) -> None:
        super().__init__(name)
        self.network: Any = network.eval()
        self.inferer = inferer

    def __call__(self, name: str, image: MetaTensor) -> torch.Tensor:
        """Decode the posterior mean; see `Peer`."""
        x = image.as_tensor()[None]
        with torch.no_grad(), self.inferer.autocast():
            mu, _ = self.network.encode(x)
            return self.network.decode(mu)[0].float()


class PeerFolder(Peer):
    """A folder of NIfTI files, one a scan: `<name>_recon.nii.gz`, or the one file whose name begins with `<name>`.

    A file may lie on any grid: it is resampled in world space to the model-space grid of its scan. Its intensities
    are in the scan's unit, as `inference.json` writes them, and are divided by the scan's factor.

    Args:
        name: in tables and pictures.
        folder: searched with its subfolders.
    """

    def __init__(self, name: str, folder: str | Path) -> None:
        super().__init__(name)
        self.folder = Path(folder)
        self.files = sorted(path for path in self.folder.rglob("*.nii*") if path.name.endswith(NIFTI))
        self.load = LoadImage(reader="NibabelReader", image_only=True, ensure_channel_first=True, dtype=np.float32)
        self.orient = Orientation(axcodes="RAS", labels=None)
        self.resample = ResampleToMatch(mode="bilinear", padding_mode="zeros", align_corners=True)

    def check(self, names: Iterable[str]) -> None:
        """Find every scan's file before the first is measured."""
        for name in names:
            self._file(name)

    def __call__(self, name: str, image: MetaTensor) -> torch.Tensor:
        """Read and resample; see `Peer`."""
        path = self._file(name)
        try:
            recon = self.orient(self.load(path))
        except Exception as error:
            raise InputError(f"{path} cannot be read as a NIfTI volume ({error}); write it again.") from error
        if recon.ndim != 4 or recon.shape[0] != 1:
            raise InputError(f"{path} has the shape {tuple(recon.shape)}; one 3D volume is needed.")
        device = image.device
        matched: Any = self.resample(recon, img_dst=image.cpu())
        return (matched.as_tensor() / float(image.meta[FACTOR_KEY])).float().to(device)

    def _file(self, name: str) -> Path:
        exact = [path for path in self.files if path.name in {f"{name}_recon{ending}" for ending in NIFTI}]
        begun = [path for path in self.files if path.name.startswith((f"{name}_", f"{name}."))]
        found = exact or begun
        if len(found) != 1:
            number = len(found) or "no"
            raise InputError(
                f"{self.folder} has {number} files of {name}; one file {name}_recon.nii.gz a scan is needed."
            )
        return found[0]


def read_peers(peers: Sequence[str] | Mapping[str, str], network: nn.Module, inferer: AutocastInferer) -> list[Peer]:
    """Make the peers that a config names.

    Args:
        peers: paths of weights files and of folders; named after themselves (a `model.pt` after its folder), or by
            the keys of a dict.
        network: the model's; weights are loaded into copies of it.
        inferer: the model's.

    Raises:
        InputError: a path is missing, weights do not fit, or two have one name.
    """
    if isinstance(peers, str):
        peers = [peers]
    named = dict(peers) if isinstance(peers, Mapping) else {}
    given_as = [*named.values()] if named else peers
    if not isinstance(given_as, (list, tuple)) or not all(isinstance(given, (str, Path)) for given in given_as):
        raise InputError(f"'peers' is {peers!r}; give a list of weights files and folders.")
    for given in () if isinstance(peers, Mapping) else peers:
        path = Path(given)
        name = path.resolve().parent.name if path.name in ("model.pt", "model.safetensors") else path.resolve().stem
        if name in named or name in RESERVED:
            raise InputError(f"{path} would be named '{name}', like another; give peers as {{'name': 'path', ...}}.")
        named[name] = given
    made: list[Peer] = []
    for name, given in named.items():
        if name in RESERVED:
            raise InputError(f"a peer cannot be named '{name}'; give {given} another name.")
        if Path(given).is_dir():
            made.append(PeerFolder(name, given))
        else:
            made.append(PeerWeights(name, load_weights(deepcopy(network), given), inferer))
    return made
