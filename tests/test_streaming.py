"""The streamed network computes what the network computes, without seams, and holds little of it at a time."""

from __future__ import annotations

import copy
import json
import subprocess
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VAE, make_weights, write_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts import group_norm, streaming
from scripts.errors import InputError
from scripts.networks import BrainVAE
from scripts.streaming import ToModelBoxd, stream

Run = Callable[..., subprocess.CompletedProcess[str]]

LITE = {
    k: v for k, v in json.loads((ROOT / "configs" / "inference.json").read_text())["network_def"].items() if k[0] != "_"
}
CHANNELS_LAST = torch.channels_last_3d
# fp32 through some twenty layers, whose sums run in another order; a wrong plane or moment shows at 1e-2.
TOLERANCE = 5e-5


def network(seed: int = 0, **changes: Any) -> BrainVAE:
    """A tiny network with random weights, in eval mode; its norms have weights that are not 1 and 0."""
    torch.manual_seed(seed)
    result = BrainVAE(**{**TINY_VAE, **changes}).eval()
    for module in result.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return result.to(memory_format=CHANNELS_LAST)


def image(*size: int, seed: int = 1) -> torch.Tensor:
    """Random volumes in [0, 1], brighter towards one corner, so that no part is like another."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    return values * torch.linspace(0.2, 1, size[2])[:, None, None] * torch.linspace(1, 0.5, size[3])[:, None]


def in_double(plain: BrainVAE, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction in double precision; in contiguous memory, because channels-last norms compute in float32."""
    with torch.no_grad():
        return copy.deepcopy(plain).double().to(memory_format=torch.contiguous_format)(x.double())


@settings(max_examples=40, deadline=None)
@given(
    quarters=st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    slab=st.integers(1, 40),
    keep_bytes=st.sampled_from([0, 5_000, 30_000, 1e9]),
    blocks=st.sampled_from([[1, 1, 1], [2, 1, 2], [2, 2, 2]]),
)
def test_slabs_and_what_is_held_change_nothing(
    quarters: tuple[int, int, int], slab: int, keep_bytes: float, blocks: list[int]
) -> None:
    """Posterior and reconstruction, for any thickness, size and number of blocks."""
    plain = network(num_res_blocks=blocks)
    streamed = stream(copy.deepcopy(plain), slab, keep_bytes)
    x = image(1, 1, *(4 * side for side in quarters))
    with torch.no_grad():
        for own, other in zip(streamed.encode(x), plain.encode(x), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(streamed(x), plain(x), rtol=0, atol=TOLERANCE)


def test_it_is_as_exact_as_the_plain_network() -> None:
    """Against double precision, the mean error is at most the untiled network's; a tenth more is allowed for luck."""
    plain, x = network(), image(1, 1, 48, 24, 20)
    exact = in_double(plain, x)
    with torch.no_grad():
        own, other = ((net(x) - exact).abs().mean() for net in (stream(copy.deepcopy(plain), 5, 0), plain))
    assert own < 1.1 * other


def seam_ratio(result: torch.Tensor, exact: torch.Tensor, slab: int) -> float:
    """Mean error within two planes of the slabs' borders over that elsewhere."""
    planes = torch.arange(result.shape[2])
    near = torch.minimum(planes % slab, slab - 1 - planes % slab) < 2
    inside = (planes >= 12) & (planes < len(planes) - 12)
    error = (result - exact).abs().mean(dim=(0, 1, 3, 4))
    return float(error[inside & near].mean() / error[inside & ~near].mean())


def test_there_is_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slabs; where each repeats its own last plane for its neighbour's, the same figure shows the seam."""
    plain, x = network(), image(1, 1, 96, 24, 20)
    exact = in_double(plain, x)
    assert seam_ratio(stream(copy.deepcopy(plain), 16, 0)(x), exact, 16) < 1.1
    streamed = stream(copy.deepcopy(plain), 48, 0)
    assert seam_ratio(streamed(x), exact, 48) < 1.1

    def alone(slabs: streaming.Slabs, step: int, before: int) -> streaming.Slabs:
        for slab in slabs:
            yield torch.cat([*[slab[:, :, :1]] * before, slab, slab[:, :, -1:]], dim=2)

    monkeypatch.setattr(streaming, "_overlapping", alone)
    assert seam_ratio(streamed(x), exact, 48) > 1.5


def test_weights_and_calls_stay() -> None:
    """State dict, a batch whose volumes know nothing of each other, MetaTensor, autocast and memory format."""
    plain = network()
    streamed = stream(copy.deepcopy(plain), 3, 0)
    assert list(streamed.state_dict()) == list(plain.state_dict())
    streamed.load_state_dict(plain.state_dict())
    x = torch.cat([image(1, 1, 12, 8, 16, seed=seed) * scale for seed, scale in ((1, 1), (2, 5))])
    with torch.no_grad():
        expected = plain(x)
    meta = streamed(MetaTensor(x, meta={"filename_or_obj": "scan.nii.gz"}))
    assert isinstance(meta, MetaTensor) and meta.meta["filename_or_obj"] == "scan.nii.gz"
    torch.testing.assert_close(meta.as_tensor(), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(streamed.to(memory_format=torch.contiguous_format)(x), expected, rtol=0, atol=TOLERANCE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(streamed.encoder(x), streamed.encoder(x.float()))
        assert streamed.encoder(x).dtype == torch.float32


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


def test_a_volume_of_07_mm_needs_less_than_two_and_a_half_gigabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lite on 256 x 312 x 256 voxels with the defaults, on tensors without values; the plain network needs over 10."""
    monkeypatch.setattr(group_norm, "CHUNK", 2**25)  # fewer steps; they cost time though nothing is computed
    most = []
    with torch.no_grad(), FakeTensorMode():
        plain = BrainVAE(**LITE).eval()
        x = torch.empty(1, 1, 256, 312, 256)
        for build in (lambda: plain, lambda: stream(plain)):
            with Live() as live:
                assert build()(x).shape == x.shape
            most.append(live.most / 1e9)
    assert most[0] > 10
    assert most[1] < 2.5


def test_the_box_is_so_many_millimetres() -> None:
    """Sides are multiples of 4 voxels, whatever a voxel's size; the way back is exact inside the box."""
    values = torch.zeros(1, 50, 40, 30)
    values[:, 8:20, 6:30, 4:25] = torch.rand(12, 24, 21) + 1
    image = MetaTensor(values, affine=torch.diag(torch.tensor([1.0, 2.0, 3.3, 1.0])))
    step = ToModelBoxd("image", [24.0, 60.0, 90.0])
    boxed = step({"image": image})
    assert boxed["image"].shape == (1, 24, 32, 28)
    assert torch.equal(step.inverse(boxed)["image"].as_tensor(), values)


def test_a_box_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="'box_mm' is .*; give three positive numbers"):
        ToModelBoxd("image", [168, 0, 168])


@pytest.mark.parametrize(
    ("changes", "slab", "message"),
    [
        ({"attention_levels": [False, False, True]}, 4, "attention looks at the whole volume"),
        ({"with_decoder_nonlocal_attn": True}, 4, "attention looks at the whole volume"),
        ({"use_convtranspose": True}, 4, "UpSample of the network cannot be computed slab by slab"),
        ({"spatial_dims": 2}, 4, "cannot be computed slab by slab"),
        ({}, 0, "'slab' is 0; give a positive whole number"),
        ({}, "8", "'slab' is '8'; give a positive whole number"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes: dict[str, Any], slab: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        stream(BrainVAE(**{**TINY_VAE, **changes}), slab)


def test_the_overlay_keeps_the_scans_grid_and_gives_the_plain_networks_result(run_bundle: Run, tmp_path: Path) -> None:
    """The whole job on sides that are no multiples of 4, against the same job with the plain network."""
    scan = write_scan(tmp_path / "scan.nii.gz", seed=3)
    data = np.asarray(nib.load(scan).dataobj)[:-1, 1:-2, 3:]
    nib.save(nib.Nifti1Image(data, nib.load(scan).affine), scan)
    overlay = tmp_path / "plain.json"
    overlay.write_text(json.dumps({"network": "$load_weights(@network_def, @weights)"}))
    files = [str(ROOT / "configs" / f"{name}.json") for name in ("inference", "native")]
    recons = []
    for name, configs in (("streamed", files), ("plain", [*files, str(overlay)])):
        run_bundle(
            "--config_file", str(configs), "--dataset_dir", str(scan), "--output_dir", str(tmp_path / name),
            "--weights", str(make_weights(tmp_path / "model.pt", 0)), "--device", "cpu",
            "--network_def#channels", "[4, 8, 8]", "--network_def#norm_num_groups", "4",
        )  # fmt: skip
        recons.append(nib.load(tmp_path / name / "scan_recon.nii.gz"))
    source, streamed, plain = nib.load(scan), *recons
    assert streamed.shape == source.shape == (35, 41, 33)
    np.testing.assert_allclose(streamed.affine, source.affine, atol=1e-6)
    factor = np.percentile(np.asarray(source.dataobj), 99.5)
    assert np.ptp(streamed.get_fdata()) > 0.01 * factor
    np.testing.assert_allclose(streamed.get_fdata(), plain.get_fdata(), atol=TOLERANCE * factor)
