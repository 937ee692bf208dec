"""Simple codes that store as many numbers a volume as the latent does; a VAE has to beat all of them.

The evaluation runs them beside the model, over the same volumes and through the same metrics. The
latent has 4 channels on a grid a quarter as fine in each direction, so 1/16 of the voxels, and each code here spends
just that budget: on a coarser grid (`Trilinear`), on the lowest frequencies (`DCT`), on the principal components of
small blocks (`PatchPCA`, the only one that is fitted).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.fft import dctn, idctn

from scripts.conventions import STRIDE
from scripts.run import InputError, replacing

__all__ = ["BASELINES", "DCT", "Baseline", "PatchPCA", "Trilinear", "latent_budget", "make_baselines"]

LATENT_CHANNELS = 4
BLOCK_VOXELS = STRIDE**3


def latent_budget(size: tuple[int, int, int]) -> int:
    """Number of values in the latent of a volume of `size` (D, H, W): 106,624 for 112 x 136 x 112."""
    return round(LATENT_CHANNELS * size[0] * size[1] * size[2] / BLOCK_VOXELS)


class Baseline(ABC):
    """A code with the latent's budget: called with volumes (B, 1, D, H, W), it returns what the code keeps of them."""

    name: str

    def fit(self, volumes: Iterable[torch.Tensor]) -> Baseline:
        """Learn from `volumes` of the training split; codes without parameters learn nothing and read nothing."""
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Encode and decode.

        Args:
            x: volumes (B, 1, D, H, W) in the network's intensity (not clamped), any float type and device.

        Returns:
            Their reconstruction, same shape, float32, on the same device.

        Raises:
            ValueError: x is not (B, 1, D, H, W).
        """
        if x.ndim != 5 or x.shape[1] != 1:
            raise ValueError(f"x must be (B, 1, D, H, W), got {tuple(x.shape)}.")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self._reconstruct(x.detach().as_subclass(torch.Tensor).float())

    @abstractmethod
    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        """Encode and decode float32 volumes (B, 1, D, H, W)."""


class Trilinear(Baseline):
    """Down to a coarser grid of about the budget (44 x 54 x 44 for 112 x 136 x 112) and back, both ways trilinear."""

    name = "trilinear"

    def coarse_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Sides of the coarse grid for a volume of `size` (D, H, W): each times the cube root of 1/16, rounded."""
        factor = (LATENT_CHANNELS / BLOCK_VOXELS) ** (1 / 3)
        d, h, w = (max(1, round(side * factor)) for side in size)
        return d, h, w

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[2], x.shape[3], x.shape[4])
        coarse = F.interpolate(x, size=self.coarse_size(size), mode="trilinear", align_corners=False)
        return F.interpolate(coarse, size=size, mode="trilinear", align_corners=False)


class DCT(Baseline):
    """The coefficients of the orthonormal 3D DCT-II that are lowest in (i/D)^2 + (j/H)^2 + (k/W)^2, as many as the
    budget allows; which ones is the same for every volume, so their positions cost nothing."""

    name = "dct"

    def kept(self, size: tuple[int, int, int]) -> np.ndarray:
        """Which coefficients are kept: bool (D, H, W). Ties at the edge fall to the lower flat index."""
        i, j, k = np.ogrid[: size[0], : size[1], : size[2]]
        frequency = (i / size[0]) ** 2 + (j / size[1]) ** 2 + (k / size[2]) ** 2
        mask = np.zeros(size, dtype=bool)
        mask.flat[np.argsort(frequency, axis=None, kind="stable")[: latent_budget(size)]] = True
        return mask

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        axes, workers = (2, 3, 4), torch.get_num_threads()
        coefficients = dctn(x.cpu().numpy(), type=2, norm="ortho", axes=axes, workers=workers)
        coefficients *= self.kept((x.shape[2], x.shape[3], x.shape[4]))
        return torch.from_numpy(idctn(coefficients, type=2, norm="ortho", axes=axes, workers=workers)).to(x.device)


class PatchPCA(Baseline):
    """The first four principal components, about the mean, of the 64 voxels of each 4 x 4 x 4 block.

    Fit it once on the training split and save it: `PatchPCA().fit(volumes).save("patch_pca.safetensors")`, later
    `PatchPCA.load("patch_pca.safetensors")`.

    Attributes:
        mean: (64,) float32, the mean block.
        components: (4, 64) float32, orthonormal rows, largest variance first.
        explained: share of the blocks' variance that the components keep.
    """

    name = "patch_pca"

    def __init__(self) -> None:
        self.mean = torch.zeros(0)
        self.components = torch.zeros(0)
        self.explained = float("nan")

    def fit(self, volumes: Iterable[torch.Tensor]) -> PatchPCA:
        """Find the components of all blocks of all volumes; memory does not grow with their number.

        Args:
            volumes: float tensors (..., D, H, W), sides multiples of 4; batches, and volumes of different sizes, may
                be mixed.

        Returns:
            The fitted code itself.

        Raises:
            ValueError: no volumes, a side that is no multiple of 4, or values that are not finite.
        """
        n_blocks = 0
        total = torch.zeros(BLOCK_VOXELS, dtype=torch.float64)
        moment = torch.zeros(BLOCK_VOXELS, BLOCK_VOXELS, dtype=torch.float64)
        for volume in volumes:
            plain = volume.detach().as_subclass(torch.Tensor).cpu()
            if plain.ndim < 3:
                raise ValueError(f"a volume must be (..., D, H, W), got {tuple(plain.shape)}.")
            # Values are of order 1, so that moments about zero lose nothing in float64 when the mean is taken off.
            blocks = _to_blocks(plain.reshape(-1, 1, *plain.shape[-3:])).reshape(-1, BLOCK_VOXELS).double()
            n_blocks += len(blocks)
            total += blocks.sum(0)
            moment += blocks.T @ blocks
        if n_blocks == 0:
            raise ValueError("volumes is empty; patch_pca needs the training split to be fitted.")
        if not torch.isfinite(moment).all():
            raise ValueError("volumes hold values that are not finite.")
        mean = total / n_blocks
        variances, vectors = torch.linalg.eigh(moment / n_blocks - torch.outer(mean, mean))
        self.mean = mean.float()
        self.components = vectors[:, -LATENT_CHANNELS:].flip(1).T.contiguous().float()
        # Rounding can leave a variance of zero slightly below zero; constant volumes have no variance to explain.
        variances = variances.clamp_min(0)
        self.explained = float(variances[-LATENT_CHANNELS:].sum() / variances.sum())
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted code to one safetensors file (mean, components, explained).

        Raises:
            ValueError: the code is not fitted.
        """
        self._check_fitted()
        tensors = {
            "mean": self.mean,
            "components": self.components,
            "explained": torch.tensor([self.explained], dtype=torch.float64),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "code": self.name})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PatchPCA:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or holds something else.
        """
        remedy = "Fit it on the training split again, or name the right file."
        if not Path(path).is_file():
            raise InputError(f"{path} does not exist; it should hold the fitted patch PCA. {remedy}")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path} is not a readable safetensors file ({error}). {remedy}") from error
        expected = {"mean": (BLOCK_VOXELS,), "components": (LATENT_CHANNELS, BLOCK_VOXELS), "explained": (1,)}
        found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        if found != expected:
            raise InputError(f"{path} holds {found}, a fitted patch PCA is {expected}. {remedy}")
        code = cls()
        code.mean = tensors["mean"].float()
        code.components = tensors["components"].float()
        code.explained = float(tensors["explained"])
        return code

    def _reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        self._check_fitted()
        mean, components = self.mean.to(x.device), self.components.to(x.device)
        values = (_to_blocks(x) - mean) @ components.T
        return _from_blocks(values @ components + mean)

    def _check_fitted(self) -> None:
        if self.components.numel() == 0:
            raise ValueError("patch_pca is not fitted; call fit with the training split, or load a fitted one.")


BASELINES: dict[str, type[Baseline]] = {code.name: code for code in (Trilinear, DCT, PatchPCA)}


def make_baselines(names: Sequence[str]) -> list[Baseline]:
    """Make the baselines that a config names.

    Args:
        names: keys of `BASELINES`.

    Raises:
        InputError: not a list, or a name that there is not.
    """
    if not isinstance(names, (list, tuple)) or any(name not in BASELINES for name in names):
        raise InputError(f"'baselines' is {names!r}; give a list of {', '.join(BASELINES)}, or [].")
    return [BASELINES[name]() for name in names]


def _to_blocks(x: torch.Tensor) -> torch.Tensor:
    """Cut (B, 1, D, H, W) into (B, D/4, H/4, W/4, 64)."""
    b, _, d, h, w = x.shape
    if d % STRIDE or h % STRIDE or w % STRIDE:
        raise ValueError(f"the sides must be multiples of {STRIDE}, got {d} x {h} x {w}.")
    blocks = x.reshape(b, d // STRIDE, STRIDE, h // STRIDE, STRIDE, w // STRIDE, STRIDE)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


def _from_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_blocks`."""
    b, d, h, w, _ = blocks.shape
    x = blocks.reshape(b, d, h, w, STRIDE, STRIDE, STRIDE).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(b, 1, d * STRIDE, h * STRIDE, w * STRIDE)
