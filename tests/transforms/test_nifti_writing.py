"""What `write_nifti` writes: the source's grid, codes and units that viewers agree on, float32."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.transforms import write_nifti

AFFINE = np.array([[0, -2.0, 0, 10], [1.5, 0, 0, -20], [0, 0, 3.0, 30], [0, 0, 0, 1]])
# sform code and qform code of the source, code of both in the output; units of length and time
HEADERS = [
    (1, 1, 1, ("mm", "sec")),
    (4, 4, 4, ("micron", "msec")),
    (1, 4, 1, ("unknown", "unknown")),
    (4, 1, 1, ("mm", "unknown")),
]


@pytest.mark.parametrize(("sform", "qform", "expected", "units"), HEADERS)
def test_both_codes_agree_and_units_stay(
    tmp_path: Path, sform: int, qform: int, expected: int, units: tuple[str, str]
) -> None:
    """Both codes are 1, or 4 where the source says so twice; both matrices are the source's, units are its own."""
    source = nib.Nifti1Image(np.zeros((3, 4, 5), np.int16), AFFINE)
    source.set_sform(AFFINE, sform)
    source.set_qform(AFFINE, qform)
    source.header.set_xyzt_units(*units)
    nib.save(source, tmp_path / "source.nii")
    source = nib.load(tmp_path / "source.nii")
    write_nifti(np.ones((3, 4, 5)), source, tmp_path / "out.nii")
    out = nib.load(tmp_path / "out.nii")
    for matrix, code in (out.get_sform(coded=True), out.get_qform(coded=True)):
        assert code == expected
        np.testing.assert_allclose(matrix, source.affine, atol=1e-5)  # fp32 header
    assert out.header.get_xyzt_units() == units and out.get_data_dtype() == np.float32
