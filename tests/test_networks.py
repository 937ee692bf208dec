"""The network: MONAI's weights and results, the calling conventions, folded upsampling, and what loading refuses."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.networks.blocks import UpSample
from monai.networks.nets import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from scripts.networks import (
    BrainVAE,
    FoldedUpsample,
    PositionNorm,
    PositionResBlock,
    haar,
    inverse_haar,
    load_weights,
    read_state_dict,
    start_deterministic,
)
from scripts.run import InputError
from scripts.training import VAELoss

ROOT = Path(__file__).parents[1]


def arguments_of(*names: str) -> dict[str, Any]:
    """The network's arguments in a config with its overlays."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / f"{name}.json") for name in names])
    names = [key for key in parser["network_def"] if key[0] != "_"]
    return {name: parser.get_parsed_content(f"network_def#{name}") for name in names}


DEFAULT = arguments_of("train")
SMALL = {**DEFAULT, "channels": [8, 16]}
LITE_SWITCHED = arguments_of("train", "lite")
LITE = {
    key: value for key, value in LITE_SWITCHED.items() if key not in ("wavelet", "norm")
}  # what MONAI's class takes
TINY = {**LITE, "channels": [8, 8, 16], "norm_num_groups": 4}
MAISI = {
    **LITE,
    "channels": [16, 32, 64],
    "num_res_blocks": [2, 2, 2],
    "attention_levels": [False, False, True],
    "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": True,
    "use_checkpoint": True,
}
SIZE = (1, 1, 12, 16, 8)

# what a file holds, by name; none is a state dict
NOT_WEIGHTS = {
    "page.pt": b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>",
    "pointer.pt": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "empty.pt": b"",
    "dots.pt": b"....",
    "noise.pt": bytes(range(255, 0, -1)),
    "page.safetensors": b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>",
    "empty.safetensors": b"",
}
# what a torch.save file holds
NO_STATE_DICT = [[1, 2], {}, {"model": {}}, {"epoch": 3}, {"model": {"a": 1}}, torch.zeros(2)]


@pytest.fixture(scope="module")
def lite() -> BrainVAE:
    """The network of lite.json with random weights, in eval mode."""
    torch.manual_seed(0)
    return BrainVAE(**LITE_SWITCHED).eval()


@pytest.fixture(scope="module")
def shipped() -> BrainVAE:
    """The network of train.json with random weights, in eval mode."""
    torch.manual_seed(0)
    return BrainVAE(**DEFAULT).eval().to(memory_format=torch.channels_last_3d)


def image(size: tuple[int, ...] = SIZE, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    """Random volumes in [0, 1]."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("overlays", "n_parameters"), [((), 2_728_072), (("lite",), 2_929_057), (("maisi",), 20_944_897)]
)
def test_parameter_count(overlays, n_parameters):
    """As the documentation states."""
    network = BrainVAE(**arguments_of("train", *overlays))
    assert sum(parameter.numel() for parameter in network.parameters()) == n_parameters


@pytest.mark.parametrize("norm", ["batch", "", None, True])
def test_another_norm_is_refused(norm):
    """By its name, with the two that there are."""
    with pytest.raises(InputError, match=f"'norm' is {norm!r}; give group or position"):
        BrainVAE(**{**SMALL, "norm": norm})


@pytest.mark.parametrize("arguments", [LITE, MAISI], ids=["lite", "maisi"])
def test_state_dict_is_monais(arguments):
    """Names, order and shapes of the state dict are those of MONAI's class."""
    ours, theirs = BrainVAE(**arguments).state_dict(), AutoencoderKL(**arguments).state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.parametrize("ours_first", [True, False])
def test_weights_move_both_ways(ours_first):
    """With exchanged weights both classes encode equally to the bit, and decode equally to rounding.

    A folded kernel sums two weights before it multiplies, so sums come in another order: in float64 about 1e-16 a
    sum, 1e-12 after all layers; a wrong fold would show at 1e-1.
    """
    torch.manual_seed(1)
    ours, theirs = BrainVAE(**LITE).eval().double(), AutoencoderKL(**LITE).eval().double()
    source, sink = (ours, theirs) if ours_first else (theirs, ours)
    sink.load_state_dict(source.state_dict(), strict=True)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        (mu, sigma), (mu_monai, sigma_monai) = ours.encode(x), theirs.encode(x)
        assert torch.equal(mu, mu_monai) and torch.equal(sigma, sigma_monai)
        decoded = theirs.decode(mu)
        torch.testing.assert_close(ours.decode(mu), decoded, rtol=0, atol=1e-12 * float(decoded.abs().max()))
        reconstructed = theirs.reconstruct(x)
        torch.testing.assert_close(ours.reconstruct(x), reconstructed, rtol=0, atol=1e-12 * float(decoded.abs().max()))


def test_decode_in_fp32_is_monais(lite):
    """In fp32, as it is used: 6e-8 a sum, about 1e-6 of the largest value after all layers; ten times that passes."""
    theirs = AutoencoderKL(**LITE).eval()
    theirs.load_state_dict(lite.state_dict())
    with torch.no_grad():
        mu, _ = lite.encode(image())
        expected = theirs.decode(mu)
        torch.testing.assert_close(lite.decode(mu), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(*[st.integers(1, 5)] * 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@example(size=(1, 1, 1), channels=(1, 1), bias=True, seed=0)
def test_folded_upsample_is_upsample_and_convolution(size, channels, bias, seed):
    """Forward and all gradients agree in float64 to 1e-12, for odd sides and single voxels too."""
    torch.manual_seed(seed)
    conv = nn.Sequential()
    conv.add_module("conv", nn.Conv3d(*channels, kernel_size=3, padding=1, bias=bias))
    plain = UpSample(
        3, channels[0], channels[0], mode="nontrainable", pre_conv=None, interp_mode="nearest",
        align_corners=None, post_conv=conv,
    ).double()  # fmt: skip
    folded = FoldedUpsample(copy.deepcopy(plain)).double()
    results = []
    for block in (plain, folded):
        x = torch.randn(2, channels[0], *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_()
        y = block(x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, *block.parameters()])])
    assert results[0][0].shape == (2, channels[1], *(2 * side for side in size))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_every_upsampling_is_folded(lite, shipped):
    """All upsamplings are folded, and a transposed convolution is left as it is."""
    assert [sum(isinstance(b, FoldedUpsample) for b in network.modules()) for network in (lite, shipped)] == [2, 1]
    transposed = BrainVAE(**{**TINY, "use_convtranspose": True})
    assert not any(isinstance(block, FoldedUpsample) for block in transposed.modules())


def test_other_upsampling_is_not_folded():
    """Trilinear, another factor, a 1x1x1 convolution, or one before the upsampling is not what the fold computes."""
    three, one = (nn.Sequential() for _ in range(2))
    three.add_module("conv", nn.Conv3d(2, 2, 3, padding=1))
    one.add_module("conv", nn.Conv3d(2, 2, 1))
    for interp_mode, factor, conv, before, expected in [
        ("nearest", 2, three, None, True),
        ("linear", 2, three, None, False),
        ("nearest", 3, three, None, False),
        ("nearest", 2, one, None, False),
        ("nearest", 2, three, nn.Conv3d(2, 2, 1), False),
    ]:
        block = UpSample(
            3, 2, 2, factor, mode="nontrainable", pre_conv=before, interp_mode=interp_mode, align_corners=None,
            post_conv=conv,
        )  # fmt: skip
        assert FoldedUpsample.replaces(block) is expected
    assert not FoldedUpsample.replaces(nn.Conv3d(2, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_haar_is_orthonormal(dtype):
    """It has an inverse, which keeps what it is given, and the squares of all values sum to the same."""
    x = image((2, 3, 4, 6, 2), dtype)
    bands = haar(x)
    assert bands.shape == (2, 24, 2, 3, 1) and bands.dtype == inverse_haar(bands).dtype == dtype
    rounding = 8 * torch.finfo(dtype).eps  # three sums each way
    torch.testing.assert_close(inverse_haar(bands), x, rtol=rounding, atol=rounding)
    torch.testing.assert_close(bands.double().square().sum(), x.double().square().sum(), rtol=rounding, atol=0)


def test_haar_of_a_constant():
    """sqrt(8) times the value in the first band, zero in the seven others."""
    bands = haar(torch.full((1, 2, 4, 4, 4), 3.0, dtype=torch.float64))
    torch.testing.assert_close(bands[:, :2], torch.full((1, 2, 2, 2, 2), 3 * 8**0.5, dtype=torch.float64))
    assert not bands[:, 2:].any()


def test_haar_is_its_formula():
    """Channel a + 2b + 4c of a block of 2 x 2 x 2 is its sum with signs (-1)^(ai + bj + ck), over sqrt(8)."""
    x = image((1, 1, 4, 2, 6), torch.float64)
    bands = haar(x)
    for band in range(8):
        for place in itertools.product(range(2), range(1), range(3)):
            expected = 0.0
            for offset in itertools.product(range(2), repeat=3):
                sign = (-1) ** sum((band >> axis & 1) * offset[axis] for axis in range(3))
                voxel = tuple(2 * p + o for p, o in zip(place, offset, strict=True))
                expected += sign * float(x[(0, 0, *voxel)]) / 8**0.5
            assert float(bands[(0, band, *place)]) == pytest.approx(expected, abs=1e-14)


def plain_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula of `PositionNorm`, in the words of its docstring."""
    scaled = weight.view(1, -1, 1, 1, 1) * x / torch.sqrt((x**2).mean(1, keepdim=True) + eps)
    return scaled * torch.sigmoid(scaled)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [(2, 6, 3, 4, 5), (1, 96, 11, 9, 8), (1, 3, 1, 1, 1)])
def test_position_norm_is_its_formula(size, memory_format):
    """Forward, and the gradients of the input and of the gain, also where there are several chunks."""
    norm = PositionNorm(size[1], 1e-6)
    nn.init.normal_(norm.weight)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    direction = torch.randn(size, generator=torch.Generator().manual_seed(1))
    weight = norm.weight.detach().double().requires_grad_()
    exact = x.detach().double().requires_grad_()
    x.requires_grad_()
    y, z = norm(x), plain_norm(exact, weight, 1e-6)
    results = [
        [y.detach(), *torch.autograd.grad((y * direction).sum(), [x, norm.weight])],
        [z.detach(), *torch.autograd.grad((z * direction).sum(), [exact, weight])],
    ]
    for got, expected in zip(*results, strict=True):
        assert got.dtype == torch.float32
        scale = float(expected.abs().max())  # fp32: the gain's gradient sums up to 800 products
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6 * max(scale, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_position_norm_computes_bf16_in_fp32(memory_format):
    """The result is rounded once: that of fp32, in bf16."""
    norm = PositionNorm(8)
    x = torch.randn(1, 8, 4, 4, 4).bfloat16().contiguous(memory_format=memory_format)
    with torch.no_grad():
        y = norm(x)
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, norm(x.float()).bfloat16(), rtol=2**-7, atol=0)


def test_position_norm_sees_one_voxel():
    """The norm of a crop is the crop of the norm, but for how a processor rounds the last elements of a row."""
    norm = PositionNorm(8)
    x = torch.randn(1, 8, 9, 8, 7).contiguous(memory_format=torch.channels_last_3d)
    crop = (slice(None), slice(None), slice(2, 5), slice(1, 8), slice(3, 4))
    with torch.no_grad():
        cropped = x[crop].contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(norm(cropped), norm(x)[crop], rtol=1e-6, atol=1e-6)


def test_position_norm_is_differentiated_once_only():
    """In chunks a second derivative would be wrong: it is refused."""
    x = torch.randn(1, 4, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(PositionNorm(4)(x).sum(), x, create_graph=True)


def test_a_linear_path_leads_through_the_network():
    """Without what the residual blocks add and without biases, twice the image is twice the latent and the result."""
    network = BrainVAE(**SMALL).eval().double()
    for name, parameter in network.named_parameters():
        if name.endswith("bias") or "conv2" in name:
            nn.init.zeros_(parameter)
    x = image(dtype=torch.float64)
    with torch.no_grad():
        mu = network.encode(x)[0]
        assert mu.abs().max() > 0.01
        torch.testing.assert_close(network.encode(2 * x)[0], 2 * mu)
        torch.testing.assert_close(network.decode(2 * mu), 2 * network.decode(mu))


def test_no_voxel_depends_on_others_beyond_the_reach_of_convolutions(shipped):
    """Far from a change nothing changes: there is no statistic of a whole volume."""
    x = image((1, 1, 96, 8, 8))
    changed = x.clone()
    changed[:, :, :8] += 5
    with torch.no_grad():
        before, after = shipped.encode(x)[0], shipped.encode(changed)[0]
        torch.testing.assert_close(before[:, :, 12:], after[:, :, 12:], rtol=0, atol=0)
        assert not torch.equal(before[:, :, :2], after[:, :, :2])


def test_every_block_is_position_wise(shipped):
    """`norm` leaves no group normalisation, with names that are MONAI's in the residual blocks."""
    assert not any(isinstance(module, nn.GroupNorm) for module in shipped.modules())
    assert sum(isinstance(module, PositionResBlock) for module in shipped.modules()) >= 4
    theirs = set(AutoencoderKL(**{**LITE, "channels": [64, 128], "num_res_blocks": [1, 1],
                                  "attention_levels": [False] * 2}).state_dict())  # fmt: skip
    ours = set(shipped.state_dict())
    assert ours <= theirs and all("norm" in name or name.split(".")[2] in "0123456789" for name in theirs - ours)


@pytest.mark.parametrize("arguments", [DEFAULT, LITE], ids=["default", "lite"])
def test_training_returns_three(arguments):
    """In training mode: a reconstruction from a sample, mu and sigma, of the documented shapes."""
    network = BrainVAE(**arguments).train()
    recon, mu, sigma = network(image())
    assert recon.shape == SIZE
    assert mu.shape == sigma.shape == (1, 4, 3, 4, 2)
    assert not torch.equal(recon, network(image())[0])  # another sample


def test_eval_returns_the_mean_decoded(lite, shipped):
    """In eval mode: one tensor, the posterior mean decoded, the same each time."""
    for network in (lite, shipped):
        with torch.no_grad():
            recon = network(image())
            assert recon.shape == SIZE
            assert torch.equal(recon, network.decode(network.encode(image())[0]))
            assert torch.equal(recon, network(image()))


@pytest.mark.parametrize(("bias", "logvar"), [(100.0, 20.0), (-100.0, -30.0)])
def test_logvar_is_clamped(bias, logvar):
    """sigma comes from a log-variance within [-30, 20]."""
    network = BrainVAE(**TINY).eval()
    nn.init.constant_(network.quant_conv_log_sigma.conv.bias, bias)
    with torch.no_grad():
        sigma = network.encode(image())[1]
    torch.testing.assert_close(2 * sigma.log(), torch.full_like(sigma, logvar))


@pytest.mark.parametrize("arguments", [DEFAULT, LITE], ids=["default", "lite"])
def test_scripted_network_is_equal(arguments, tmp_path):
    """TorchScript keeps encode and decode, survives a file, and computes the same to the bit in contiguous memory."""
    network = BrainVAE(**arguments).eval()
    torch.jit.script(network).save(tmp_path / "model.ts")
    scripted = torch.jit.load(tmp_path / "model.ts")
    x = image()
    with torch.no_grad():
        assert torch.equal(scripted(x), network(x))
        mu, sigma = scripted.encode(x)
        assert torch.equal(mu, network.encode(x)[0]) and torch.equal(sigma, network.encode(x)[1])
        assert torch.equal(scripted.decode(mu), network.decode(mu))


def test_scripted_network_in_training_mode_returns_one_tensor():
    """A network scripted in training mode, as some exporters do, still gives one tensor."""
    for arguments in (TINY, SMALL):
        assert torch.is_tensor(torch.jit.script(BrainVAE(**arguments).train())(image()))


def test_checkpointing_changes_no_gradient():
    """MAISI's blocks with attention: recomputing activations gives the same loss and gradients, bit for bit."""
    networks = []
    for use_checkpoint in (True, False):
        torch.manual_seed(3)
        network = BrainVAE(**{**MAISI, "use_checkpoint": use_checkpoint}).train()
        torch.manual_seed(4)
        loss = VAELoss(perceptual_weight=0)(network(image((1, 1, 8, 8, 8))), image((1, 1, 8, 8, 8)))
        loss.backward()
        networks.append((loss, network))
    (loss, network), (loss_plain, network_plain) = networks
    assert torch.equal(loss, loss_plain)
    for (name, parameter), plain in zip(network.named_parameters(), network_plain.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, plain.grad), name


def test_maisi_variant_trains_a_step():
    """One step of Adam along the gradient lowers the loss of the checkpointed network."""
    torch.manual_seed(5)
    network = start_deterministic(BrainVAE(**MAISI)).train()
    optimizer, loss = torch.optim.Adam(network.parameters(), 1e-4), VAELoss(perceptual_weight=0)
    x = image((1, 1, 8, 8, 8))
    before = loss(network(x), x)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert loss(network(x), x) < before


@pytest.mark.parametrize("form", ["bare", "model", "safetensors"])
def test_weights_are_loaded_from_every_form(lite, tmp_path, form):
    """A bare state dict, one under `model`, and safetensors all fill the network."""
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(lite.state_dict(), path)
    else:
        torch.save(lite.state_dict() if form == "bare" else {"model": lite.state_dict(), "epoch": 3}, path)
    network = BrainVAE(**LITE)
    assert load_weights(network, str(path)) is network
    assert all(torch.equal(value, lite.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_other_files_are_refused(tmp_path, name):
    """A saved error page, a Git LFS pointer, an empty file and noise are named in one sentence."""
    (tmp_path / name).write_bytes(NOT_WEIGHTS[name])
    with pytest.raises(InputError, match=f"{name} is damaged or no weights file"):
        read_state_dict(tmp_path / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=40), pickled=st.booleans())
def test_any_bytes_end_in_one_sentence(tmp_path_factory, content, pickled):
    """Whatever the bytes are, also behind a pickle's first two, the error is an InputError."""
    path = tmp_path_factory.getbasetemp() / "bytes.pt"
    path.write_bytes(b"\x80\x02" * pickled + content)
    with pytest.raises(InputError, match="bytes.pt"):
        read_state_dict(path)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_cut_off_file_is_refused(lite, tmp_path, ending):
    """A download that broke off is named, at whatever place it was cut."""
    path = tmp_path / f"cut{ending}"
    save_file(lite.state_dict(), path) if ending == ".safetensors" else torch.save(lite.state_dict(), path)
    whole = path.read_bytes()
    for share in (0.001, 0.5, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match=f"cut{ending} is damaged"):
            read_state_dict(path)


@pytest.mark.parametrize("missing", ["none.pt", "none.safetensors", "."])
def test_missing_file_is_refused(tmp_path, missing):
    """What is not there, or is a folder, is named with the key to change."""
    with pytest.raises(InputError, match="does not exist.*'weights'"):
        read_state_dict(tmp_path / missing)


@pytest.mark.parametrize("content", NO_STATE_DICT, ids=str)
def test_other_content_is_refused(tmp_path, content):
    """A torch file without a state dict is not taken for one."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt holds no state dict"):
        read_state_dict(tmp_path / "other.pt")


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_executed(tmp_path):
    """A pickle that calls a function is refused without calling it."""
    torch.save({"model": _Bomb(tmp_path / "executed")}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(_Bomb(tmp_path / "executed")))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(InputError, match="is damaged or no weights file"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("post_quant_conv.conv.bias"), "1 missing, 0 unknown, 0 .*post_quant_conv.*missing"),
        (lambda state: state.update(extra=torch.zeros(1)), "0 missing, 1 unknown, 0 .*'extra' is not known"),
        (
            lambda state: state.update({"post_quant_conv.conv.bias": torch.zeros(5)}),
            r"1 of another shape.*\(5,\) there",
        ),
    ],
    ids=["missing", "unknown", "reshaped"],
)
def test_other_architecture_is_refused(tmp_path, change, words):
    """A name too few, one too many or another shape is counted, and the network is left as it was."""
    torch.manual_seed(6)
    state = BrainVAE(**TINY).state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pt")
    network = BrainVAE(**TINY)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=words):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_start_deterministic():
    """sigma is exp(logvar / 2) for every image, mu is not touched."""
    torch.manual_seed(7)
    network = BrainVAE(**TINY).eval()
    mu = network.encode(image())[0]
    assert start_deterministic(network, -6.0) is network
    after, sigma = network.encode(image())
    assert torch.equal(mu, after)
    torch.testing.assert_close(sigma, torch.full_like(sigma, 0.0497870684))


def test_start_deterministic_keeps_learning():
    """The log-variance head starts constant, but its gradient is not zero."""
    network = start_deterministic(BrainVAE(**TINY)).train()
    VAELoss(perceptual_weight=0)(network(image()), image()).backward()
    assert network.quant_conv_log_sigma.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("logvar", [-31.0, 21.0, float("nan")])
def test_start_deterministic_range(logvar):
    """Outside of the clamp's range no gradient would come back."""
    with pytest.raises(ValueError, match="logvar must lie within"):
        start_deterministic(BrainVAE(**TINY), logvar)
