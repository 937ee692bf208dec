"""The codes that a VAE has to beat: their budget, what they keep exactly, and their fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from safetensors.torch import save_file

from scripts.metrics import BASELINES, DCT, Baseline, PatchPCA, Trilinear, latent_budget, make_baselines
from scripts.run import InputError

MODEL_SPACE = (112, 136, 112)
SIZE = (16, 20, 12)
# Rounding of float32 transforms of values of order 1.
EXACT = 1e-5


def random_volumes(n: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise (n, 1, D, H, W), also above 1."""
    return torch.rand(n, 1, *SIZE, generator=torch.Generator().manual_seed(seed)) * 1.5


def fitted(name: str) -> Baseline:
    """The code of that name, fitted to noise."""
    return BASELINES[name]().fit(random_volumes(4, seed=1))


def test_budget_in_model_space() -> None:
    """The latent's 106,624 values; the coarse grid is the documented one, and not above the budget."""
    assert latent_budget(MODEL_SPACE) == 4 * 28 * 34 * 28 == 106_624
    assert Trilinear().coarse_size(MODEL_SPACE) == (44, 54, 44)
    assert DCT().kept(MODEL_SPACE).sum() == 106_624


@pytest.mark.parametrize("name", BASELINES)
def test_constant_survives(name: str) -> None:
    """Each code keeps what does not vary, in the same shape, float32, and names itself."""
    x = torch.full((2, 1, *SIZE), 0.7, dtype=torch.float64)
    y = BASELINES[name]().fit([torch.full(SIZE, 0.7)])(MetaTensor(x))
    assert [code.name for code in make_baselines([name])] == [name]
    assert (y.shape, y.dtype, type(y)) == (x.shape, torch.float32, torch.Tensor)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=EXACT)


def test_trilinear_does_not_shift() -> None:
    """A ramp stays in place; only within a coarse voxel (3 voxels) of the faces it is held constant."""
    ramp = torch.linspace(0, 1, SIZE[0])[:, None, None].expand(SIZE)[None, None].contiguous()
    inside = (..., slice(3, -3), slice(None), slice(None))
    torch.testing.assert_close(Trilinear()(ramp)[inside], ramp[inside], rtol=0, atol=EXACT)


def test_dct_keeps_the_nearest_coefficients() -> None:
    """A slow cosine stays, a fast one goes; none that goes is nearer to zero than one that stays."""
    position = (torch.arange(SIZE[0]) + 0.5) / SIZE[0]
    for order, kept in [(3, True), (SIZE[0] - 1, False)]:
        wave = torch.cos(torch.pi * order * position)[:, None, None].expand(SIZE)[None, None].contiguous()
        torch.testing.assert_close(DCT()(wave), wave * kept, rtol=0, atol=EXACT)
    i, j, k = np.indices(SIZE)
    radius = (i / SIZE[0]) ** 2 + (j / SIZE[1]) ** 2 + (k / SIZE[2]) ** 2
    mask = DCT().kept(SIZE)
    assert radius[mask].max() <= radius[~mask].min()


def test_patch_pca_is_exact_on_four_components() -> None:
    """Blocks that are a mean plus four patterns are kept whole, wherever the blocks lie."""
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


def test_patch_pca_is_numpys_svd() -> None:
    """Streaming over volumes gives the components of all blocks at once, about their mean, whatever the offset."""
    x = random_volumes(3) + 5
    blocks = x.reshape(3, 4, 4, 5, 4, 3, 4).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 64).double().numpy()
    centred = blocks - blocks.mean(0)
    _, singular, vectors = np.linalg.svd(centred, full_matrices=False)
    code = PatchPCA().fit([x[0], x[1:]])  # single volumes and batches
    components = code.components.double().numpy()
    assert code.explained == pytest.approx((singular[:4] ** 2).sum() / (singular**2).sum(), rel=1e-9)
    variances = (centred @ components.T).var(0)
    assert variances.tolist() == sorted(variances, reverse=True)
    np.testing.assert_allclose(components.T @ components, vectors[:4].T @ vectors[:4], atol=1e-5)


def test_patch_pca_survives_a_file(tmp_path: Path) -> None:
    """Saved and loaded, it codes the same; nothing else is left in the folder."""
    code, path = fitted("patch_pca"), tmp_path / "new" / "patch_pca.safetensors"
    assert isinstance(code, PatchPCA)
    code.save(path)
    loaded = PatchPCA.load(path)
    assert loaded.explained == code.explained
    assert torch.equal(loaded(random_volumes()), code(random_volumes()))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_misuse_of_codes_is_said(tmp_path: Path) -> None:
    """Files that hold no code, volumes that cannot be fitted or coded, an unfitted code, names that there are not."""
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors")
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("absent", "damaged", "other"):
        with pytest.raises(InputError, match=f"{name}.safetensors"):
            PatchPCA.load(tmp_path / f"{name}.safetensors")
    for volumes in ([], [torch.zeros(10, 12, 12)], [torch.full(SIZE, torch.nan)], [torch.zeros(4, 4)]):
        with pytest.raises(ValueError, match="empty|multiples of 4|not finite|D, H, W"):
            PatchPCA().fit(volumes)
    for use in (PatchPCA(), lambda _: PatchPCA().save(tmp_path / "x.safetensors")):
        with pytest.raises(ValueError, match="not fitted"):
            use(random_volumes())
    with pytest.raises(ValueError, match="B, 1, D, H, W"):
        DCT()(torch.zeros(SIZE))
    with pytest.raises(InputError, match="'baselines'"):
        make_baselines(["dct", "jpeg"])
