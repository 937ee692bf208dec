"""The codes that a VAE has to beat: their budget, what they keep exactly, and their fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts.metrics import BASELINES, DCT, PatchPCA, Trilinear, latent_budget, make_baselines
from scripts.run import InputError

MODEL_SPACE = (112, 136, 112)
SIZE = (16, 20, 12)
EXACT = 1e-5  # rounding of float32 transforms of values of order 1


def test_budget_in_model_space() -> None:
    """The latent's 106,624 values; the coarse grid is the documented one, and not above the budget."""
    assert latent_budget(MODEL_SPACE) == 4 * 28 * 34 * 28 == 106_624
    assert Trilinear().coarse_size(MODEL_SPACE) == (44, 54, 44)
    assert DCT().kept(MODEL_SPACE).sum() == 106_624


@pytest.mark.parametrize("name", BASELINES)
def test_constant_survives(name: str) -> None:
    """Each code keeps what does not vary, in the same shape, float32."""
    x = torch.full((2, 1, *SIZE), 0.7, dtype=torch.float64)
    (code,) = make_baselines([name])
    y = code.fit([torch.full(SIZE, 0.7)])(MetaTensor(x))
    assert (code.name, y.shape, y.dtype, type(y)) == (name, x.shape, torch.float32, torch.Tensor)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=EXACT)


def test_dct_keeps_the_nearest_and_trilinear_does_not_shift() -> None:
    """A slow cosine stays, a fast one goes; none that goes is nearer to zero than one that stays. Trilinear resampling
    shifts nothing: a ramp stays in place but within a coarse voxel (3 voxels) of the faces."""
    position = (torch.arange(SIZE[0]) + 0.5) / SIZE[0]
    for order, kept in [(3, True), (SIZE[0] - 1, False)]:
        wave = torch.cos(torch.pi * order * position)[:, None, None].expand(SIZE)[None, None].contiguous()
        torch.testing.assert_close(DCT()(wave), wave * kept, rtol=0, atol=EXACT)
    i, j, k = np.indices(SIZE)
    radius = (i / SIZE[0]) ** 2 + (j / SIZE[1]) ** 2 + (k / SIZE[2]) ** 2
    mask = DCT().kept(SIZE)
    assert radius[mask].max() <= radius[~mask].min()
    ramp = torch.linspace(0, 1, SIZE[0])[:, None, None].expand(SIZE)[None, None].contiguous()
    torch.testing.assert_close(Trilinear()(ramp)[:, :, 3:-3], ramp[:, :, 3:-3], rtol=0, atol=EXACT)


def test_patch_pca_is_exact_on_four_components(tmp_path: Path) -> None:
    """Blocks that are a mean plus four patterns are kept whole, wherever the blocks lie, also by a fit from a file."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(1, 4, 1, 4, 1, 4, generator=generator)
    patterns = torch.randn(4, 4, 4, 4, generator=generator)

    def volume() -> torch.Tensor:
        weights = torch.randn(4, *(side // 4 for side in SIZE), generator=generator)
        return (torch.einsum("cxyz,cijk->xiyjzk", weights, patterns) + mean).reshape(1, 1, *SIZE)

    code = PatchPCA().fit([volume() for _ in range(3)])
    assert code.explained == pytest.approx(1.0, abs=1e-9)
    x = volume()
    torch.testing.assert_close(code(x), x, rtol=0, atol=5e-5)  # weights add up to about 10
    code.save(tmp_path / "new" / "patch_pca.safetensors")
    loaded = PatchPCA.load(tmp_path / "new" / "patch_pca.safetensors")
    assert loaded.explained == code.explained and torch.equal(loaded(x), code(x))


def test_misuse_of_codes_is_said(tmp_path: Path) -> None:
    """Files that hold no code, volumes that cannot be fitted, an unfitted code, names that there are not."""
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="x.safetensors"):
        PatchPCA.load(tmp_path / "x.safetensors")
    for volumes in ([], [torch.zeros(10, 12, 12)], [torch.full(SIZE, torch.nan)]):
        with pytest.raises(ValueError, match="empty|multiples of 4|not finite"):
            PatchPCA().fit(volumes)
    with pytest.raises(ValueError, match="not fitted"):
        PatchPCA()(torch.zeros(1, 1, *SIZE))
    with pytest.raises(InputError, match="'baselines'"):
        make_baselines(["dct", "jpeg"])
