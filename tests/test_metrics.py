"""Figures of a reconstruction: their definitions, their summary, their table, their life inside MONAI's handlers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine
from monai.metrics import MAEMetric, PSNRMetric, SSIMMetric
from torch.distributions import Normal, kl_divergence

from scripts.latents import ActiveUnits
from scripts.metrics import VolumeMetric, format_table, reconstruction_metrics, summarise
from scripts.networks.posterior import kl_per_value

SIZE = (12, 14, 13)  # SSIM's window is 11
VOLUME_COLUMNS = ["l1", "psnr", "psnr_brain", "ssim"]
# float32 sums over some thousand values against MONAI's in the same precision.
CLOSE = 1e-5
NAN, INF = math.nan, math.inf

# column, values of volumes a, b, c ... -> mean, sd, worst, worst's name, number of exact ones
SUMMARIES = [
    ("l1", [0.1, 0.3, 0.2], 0.2, 0.1, 0.3, "b", None),
    ("psnr", [30.0, 34.0, 32.0], 32.0, 2.0, 30.0, "a", None),
    ("psnr", [30.0, INF, 32.0], 31.0, math.sqrt(2), 30.0, "a", 1),
    ("psnr", [INF, INF], None, None, None, "a", 2),
    ("psnr_brain", [30.0, NAN, 20.0], None, None, None, "b", None),
    ("ssim", [0.9], 0.9, None, 0.9, "a", None),
    ("lpips", [0.1, INF], None, None, None, "b", None),
    ("kl", [1.0, 3.0], 2.0, math.sqrt(2), 3.0, "b", None),
]


def scan_and_reconstruction(seed: int = 0, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A scan with an empty half and its reconstruction, both also outside [0, 1]: (B, 1, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, 1, *SIZE, generator=generator) * 1.3
    x[..., : SIZE[2] // 2] = 0
    return x, x + 0.2 * torch.randn(x.shape, generator=generator)


def rows_of(column: str, values: list[float]) -> list[dict]:
    """Rows of volumes a, b, c ... with one column."""
    return [{"name": "abc"[i], "subject": "s", column: value} for i, value in enumerate(values)]


def test_columns_are_monais_metrics_of_the_clamped_volumes():
    """L1, PSNR and SSIM agree with MONAI's, given both volumes clamped to [0, 1]."""
    x, y = scan_and_reconstruction()
    row = reconstruction_metrics(x, y)
    a, b = x.clamp(0, 1), y.clamp(0, 1)
    assert row["l1"] == pytest.approx(float(MAEMetric()(b, a)), abs=CLOSE)
    assert row["psnr"] == pytest.approx(float(PSNRMetric(max_val=1.0)(b, a)), abs=1e-4)  # dB
    assert row["ssim"] == pytest.approx(float(SSIMMetric(spatial_dims=3, data_range=1.0)(b, a)), abs=CLOSE)


def test_psnr_brain_looks_at_the_scans_foreground_alone():
    """What the reconstruction adds in the background does not count, and 0.05 itself is background."""
    x = torch.zeros(SIZE)
    x[6:] = 0.5
    x[0] = 0.05
    y = x + 0.1
    assert reconstruction_metrics(x, y)["psnr_brain"] == pytest.approx(20.0, abs=1e-4)  # MSE 0.01
    y[:6] = 1.0
    assert reconstruction_metrics(x, y)["psnr_brain"] == pytest.approx(20.0, abs=1e-4)


def test_equal_volumes_are_exact():
    """A perfect reconstruction, or one that differs above 1 only, has PSNR inf, L1 0, SSIM 1."""
    x = scan_and_reconstruction()[0]
    y = torch.where(x > 1, x + 1, x)
    row = reconstruction_metrics(x, y)
    assert (row["psnr"], row["psnr_brain"], row["l1"]) == (INF, INF, 0.0)
    assert row["ssim"] == pytest.approx(1.0, abs=CLOSE)


def test_bare_volumes_give_the_same_row():
    """(D, H, W), a MetaTensor and (1, 1, D, H, W) are the same volume."""
    x, y = scan_and_reconstruction()
    assert reconstruction_metrics(x[0, 0], y[0, 0]) == reconstruction_metrics(MetaTensor(x), MetaTensor(y))


def test_lpips_gets_the_clamped_reconstruction_and_scan():
    """The callable is given y, then x, as (1, 1, D, H, W) in [0, 1]; without one there is no column."""
    x, y = scan_and_reconstruction()
    seen = []

    def lpips(reconstruction: torch.Tensor, scan: torch.Tensor) -> torch.Tensor:
        seen.extend([reconstruction, scan])
        return torch.tensor([0.25])

    assert reconstruction_metrics(x[0, 0], y[0, 0], lpips)["lpips"] == 0.25
    torch.testing.assert_close(seen, [y.clamp(0, 1), x.clamp(0, 1)], rtol=0, atol=0)
    assert "lpips" not in reconstruction_metrics(x, y)


@pytest.mark.parametrize("shape", [(2, 1, *SIZE), (1, *SIZE), (8, 14, 13)], ids=["batch", "channel", "small"])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]):
    """One volume a row, and SSIM's window has to fit."""
    with pytest.raises(ValueError, match="must be|needs sides"):
        reconstruction_metrics(torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ValueError, match="same shape"):
        reconstruction_metrics(torch.zeros(SIZE), torch.zeros(shape))


def test_metrics_are_float32_under_autocast():
    """Autocast's bfloat16, whose steps near 1 are 0.008, would show in SSIM."""
    x, y = scan_and_reconstruction()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = reconstruction_metrics(x, y)
    assert row == pytest.approx(reconstruction_metrics(x, y), abs=CLOSE)


def test_kl_is_that_of_torchs_distributions():
    """Mean over values, one figure a sample, also where sigma is nearly 1 and the terms cancel."""
    mu = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    logvar = torch.stack([torch.linspace(-8, 2, mu[0].numel()).reshape(mu[0].shape), torch.full(mu[0].shape, 1e-4)])
    sigma = (0.5 * logvar.double()).exp()
    expected = kl_divergence(Normal(mu.double(), sigma), Normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl_per_value(mu, logvar).double(), expected, rtol=1e-5, atol=0)


def test_kl_bears_half_precision_and_extreme_logvar():
    """exp(20) is finite in float32 and not in float16; beyond 20 the clamp holds."""
    mu, logvar = torch.zeros(1, 4, 2, 2, 2).half(), torch.full((1, 4, 2, 2, 2), 40.0).half()
    kl = kl_per_value(mu, logvar)
    assert kl.dtype == torch.float32
    assert float(kl) == pytest.approx(0.5 * (math.exp(20) - 21), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 11), max_size=4, unique=True),
    offset=st.floats(-1e3, 1e3),
    seed=st.integers(0, 9),
)
def test_active_units_do_not_depend_on_batches(cuts: list[int], offset: float, seed: int):
    """Any cut into batches, and merging two halves, gives the variance of the whole set."""
    mu = torch.randn(12, 2, 3, 3, 3, generator=torch.Generator().manual_seed(seed)).double() * 0.1 + offset
    expected = float((mu.var(0) > 0.01).double().mean())
    units, other = ActiveUnits(), ActiveUnits()
    for number, batch in enumerate(mu.tensor_split(sorted(cuts))):
        (other if number % 2 else units).update(batch)
    units.merge(other)
    assert units.n == 12
    assert units.share(0.01) == expected


def test_active_units_counts_what_varies():
    """One of two channels varies by more than the threshold; one volume alone says nothing."""
    units = ActiveUnits()
    units.update(torch.tensor([[0.0, 0.0]]).reshape(1, 2, 1, 1, 1))
    assert math.isnan(units.share())
    units.update(torch.tensor([[0.3, 0.1]]).reshape(1, 2, 1, 1, 1))  # variances 0.045 and 0.005
    assert units.share() == 0.5
    with pytest.raises(ValueError, match="cannot be compared"):
        units.update(torch.zeros(1, 2, 2, 1, 1))


@pytest.mark.parametrize(("column", "values", "mean", "sd", "worst", "name", "n_exact"), SUMMARIES)
def test_summary(column, values, mean, sd, worst, name, n_exact):
    """Mean, sd and worst by column; exact volumes are counted, failed ones spoil the mean; JSON takes it."""
    summary = summarise(rows_of(column, values))
    assert list(summary) == [column]
    figures = json.loads(json.dumps(summary, allow_nan=False))[column]
    assert figures["n"] == len(values)
    assert figures["mean"] == (mean if mean is None else pytest.approx(mean))
    assert figures["sd"] == (sd if sd is None else pytest.approx(sd))
    assert figures["worst"] == worst
    assert figures["worst_name"] == name
    assert figures.get("n_exact") == n_exact


def test_summary_refuses_incomplete_rows():
    """No rows, a column in some rows only, and a name that stands twice are errors of the caller."""
    with pytest.raises(ValueError, match="empty"):
        summarise([])
    with pytest.raises(ValueError, match="'l1'"):
        summarise([*rows_of("l1", [0.1, 0.2]), {"name": "c"}])
    with pytest.raises(ValueError, match="'l1'"):
        summarise(rows_of("l1", [0.1]) * 2)


def test_table_says_where_it_comes_from_and_names_the_worst():
    """Split, n, weights, command; a line a system, in the order given; the model's worst volumes; exact ones."""
    rows = [{"name": f"sub-0{i}", "l1": 0.01 * i, "psnr": 30.0 + i, "kl": 2.0} for i in (1, 2, 3)]
    exact = [{"name": f"sub-0{i}", "l1": 0.0, "psnr": INF if i > 1 else 90.0} for i in (1, 2, 3)]
    summaries = {"model": summarise(rows, active_units=0.75), "identity": summarise(exact)}
    text = format_table(summaries, split="test", weights_sha256="ab12", command="python -m monai.bundle run")
    lines = text.splitlines()
    assert lines[:3] == [
        "split: test   n: 3 volumes, mean ± sd over volumes",
        "weights: sha256 ab12",
        "command: python -m monai.bundle run",
    ]
    assert lines[4].split() == ["system", "n", "l1", "psnr", "kl", "active_units"]
    assert lines[5].split()[:5] == ["model", "3", "0.0200", "±", "0.0100"]
    assert lines[5].endswith("0.7500")
    assert lines[6].split() == ["identity", "3", "0.0000", "±", "0.0000", "90.00", "-", "-"]
    assert [lines[i].index("0.0") for i in (5, 6)] == [lines[4].index("l1")] * 2
    assert lines[8] == "worst volume of 'model'"
    assert [line.split() for line in lines[9:12]] == [
        ["l1", "0.0300", "sub-03"],
        ["psnr", "31.00", "sub-01"],
        ["kl", "2.0000", "sub-01"],
    ]
    assert lines[12] == "psnr of 'identity': 2 of 3 volumes are exact (inf) and not in mean ± sd"
    with pytest.raises(ValueError, match="'modle'"):
        format_table(summaries, split="test", weights_sha256="", command="", model="modle")


@pytest.mark.parametrize("column", VOLUME_COLUMNS)
def test_volume_metric_is_the_row_averaged(column: str):
    """A batch and a list of decollated volumes give each volume's own figure; aggregate is their mean."""
    x, y = scan_and_reconstruction(batch=3)
    metric = VolumeMetric(column)
    values = torch.cat([metric(y_pred=y[:1], y=x[:1]), metric(y_pred=list(y[1:]), y=list(x[1:]))])
    expected = [reconstruction_metrics(a[None], b[None])[column] for a, b in zip(x, y, strict=True)]
    assert values.shape == (3, 1)
    assert values.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert float(metric.aggregate()) == pytest.approx(sum(expected) / 3, rel=1e-5)
    metric.reset()
    with pytest.raises(ValueError, match="no volumes"):
        metric.aggregate()


def test_volume_metric_refuses_other_columns():
    """lpips needs a network and kl a posterior: neither can be made from scan and reconstruction alone."""
    with pytest.raises(ValueError, match="'lpips'"):
        VolumeMetric("lpips")


def test_volume_metric_in_monais_evaluator():
    """As the configs use it: key metric of an evaluator whose engine decollates, scan and reconstruction in order."""
    x = scan_and_reconstruction(batch=3)[0]
    shift = torch.nn.Identity()
    shift.forward = lambda image: image * 0.8  # type: ignore[method-assign]
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([{"image": MetaTensor(volume)} for volume in x]), batch_size=2),
        network=shift,
        prepare_batch=lambda batch, *_, **__: (batch["image"], None),
        key_val_metric={
            "psnr_brain": IgniteMetricHandler(
                metric_fn=VolumeMetric("psnr_brain"), output_transform=from_engine(["pred", "image"])
            )
        },
    )
    evaluator.run()
    expected = [reconstruction_metrics(volume[None], 0.8 * volume[None])["psnr_brain"] for volume in x]
    assert evaluator.state.metrics["psnr_brain"] == pytest.approx(sum(expected) / 3, rel=1e-5)
