"""What MONAI's engines are given: networks in place, the batch as input and target, bf16, and the posterior kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import TINY_VAE, make_weights
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from scripts.networks import (
    AutocastInferer,
    BrainVAE,
    encode_iteration,
    posterior_iteration,
    prepare_batch,
    trained,
)

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
SWITCHES = [(True, BF16), ("true", BF16), ("False", FP32)]
Outputs = list[dict[str, torch.Tensor]]


def network() -> BrainVAE:
    """A tiny VAE."""
    torch.manual_seed(0)
    return BrainVAE(**TINY_VAE)


def loader() -> DataLoader:
    """Batches of two of three random volumes."""
    generator = torch.Generator().manual_seed(1)
    return DataLoader(Dataset([{"image": torch.rand(1, 8, 8, 8, generator=generator)} for _ in range(3)]), batch_size=2)


@pytest.mark.parametrize(("channels_last", "format"), [(True, torch.channels_last_3d), ("no", torch.contiguous_format)])
def test_a_trained_network_is_placed_and_filled(tmp_path, channels_last: bool | str, format: torch.memory_format):
    """With its weights, in the memory format that was asked for, and ready for slabs."""
    weights = make_weights(tmp_path / "model.pt", 3)
    ready = trained(network(), str(weights), CPU, channels_last, 3, 512)
    assert (ready.slab, ready.above) == (3, 512)
    expected = torch.load(weights, weights_only=True)
    assert all(torch.equal(value, expected[name]) for name, value in ready.state_dict().items())
    assert all(weight.is_contiguous(memory_format=format) for weight in ready.parameters() if weight.ndim == 5)


@pytest.mark.parametrize(("amp", "expected"), SWITCHES)
def test_autocast_on_and_off(amp: Any, expected: torch.dtype):
    """The CPU has bf16, whose result comes back in fp32; a switch given as text means what it says."""
    inferer, convolution, types = AutocastInferer(amp, "cpu"), nn.Conv3d(1, 1, 3), []
    convolution.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    assert inferer(torch.rand(1, 1, 4, 4, 4), convolution).dtype == FP32
    assert types == [expected] and not torch.is_autocast_enabled("cpu")


def test_old_card_runs_in_fp32(monkeypatch: pytest.MonkeyPatch):
    """A CUDA card counts as having bf16 only where it does not emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert AutocastInferer(True, "cuda:0").amp is False


def evaluate(vae: nn.Module, iteration: Callable, data: DataLoader) -> Outputs:
    """Run an evaluator; returns decollated outputs."""
    outputs: Outputs = []
    evaluator = SupervisedEvaluator(
        CPU, data, vae, prepare_batch=prepare_batch, iteration_update=iteration, inferer=AutocastInferer(False, CPU)
    )
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output))
    evaluator.run()
    return outputs


@pytest.mark.parametrize("iteration", [posterior_iteration, encode_iteration])
def test_posterior_is_kept(iteration: Callable):
    """Each volume's output holds image, mu, logvar and, if asked for, the mean's reconstruction; in eval mode."""
    vae, states = network().train(), []
    vae.quant_conv_mu.register_forward_hook(
        lambda module, inputs, output: states.append((module.training, torch.is_grad_enabled()))
    )
    outputs = evaluate(vae, iteration, loader())
    assert vae.training and states == [(False, False)] * 2  # the mode is put back
    vae.eval()
    for output, record in zip(outputs, loader().dataset, strict=True):
        with torch.no_grad():
            mu, sigma = vae.encode(record["image"][None])
            expected = {"image": record["image"], "mu": mu[0], "logvar": 2 * sigma[0].log()}
            expected |= {"pred": vae.decode(mu)[0]} if iteration is posterior_iteration else {}
        assert expected.keys() == output.keys() & {"image", "mu", "logvar", "pred"}
        for key, value in expected.items():
            assert output[key].dtype == FP32 and not output[key].requires_grad
            torch.testing.assert_close(output[key], value, rtol=1e-4, atol=1e-5)  # batches of 2 and 1: rounding
