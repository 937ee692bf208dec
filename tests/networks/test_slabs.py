"""In slabs the network computes what it computes whole, and holds little of it at a time."""

from __future__ import annotations

import copy
import json
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
GROUP = {"norm": "group", "norm_num_groups": 4}
NETWORKS = {
    "the bundle's": {},
    "two blocks a level": {"num_res_blocks": [2, 2]},
    "three levels": THREE_LEVELS,
    "no wavelet": {"wavelet": False},
}
# Planes of the latent, and slabs of so many of them: thicker and thinner than the volume, and parting it unevenly.
DEPTHS_AND_SLABS = [(1, 1), (1, 4), (2, 1), (5, 1), (5, 3), (7, 2), (8, 4), (6, 40)]
# What a network needs the whole volume for, as the message names it.
REFUSED = [
    (GROUP, "group normalisation"),
    ({"attention_levels": [False, True]}, "attention"),
    ({"use_convtranspose": True}, "use_convtranspose"),
    ({**GROUP, "with_encoder_nonlocal_attn": True}, "attention and group normalisation"),
]
OUT_OF_RANGE = [
    (0, 5, "'slab' is 0; give a whole number of at least 1"),
    ("8", 5, "'slab' is '8'; give a whole number of at least 1"),
    (4, 2e6, "'whole_voxels' is 2000000.0; give a whole number of at least 0"),
]
SHARE_OF_RANGE = 1e-5  # fp32 through some twenty layers, whose sums run in another order; a wrong plane shows at 1e-2


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
    """Equal to rounding, relative to the range of values."""
    torch.testing.assert_close(own, other, rtol=0, atol=SHARE_OF_RANGE * float(other.max() - other.min()))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("depth", "slab"), DEPTHS_AND_SLABS)
def test_slabs_change_nothing(name: str, depth: int, slab: int) -> None:
    """Posterior, decoded latent and reconstruction of a batch of two."""
    plain = network(**NETWORKS[name])
    slabwise = in_slabs(plain, slab, 0)
    x = image(2, 1, depth * slabwise.stride, 2 * slabwise.stride, 3 * slabwise.stride)
    with torch.no_grad():
        posterior = plain.encode(x)
        for own, other in zip(slabwise.encode(x), posterior, strict=True):
            assert_same(own, other)
        assert_same(slabwise.decode(posterior[0]), plain.decode(posterior[0]))
        assert_same(slabwise(x), plain(x))


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made within and are still alive, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[weakref.ref[torch.Tensor], int, int]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made.append((weakref.ref(tensor), storage._cdata, storage.nbytes()))
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


def test_only_volumes_above_the_size_go_through_in_slabs() -> None:
    """At the size the whole parts are called, and the result is the plain network's to the last bit."""
    slabwise, passes = in_slabs(network(), 1, 8 * 8 * 8), []
    for part in (slabwise.encoder, slabwise.decoder):
        part.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        slabwise(image(1, 1, 12, 8, 8))
        assert not passes
        assert torch.equal(slabwise(image(1, 1, 8, 8, 8)), network()(image(1, 1, 8, 8, 8)))
    assert len(passes) == 2


def test_parameters_are_shared() -> None:
    """The state dict is the network's, and loading into one loads into both."""
    plain = network()
    slabwise = in_slabs(plain, 1, 0)
    state = {name: torch.full_like(value, 0.5) for name, value in plain.state_dict().items()}
    slabwise.load_state_dict(state)
    assert list(slabwise.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_copy_without_onednn_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep copy in contiguous memory, by PyTorch's own convolution, as on a GPU."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    slabwise, x = in_slabs(network(), 2, 0), image(1, 1, 20, 8, 12)
    copied = copy.deepcopy(slabwise).to(memory_format=torch.contiguous_format)
    assert_same(copied(x), network()(x).detach())


def test_autocast_has_no_effect() -> None:
    """float32 to the last bit, without a gradient."""
    slabwise, x = in_slabs(network(), 1, 0), image(1, 1, 16, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = slabwise(x)
    assert not result.requires_grad and torch.equal(result, slabwise(x))


@pytest.mark.parametrize(("changes", "what"), REFUSED)
def test_a_network_that_needs_the_whole_volume_is_refused_above_the_size(changes: dict[str, Any], what: str) -> None:
    """By encode and decode; at the size it computes."""
    slabwise = in_slabs(network(**changes), 2, 8 * 8 * 8)
    message = (
        rf"^12 x 8 x 8 voxels are more than 'whole_voxels' \(512\), and a network with {what} takes no slabs; raise"
    )
    with torch.no_grad():
        assert slabwise(image(1, 1, 8, 8, 8)).shape == (1, 1, 8, 8, 8)
        with pytest.raises(InputError, match=message):
            slabwise.encode(image(1, 1, 12, 8, 8))
        with pytest.raises(InputError, match=message):
            slabwise.decode(torch.zeros(1, 4, 3, 2, 2))


@pytest.mark.parametrize(("slab", "above", "message"), OUT_OF_RANGE)
def test_numbers_that_are_none_are_refused(slab: Any, above: Any, message: str) -> None:
    """Before anything is computed."""
    with pytest.raises(InputError, match=message):
        in_slabs(network(), slab, above)


def test_inference_goes_through_model_space_whole() -> None:
    """Only volumes larger than those of training are parted, among them a scan of 1 mm."""
    config = json.loads((ROOT / "configs" / "inference.json").read_text())
    assert np.prod(config["spatial_size"]) <= config["whole_voxels"] < 182 * 218 * 182


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


def test_the_overlay_keeps_the_scans_grid_and_gives_the_whole_networks_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """native.json on sides that are no multiples of 4, in slabs and whole."""
    monkeypatch.chdir(ROOT)
    scan = write_scan(tmp_path / "scan.nii.gz", seed=3)
    data = np.asarray(nib.load(scan).dataobj)[:-1, 1:-2, 3:]
    nib.save(nib.Nifti1Image(data, nib.load(scan).affine), scan)
    keys = {"weights": str(make_weights(tmp_path / "model.pt", 0)), "network_def#channels": [4, 8], "slab": 2}
    recons = []
    for whole_voxels in (0, 2_000_000):
        output = tmp_path / str(whole_voxels)
        job = ConfigWorkflow(
            config_file=["configs/inference.json", "configs/native.json"], workflow_type="infer",
            dataset_dir=str(scan), output_dir=str(output), device="cpu", whole_voxels=whole_voxels, **keys,
        )  # fmt: skip
        job.initialize()
        job.run()
        recons.append(nib.load(output / "scan_recon.nii.gz"))
    slabwise, whole = recons
    assert slabwise.shape == (35, 41, 33)
    np.testing.assert_allclose(slabwise.affine, nib.load(scan).affine, atol=1e-6)
    spread = np.ptp(whole.get_fdata())
    assert spread > 0
    np.testing.assert_allclose(slabwise.get_fdata(), whole.get_fdata(), atol=SHARE_OF_RANGE * spread)
