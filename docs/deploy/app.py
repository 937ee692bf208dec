"""A MONAI Deploy application: one T1 scan in, its reconstruction out, as NIfTI in the scan's own grid and unit.

    PYTHONPATH=. python docs/deploy/app.py -i sub-01_T1w.nii.gz -o output/deploy -m output/export/model.ts

Input is a NIfTI file, a folder that holds one, or a folder with one DICOM MR series. The SDK's own operators do the
work. What is here is what they lack: a NIfTI reader that keeps the geometry, a bundle operator that gives floats
(theirs casts every image to uint8), a writer, and two repairs to the reading of a DICOM series.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, Fragment, Image, IOType, Operator, OperatorSpec
from monai.deploy.operators import (
    DICOMDataLoaderOperator,
    DICOMSeriesSelectorOperator,
    DICOMSeriesToVolumeOperator,
    IOMapping,
    MonaiBundleInferenceOperator,
)
from monai.transforms import LoadImage
from pydicom.pixels import apply_presentation_lut, apply_rescale

from scripts.cohort import check_scan, scan_stem
from scripts.run import InputError, report_input_errors
from scripts.transforms import plain_volume, write_nifti

MR_SERIES = '{"selections": [{"name": "MR", "conditions": {"Modality": "^MR$"}}]}'
EVEN_MM = 0.01  # positions in DICOM are decimal texts, often of two or three digits


class BrainVAEApp(Application):
    """Scan to reconstruction. Arguments of the command line: see `--help`."""

    def compose(self) -> None:
        """Connect the operators: reading, the bundle, writing."""
        context = Application.init_app_context(self.argv)
        scan, output = _find_scan(Path(context.input_path)), Path(context.output_path)
        bundle = FloatBundleOperator(self, app_context=context, name="bundle")
        writer = NiftiWriter(self, output_dir=output, name="writer")
        if scan.is_file():
            self.add_flow(NiftiReader(self, CountCondition(self, 1), path=scan, name="reader"), bundle)
        else:
            loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=scan, name="loader")
            selector = DICOMSeriesSelectorOperator(self, rules=MR_SERIES, all_matched=True, name="selector")
            volume = SeriesToFloatVolume(self, name="volume")
            self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
            self.add_flow(selector, volume, {("study_selected_series_list", "study_selected_series_list")})
            self.add_flow(volume, bundle, {("image", "image")})
        self.add_flow(bundle, writer, {("pred", "pred")})


class NiftiReader(Operator):
    """Read a scan as `configs/inference.json` does; the SDK's `NiftiDataLoader` drops the affine.

    Args:
        fragment: the application.
        path: the file.
    """

    def __init__(self, fragment: Fragment, *args: Any, path: Path, **kwargs: Any) -> None:
        self.path = path
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the port `image`."""
        spec.output("image")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Emit the scan, (x, y, z) float32, with MONAI's meta.

        Raises:
            InputError: the bundle's pre-flight check refuses the file.
        """
        if problem := check_scan(self.path):
            raise InputError(f"{self.path} {problem[1]}")
        volume = LoadImage("NibabelReader", image_only=True, ensure_channel_first=True)(self.path)
        op_output.emit(Image(volume[0].numpy(), dict(volume.meta)), "image")


class SeriesToFloatVolume(DICOMSeriesToVolumeOperator):
    """The SDK's operator with float32 voxels and the right voxel size, for one evenly spaced series."""

    def convert_to_image(self, study_selected_series_list: list[Any]) -> Image:
        """Make an image of the only series; the SDK would take the first of several without a word.

        Raises:
            InputError: no MR series was found, or several.
        """
        n_series = sum(len(study.selected_series) for study in study_selected_series_list)
        if n_series != 1:
            raise InputError(f"the input holds {n_series} MR series; give a folder with one, the T1w.")
        return super().convert_to_image(study_selected_series_list)

    def generate_voxel_data(self, series: Any) -> np.ndarray:
        """Rescaled voxels (z, y, x); the SDK casts all slices to the type that fits the first, often an empty one."""
        slices = [(s.get_pixel_array(), s.get_native_sop_instance()) for s in series.get_sop_instances()]
        rescaled = [apply_presentation_lut(apply_rescale(pixels, header), header) for pixels, header in slices]
        return np.stack(rescaled).astype(np.float32)

    def compute_affine_transform(self, s_1: Any, s_n: Any, n: int, series: Any) -> None:
        """Set the affines; the SDK multiplies the two in-plane axes by each other's spacing.

        Raises:
            InputError: the slices are not evenly spaced, so that no affine describes them.
        """
        gaps = np.diff([instance.distance for instance in series.get_sop_instances()])
        if np.ptp(gaps) > 2 * EVEN_MM:
            raise InputError(
                f"the slices of the series lie {gaps.min():.3f} to {gaps.max():.3f} mm apart; is one missing or double?"
            )
        super().compute_affine_transform(s_1, s_n, n, series)
        between_rows, between_columns = s_1[0x0028, 0x0030].value
        for name in (self.ATTRIBUTE_NIFTI_AFFINE, self.ATTRIBUTE_DICOM_AFFINE):
            affine = getattr(series, name)
            affine[:3, 0] *= between_columns / between_rows
            affine[:3, 1] *= between_rows / between_columns
            # As a NIfTI file has it: a difference of 1e-8 is enough for MONAI's Spacing to begin its grid elsewhere.
            setattr(series, name, affine.astype(np.float32).astype(np.float64))


class FloatBundleOperator(MonaiBundleInferenceOperator):
    """The SDK's bundle operator, giving the reconstruction as floats in the scan's grid, as `monai.bundle run` does.

    Args:
        fragment: the application.
        app_context: holds the path of `model.ts`.
    """

    def __init__(self, fragment: Fragment, *args: Any, app_context: AppContext, **kwargs: Any) -> None:
        ports = [[IOMapping(name, Image, IOType.IN_MEMORY)] for name in ("image", "pred")]
        super().__init__(
            fragment, *args, app_context=app_context, input_mapping=ports[0], output_mapping=ports[1], **kwargs
        )

    def _init_config(self, config_names: list[str]) -> None:
        super()._init_config(config_names)
        # The archive's folder is named after the file at export; under another name the SDK finds no config in it.
        if "preprocessing" not in self.parser:
            raise InputError(f"{self.bundle_path} has no inference.json; keep the name it was exported with.")

    def _receive_input(self, name: str, op_input: Any, context: Any) -> tuple[np.ndarray, dict[str, Any]]:
        # The channel comes from the bundle's LoadImaged, which the SDK takes out of the preprocessing.
        volume, meta = super()._receive_input(name, op_input, context)
        return np.ascontiguousarray(volume, dtype=np.float32)[None], meta

    def _send_output(self, value: Any, name: str, metadata: dict[str, Any], op_output: Any, context: Any) -> None:
        # (z, y, x) is the SDK's order of an Image. `affine` of the metadata is of model space, hence the original's.
        volume = np.swapaxes(plain_volume(value)[0].cpu().numpy(), 0, 2)
        op_output.emit(Image(volume, {**metadata, "affine": metadata["original_affine"]}), name)


class NiftiWriter(Operator):
    """Write `<name>_recon.nii.gz`, named after the NIfTI file or the DICOM series (its UID).

    Args:
        fragment: the application.
        output_dir: where to.
    """

    def __init__(self, fragment: Fragment, *args: Any, output_dir: Path, **kwargs: Any) -> None:
        self.output_dir = output_dir
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Declare the port `pred`."""
        spec.input("pred")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Write the image that arrives."""
        image = op_input.receive("pred")
        meta, volume = image.metadata(), np.swapaxes(image.asnumpy(), 0, 2)
        source: Any
        if "SeriesInstanceUID" in meta:
            name, source = meta["SeriesInstanceUID"], nib.Nifti1Image(volume, np.asarray(meta["affine"]))
            source.header.set_xyzt_units("mm", "sec")
        else:
            path = Path(meta["filename_or_obj"])
            name, source = scan_stem(path), nib.load(path)
        path = self.output_dir / f"{name}_recon.nii.gz"
        write_nifti(volume, source, path)
        print(f"{path} written", flush=True)


def _find_scan(path: Path) -> Path:
    """The NIfTI file that `path` is or holds, else `path` itself as a DICOM folder."""
    files = [file for pattern in ("*.nii", "*.nii.gz") for file in path.glob(pattern)]
    if len(files) > 1:
        raise InputError(f"{path} holds {len(files)} NIfTI files; give one.")
    return files[0] if files else path


if __name__ == "__main__":
    report_input_errors()
    BrainVAEApp().run()
