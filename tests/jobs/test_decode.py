"""Decoding from its config: home to the scan's grid, to model space, and only with the weights that encoded."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import TINY_JOB, Job, RunBundle, make_weights
from in_process import parsed

from scripts.convert_latents import import_folder
from scripts.latents import ENDING, read_latent
from scripts.run import InputError


def test_encode_then_decode_is_inference(
    encoded: Path, decoded: Job, reconstructed: Job, weights: Path, tmp_path: Path
) -> None:
    """The reconstruction of inference to 1e-4 of the scan's percentile, on the same grid with the same header; by
    `space` model, from one file, that in model space."""
    names = {path.name.removesuffix(ENDING) for path in encoded.glob(f"*{ENDING}")}
    assert {path.name for path in decoded.folder.glob("*.nii.gz")} == {f"{name}_decoded.nii.gz" for name in names}
    latent = encoded / f"sub-07_T1w{ENDING}"
    keys = {"dataset_dir": latent, "output_dir": tmp_path, "weights": weights, "space": "model"}
    parsed("decode", **keys).get_parsed_content("evaluator").run()
    factor = read_latent(latent).header["intensity_factor"]
    for folder, kind, tolerance in ((decoded.folder, "recon", 1e-4 * factor), (tmp_path, "model_space_recon", 1e-4)):
        found = nib.load(folder / "sub-07_T1w_decoded.nii.gz")
        expected = nib.load(reconstructed.folder / f"sub-07_T1w_{kind}.nii.gz")
        np.testing.assert_array_equal(found.affine, expected.affine)
        for key in ("sform_code", "qform_code", "xyzt_units", "datatype"):
            assert found.header[key] == expected.header[key]
        np.testing.assert_allclose(found.get_fdata(), expected.get_fdata(), rtol=0, atol=tolerance)
    for name in ("sub-07_T1w_decoded.png", "decoded.png", "report.html"):
        assert (decoded.folder / name).is_file()


def test_latents_of_other_weights_are_not_decoded(encoded: Path, run_bundle: RunBundle, tmp_path: Path) -> None:
    """Refused before the first one in one line with the remedy and exit code 2; decoded where that is wanted."""
    other = make_weights(tmp_path / "other.pt", 1)
    done = run_bundle(
        "--config_file", "configs/decode.json", "--dataset_dir", str(encoded), "--output_dir", str(tmp_path / "out"),
        "--weights", str(other), *TINY_JOB, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "encoded with other weights" in done.stderr and "'check_weights'" in done.stderr
    assert not list(tmp_path.glob("out/*.nii.gz"))
    latent = encoded / f"sub-01_T1w{ENDING}"
    keys = {"dataset_dir": latent, "output_dir": tmp_path / "new", "weights": other, "check_weights": "False"}
    parsed("decode", **keys).get_parsed_content("evaluator").run()
    assert len(list(tmp_path.glob("new/*.nii.gz"))) == 1


def test_latents_from_elsewhere_are_decoded_to_model_space(weights: Path, tmp_path: Path) -> None:
    """Imported ones know neither weights nor scan: centred on the origin, and `space` source is refused."""
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "x.npz", mu=np.zeros((4, 8, 9, 8)), logvar=np.zeros((4, 8, 9, 8)))
    import_folder(str(tmp_path / "arrays"), str(tmp_path / "latents"))
    keys = {"dataset_dir": tmp_path / "latents", "output_dir": tmp_path / "out", "weights": weights}
    parsed("decode", **keys).get_parsed_content("evaluator").run()
    volume = nib.load(tmp_path / "out" / "x_decoded.nii.gz")
    assert volume.shape == (32, 36, 32)
    np.testing.assert_allclose(volume.affine @ [15.5, 17.5, 15.5, 1], [0, 0, 0, 1], atol=1e-6)
    with pytest.raises(InputError, match="set 'space' to 'model'"):
        parsed("decode", **keys, space="source").get_parsed_content("evaluator").run()
