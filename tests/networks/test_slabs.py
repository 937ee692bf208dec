"""In slabs the network computes what it computes whole, and holds little of it at a time."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VAE, make_weights, write_scan
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.networks import BrainVAE, in_slabs
from scripts.run import InputError
from scripts.transforms import ToModelBoxd

THREE_LEVELS = {"channels": [4, 8, 8], "num_res_blocks": [2, 1, 2], "attention_levels": [False] * 3}
SHARE_OF_RANGE = 1e-5  # fp32 sums in another order; a wrong plane shows at 1e-2


def network(**changes: Any) -> BrainVAE:
    """A tiny network in eval mode with random weights, none of which is near 0 or 1."""
    torch.manual_seed(0)
    result = BrainVAE(**{**TINY_VAE, **changes}).eval()
    for name, parameter in result.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if ".norm" in name else 0.0, 0.2)
    return result.to(memory_format=torch.channels_last_3d)


def image(*size: int) -> torch.Tensor:
    """Random volumes, brighter towards one corner, so that no part is like another."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(1))
    return values * torch.linspace(0.2, 1, size[2])[:, None, None] * torch.linspace(1, 0.5, size[3])[:, None]


def assert_same(own: torch.Tensor, other: torch.Tensor) -> None:
    """Equal to rounding."""
    torch.testing.assert_close(own, other, rtol=0, atol=SHARE_OF_RANGE * float(other.max() - other.min()))


@pytest.mark.parametrize("changes", [{}, THREE_LEVELS, {"wavelet": False}], ids=["shipped", "levels", "no wavelet"])
@pytest.mark.parametrize(("depth", "slab"), [(1, 1), (2, 1), (5, 3), (7, 2), (6, 40)])
def test_slabs_change_nothing(changes: dict[str, Any], depth: int, slab: int) -> None:
    """Posterior, decoded latent and reconstruction of a batch of two; slabs thinner and thicker than the volume."""
    plain = network(**changes)
    slabwise = in_slabs(plain, slab, 0)
    x = image(2, 1, depth * slabwise.stride, 2 * slabwise.stride, 3 * slabwise.stride)
    with torch.no_grad():
        posterior = plain.encode(x)
        for own, other in zip(slabwise.encode(x), posterior, strict=True):
            assert_same(own, other)
        assert_same(slabwise.decode(posterior[0]), plain.decode(posterior[0]))
        assert_same(slabwise(x), plain(x))


class Live(TorchDispatchMode):
    """The most bytes of tensors that were made within and alive at one time."""

    made: list[Any] = []
    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            self.made = [*self.made, (weakref.ref(tensor), storage._cdata, storage.nbytes())]
        self.made = [entry for entry in self.made if entry[0]() is not None]
        self.most = max(self.most, sum({key: size for _, key, size in self.made}.values()))
        return result


def test_memory_does_not_grow_with_the_depth() -> None:
    """But for the image that comes out, and the latent with what it is made of."""
    slabwise, most = in_slabs(network(), 2, 0), []
    for depth in (64, 256):
        x = image(1, 1, depth, 16, 16)
        with Live() as live:
            slabwise(x)
        most.append(live.most)
    assert most[1] - most[0] < 1.5 * x.nbytes


def test_a_copy_without_onednn_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep copy in contiguous memory, by PyTorch's own convolution, as on a GPU; autocast has no effect."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    slabwise, x = in_slabs(network(), 2, 0), image(1, 1, 20, 8, 12)
    copied = copy.deepcopy(slabwise).to(memory_format=torch.contiguous_format)
    expected = network()(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(copied(x), expected)


def test_a_network_that_needs_the_whole_volume_is_refused_above_the_size() -> None:
    """By encode and decode; at the size it computes."""
    slabwise = in_slabs(network(norm="group", norm_num_groups=4, with_encoder_nonlocal_attn=True), 2, 8 * 8 * 8)
    message = "^12 x 8 x 8 voxels are more than 'whole_voxels' .*with attention and group normalisation takes no slabs"
    with torch.no_grad():
        assert slabwise(image(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)
        with pytest.raises(InputError, match=message):
            slabwise.encode(image(1, 1, 12, 8, 8))
        with pytest.raises(InputError, match=message):
            slabwise.decode(torch.zeros(1, 4, 3, 2, 2))


def test_numbers_that_are_none_are_refused() -> None:
    """Before anything is computed."""
    with pytest.raises(InputError, match="'slab' is 0; give a whole number of at least 1"):
        in_slabs(network(), 0, 5)


def test_the_box_is_so_many_millimetres() -> None:
    """Sides are multiples of 4 voxels, whatever a voxel's size; the way back is exact inside the box."""
    values = torch.zeros(1, 50, 40, 30)
    values[:, 8:20, 6:30, 4:25] = torch.rand(12, 24, 21) + 1
    scan = MetaTensor(values, affine=torch.diag(torch.tensor([1.0, 2.0, 3.3, 1.0])))
    step = ToModelBoxd("image", [24.0, 60.0, 90.0])
    boxed = step({"image": scan})
    assert boxed["image"].shape == (1, 24, 32, 28)
    assert torch.equal(step.inverse(boxed)["image"].as_tensor(), values)
    with pytest.raises(InputError, match="'box_mm' is .*; give three positive numbers"):
        ToModelBoxd("image", [168, 0, 168])


def test_the_overlay_keeps_the_scans_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """native.json in slabs, on sides that are no multiples of 4."""
    monkeypatch.chdir(ROOT)
    source = nib.load(write_scan(tmp_path / "whole.nii.gz", seed=3))
    nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[:-1, 1:-2, 3:], source.affine), tmp_path / "scan.nii.gz")
    keys = {"weights": str(make_weights(tmp_path / "model.pt", 0)), "network_def#channels": [4, 8], "slab": 2}
    job = ConfigWorkflow(
        config_file=["configs/inference.json", "configs/native.json"], workflow_type="infer", device="cpu",
        dataset_dir=str(tmp_path / "scan.nii.gz"), output_dir=str(tmp_path / "output"), whole_voxels=0, **keys,
    )  # fmt: skip
    job.initialize()
    job.run()
    recon = nib.load(tmp_path / "output" / "scan_recon.nii.gz")
    assert recon.shape == (35, 41, 33) and np.ptp(recon.get_fdata()) > 0
    np.testing.assert_allclose(recon.affine, source.affine, atol=1e-6)
