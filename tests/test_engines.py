"""What MONAI's engines are given: the batch as input and target, bf16, and evaluation that keeps the posterior."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from scripts.networks import AutocastInferer, BrainVAE, posterior_iteration, prepare_batch
from scripts.run import InputError
from scripts.training import VAELoss

CPU = torch.device("cpu")


def network() -> BrainVAE:
    """A tiny VAE."""
    torch.manual_seed(0)
    return BrainVAE(3, 1, 1, channels=(4, 4, 8), num_res_blocks=(1, 1, 1), attention_levels=(False, False, False),
                    latent_channels=4, norm_num_groups=2, with_encoder_nonlocal_attn=False,
                    with_decoder_nonlocal_attn=False)  # fmt: skip


def loader(n: int = 3, batch_size: int = 2) -> DataLoader:
    """Batches of random volumes (B, 1, 8, 8, 8) with their names."""
    generator = torch.Generator().manual_seed(1)
    records = [{"image": torch.rand(1, 8, 8, 8, generator=generator), "name": f"scan{index}"} for index in range(n)]
    return DataLoader(Dataset(records), batch_size=batch_size)


def test_prepare_batch_gives_the_image_twice():
    """Input and target are one tensor, and nothing else of the batch is asked for."""
    image = torch.rand(1, 1, 2, 2, 2)
    source, target = prepare_batch({"image": image, "name": ["scan"]}, CPU)
    assert source is target
    assert torch.equal(source, image)


@pytest.mark.parametrize(
    ("amp", "expected"),
    [(True, torch.bfloat16), ("true", torch.bfloat16), (1, torch.bfloat16), (False, torch.float32),
     ("False", torch.float32), ("no", torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", CPU])
def test_autocast_on_and_off(amp, expected, device):
    """The CPU has bf16; a switch given as text means what it says."""
    inferer, convolution, types = AutocastInferer(amp, device), nn.Conv3d(1, 1, 3), []
    convolution.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    inferer(torch.rand(1, 1, 4, 4, 4), convolution)
    assert types == [expected]
    assert not torch.is_autocast_enabled("cpu")
    with inferer.autocast():
        assert torch.is_autocast_enabled("cpu") is (expected == torch.bfloat16)


def test_amp_that_is_no_switch_is_refused():
    """A mistyped switch is named by its key."""
    with pytest.raises(InputError, match="'amp' is 'maybe'"):
        AutocastInferer("maybe", "cpu")


@pytest.mark.parametrize("has_bf16", [True, False])
def test_old_card_runs_in_fp32(monkeypatch, has_bf16):
    """A CUDA card counts as having bf16 only where it does not emulate it."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: asked.append(kwargs) or has_bf16)
    assert AutocastInferer(True, "cuda:0").amp is has_bf16
    assert asked == [{"including_emulation": False}]


def test_training_under_autocast_keeps_fp32_gradients():
    """The trainer unpacks the three outputs; under bf16 the loss and the gradients are fp32 and finite."""
    vae = network().train()
    loss = VAELoss(perceptual_weight=0)
    trainer = SupervisedTrainer(
        CPU, 1, loader(), vae, torch.optim.SGD(vae.parameters(), 1e-3), loss,
        prepare_batch=prepare_batch, inferer=AutocastInferer(True, CPU), decollate=False,
    )  # fmt: skip
    trainer.run()
    assert trainer.state.output["loss"].dtype == torch.float32
    assert set(loss.parts) == {"loss", "l1", "kl"}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in vae.parameters())


def evaluate(vae: nn.Module, amp: bool) -> tuple[list[dict[str, torch.Tensor]], list[str]]:
    """Run an evaluator with `posterior_iteration`; returns decollated outputs and the events fired."""
    outputs: list[dict[str, torch.Tensor]] = []
    events: list[str] = []
    evaluator = SupervisedEvaluator(
        CPU, loader(), vae, prepare_batch=prepare_batch, iteration_update=posterior_iteration,
        inferer=AutocastInferer(amp, CPU), postprocessing=lambda data: {**data, "seen": data["name"]},
    )  # fmt: skip
    for event in (IterationEvents.FORWARD_COMPLETED, IterationEvents.MODEL_COMPLETED):
        evaluator.add_event_handler(event, lambda engine, event=event: events.append(event.value))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: outputs.extend(engine.state.output))
    evaluator.run()
    return outputs, events


def test_posterior_is_kept():
    """Each output holds the image, its mean's reconstruction, mu and logvar, per volume after MONAI's decollation;
    the network runs in eval mode and without gradients."""
    vae, states = network().train(), []
    vae.decoder.register_forward_hook(
        lambda module, inputs, output: states.append((module.training, torch.is_grad_enabled()))
    )
    outputs, events = evaluate(vae, amp=False)
    assert vae.training  # the mode is put back
    assert states == [(False, False)] * 2
    assert events == ["forward_completed", "model_completed"] * 2
    assert [output["seen"] for output in outputs] == ["scan0", "scan1", "scan2"]
    vae.eval()
    for output, record in zip(outputs, loader().dataset, strict=True):
        with torch.no_grad():
            mu, sigma = vae.encode(record["image"][None])
            expected = {"image": record["image"], "pred": vae.decode(mu)[0], "mu": mu[0], "logvar": 2 * sigma[0].log()}
        for key, value in expected.items():
            assert output[key].dtype == torch.float32 and not output[key].requires_grad
            torch.testing.assert_close(output[key], value, rtol=1e-4, atol=1e-5)  # batches of 2 and 1: rounding


def test_posterior_under_autocast():
    """With bf16 everything comes back in fp32 and differs by bf16's 8 bits only (measured 0.01 of the spread)."""
    vae = network().eval()
    (plain, *_), _ = evaluate(vae, amp=False)
    (half, *_), _ = evaluate(vae, amp=True)
    for key in ("pred", "mu", "logvar"):
        assert half[key].dtype == torch.float32
        assert not torch.equal(half[key], plain[key])
        assert (half[key] - plain[key]).abs().max() < 0.1 * plain[key].std()


@pytest.mark.parametrize("logvar", [-30.0, 20.0])
def test_logvar_at_the_clamps_ends(logvar):
    """sigma of exp(-15) and exp(10) gives back its log-variance, in bf16 too."""
    latent = torch.zeros(1, 4, 2, 2, 2)
    fake = SimpleNamespace(
        encode=lambda x: (latent, torch.full_like(latent, logvar / 2).exp()), decode=lambda z: torch.ones(1, 1, 8, 8, 8)
    )
    vae = network()
    vae.encode, vae.decode = fake.encode, fake.decode  # type: ignore[method-assign]
    for amp in (False, True):
        outputs, _ = evaluate(vae, amp)
        torch.testing.assert_close(outputs[0]["logvar"], torch.full((4, 2, 2, 2), logvar))
