"""The way home from model space, kept with a latent, so that a decoded volume lies over the scan it came from.

Encoding writes a `SourceGrid` into each latent's header, decoding reads it. The geometry of preprocessing
depends on the scan's grid alone but for the place of the box, and that is in model space's affine. So the way is
walked once more over an empty volume, which leaves MONAI's trace, and the decoded volume is sent back along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from scripts.run import InputError
from scripts.transforms.intensity import FACTOR_KEY, ScaleByPercentiled
from scripts.transforms.model_space import ToModelSpaced

__all__ = ["SourceGrid", "model_space_image"]


@dataclass(frozen=True)
class SourceGrid:
    """A scan's own grid and unit, and where its model space lies in it.

    Attributes:
        source_shape: voxels of the scan's three axes.
        source_affine: 4 x 4, voxel to world in mm.
        source_codes: sform and qform code.
        source_units: units of length and time.
        model_affine: 4 x 4, voxel of model space to world in mm.
        intensity_factor: multiply by it to come back to the scanner's unit.
    """

    source_shape: list[int]
    source_affine: list[list[float]]
    source_codes: list[int]
    source_units: list[str]
    model_affine: list[list[float]]
    intensity_factor: float

    @classmethod
    def of_image(cls, image: MetaTensor) -> SourceGrid:
        """Of a preprocessed volume with the meta that `LoadImaged` and the preprocessing left on it."""
        header = nib.load(image.meta["filename_or_obj"]).header
        codes, units = [1, 1], ["mm", "sec"]
        if isinstance(header, nib.Nifti1Header):
            codes = [int(header["sform_code"]), int(header["qform_code"])]
            units = list(header.get_xyzt_units())
        return cls(
            source_shape=[int(side) for side in image.meta["spatial_shape"]],
            source_affine=np.asarray(image.meta["original_affine"], dtype=float).tolist(),
            source_codes=codes,
            source_units=units,
            model_affine=np.asarray(image.affine, dtype=float).tolist(),
            intensity_factor=float(image.meta[FACTOR_KEY]),
        )

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> SourceGrid | None:
        """From a latent's header; None where the header does not know its source."""
        names = cls.__dataclass_fields__
        return cls(**{name: header[name] for name in names}) if all(name in header for name in names) else None

    def as_header(self) -> dict[str, Any]:
        """For a latent's header."""
        return asdict(self)

    def image(self) -> nib.Nifti1Image:
        """An image of the source's grid, codes and units, for `write_nifti`; its voxels take no memory."""
        empty = np.broadcast_to(np.zeros((), np.uint8), self.source_shape)
        image = nib.Nifti1Image(empty, np.array(self.source_affine))
        image.set_sform(image.affine, self.source_codes[0])
        image.set_qform(image.affine, self.source_codes[1])
        image.header.set_xyzt_units(*self.source_units)
        return image

    def bring_home(self, volume: torch.Tensor, preprocessing: Compose) -> np.ndarray:
        """Send a volume from model space to the scan's own grid and unit; what lay outside comes back as zero.

        Args:
            volume: (D, H, W) in model space, in units of the scan's percentile.
            preprocessing: the transform that made model space; its first step is the loading.

        Returns:
            float32, of `source_shape`.

        Raises:
            InputError: model space is of another size or spacing than when the latent was made.
        """
        walked: list[Any] = []
        scan: dict[Any, Any] = {"image": self._empty()}
        for step in preprocessing.transforms[1:]:
            if isinstance(step, ScaleByPercentiled):
                continue
            if isinstance(step, ToModelSpaced):
                start = self._start(scan["image"])
                scan = {"image": step.cropper.crop_pad(scan["image"], start, start + step.cropper.spatial_size)}
            else:
                scan = step(scan)
            walked.append(step)
        here = scan["image"]
        if not np.allclose(here.affine, self.model_affine, atol=1e-3) or here.shape[1:] != volume.shape:
            raise InputError(
                f"the latent was made in another model space than {list(here.shape[1:])} voxels with this 'spacing'; "
                "use the spacing and spatial_size of its encoding."
            )
        home = self._walk_back(volume * self.intensity_factor, here, walked)
        outside = self._walk_back(torch.ones_like(volume), here, walked) < 0.5
        home[outside] = 0
        return home

    def _empty(self) -> MetaTensor:
        affine = torch.tensor(self.source_affine, dtype=torch.float64)
        return MetaTensor(torch.zeros(1, *self.source_shape), affine=affine)

    def _start(self, spaced: MetaTensor) -> np.ndarray:
        """First voxel of the box in the grid before it was cut."""
        corner = np.linalg.inv(np.asarray(spaced.affine)) @ np.array(self.model_affine)[:, 3]
        return corner[:3].round().astype(int)

    @staticmethod
    def _walk_back(volume: torch.Tensor, here: MetaTensor, walked: list[Any]) -> np.ndarray:
        operations = deepcopy(here.applied_operations)  # an inverse takes parts out of them
        plain = volume.detach().as_subclass(torch.Tensor).float().cpu()[None]
        scan: dict[Any, Any] = {"image": MetaTensor(plain, affine=here.affine, applied_operations=operations)}
        for step in reversed(walked):
            scan = step.inverse(scan)
        return scan["image"].as_tensor()[0].numpy()


def model_space_image(shape: Sequence[int], spacing: float, grid: SourceGrid | None = None) -> nib.Nifti1Image:
    """An image of model space's grid, for `write_nifti`: where the latent's scan lies, else centred on the origin.

    Args:
        shape: voxels of the three axes.
        spacing: voxel size in mm.
        grid: the latent's source, where it is known.
    """
    if grid is None:
        affine = np.diag([spacing] * 3 + [1.0])
        affine[:3, 3] = [-spacing * (side - 1) / 2 for side in shape]
    else:
        affine = np.array(grid.model_affine)
    image = nib.Nifti1Image(np.broadcast_to(np.zeros((), np.uint8), tuple(shape)), affine)
    image.header.set_xyzt_units("mm", "sec")
    return image
