"""What is refused before anything is built."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from scripts.run import (
    InputError,
    begin,
    check_count,
    check_crop,
    check_device,
    check_size,
    check_spacing,
    read_keys,
    refuse_unknown_keys,
)

TRAIN = ["run", "--config_file", "configs/train.json"]
MAISI = ["run", "--config_file", "['configs/train.json','configs/maisi.json']"]
KNOWN = {
    "a setting": [*TRAIN, "--epochs", "3"],
    "nested, with =": ["run", "training", "--config_file=configs/train.json", "--train#trainer#max_epochs=3"],
    "nested, with ::": [*TRAIN, "--train::trainer::max_epochs", "3"],
    "of an overlay, and MONAI's own": [*MAISI, "--nonlocal_attention", "True", "--meta_file", "configs/metadata.json"],
    "of MLflow": [*TRAIN, "--tracking", "mlflow", "--experiment_name", "study"],
    "of our tracking": [*TRAIN, "--tracking", "configs/tracking.json", "--run_name", "first"],
    "a block in place of a block": [*TRAIN, "--perceptual", "{'_target_': 'torch.nn.MSELoss'}"],
    "a reference in place of a block": [*TRAIN, "--ema_network", "@network_def"],
    "another tool": ["verify_net_in_out", "--config_file", "configs/train.json", "--nonsense", "1"],
    "no arguments": [],
}
UNKNOWN = {
    "misspelt": ([*TRAIN, "--epoch", "3"], "no key 'epoch'; did you mean --epochs?"),
    "of an overlay that is not given": ([*TRAIN, "--nonlocal_attention", "True"], "no key 'nonlocal_attention'"),
    "nested": ([*TRAIN, "--train#trainer#max_epoch=3"], "no key 'train#trainer#max_epoch'"),
    "a block": (
        ["run", "--config_file", "configs/inference.json", "--dataset", "scans"],
        "'dataset' on the command line is a block of the config, no setting; did you mean --dataset_dir?",
    ),
}
OWN = {  # a config file of the user's own, after train.json, and what is said of it
    "a setting": ({"epochs": 3, "train#trainer#max_epochs": 2}, ""),
    "a key that is named": ({"side": 64, "twice": "$2 * @side", "crop_size": "@twice"}, ""),
    "a block, more steps, imports": (
        {"perceptual": {"_target_": "torch.nn.MSELoss"}, "+initialize": ["$print(1)"], "imports": ["$import math"]},
        "",
    ),
    "misspelt": ({"epoch": 3}, "own.json has the key 'epoch', which nothing reads; did you mean --epochs?"),
    "the beginning of a key that is named": ({"sid": 1, "side": 64, "crop_size": "@side"}, "has the key 'sid'"),
    "nested": ({"train#trainer#max_epoch": 2}, "has the key 'train#trainer#max_epoch'"),
    "a plain value for a block": ({"network": "model.pt"}, "'network' on .*own.json is a block of the config"),
}  # fmt: skip
SIZE = [112, 136, 112]
GOOD: list[tuple[Callable[..., None], list[Any]]] = [
    (check_device, ["cpu"]),
    *((check_size, [size, "size"]) for size in (SIZE, [4, 4, 4], [600, 600, 600])),
    *((check_crop, [side, SIZE]) for side in (0, 4, 64, 112)),
    *((check_spacing, [spacing]) for spacing in (0.3, 1, 4.0)),
    *((check_count, [count, "num_workers"]) for count in (0, 8)),
]
BAD: list[tuple[Callable[..., None], list[Any], str]] = [
    *((check_device, [device], "'device' is .*; try --device cpu") for device in ("cuda:99", "meta", "gpu", 7)),
    *(
        (check_size, [size, "size"], "'size' is ")
        for size in ([30, 32, 32], [32, 32], [0, 32, 32], [-4, 32, 32], [32.0, 32, 32], 32, [600, 600, 604])
    ),
    *(
        (check_crop, [side, SIZE], r"'crop_size' is .* smallest side of 'spatial_size' \(112\)")
        for side in (30, 116, -4, 64.0, None, True)
    ),
    *((check_spacing, [spacing], "'spacing' is .*0.3 to 4") for spacing in (0.29, 4.1, -1.5, "1.5", True)),
    *((check_count, [count, "num_workers"], "'num_workers' is .*0 or more") for count in (-1, 2.0, "2", True)),
]


@pytest.mark.parametrize("case", KNOWN)
def test_known_keys_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the config, of overlays, of tracking, nested ids, MONAI's own arguments, and other tools."""
    monkeypatch.chdir(ROOT)
    refuse_unknown_keys(["-m", *KNOWN[case]])


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_key_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the nearest setting that exists."""
    monkeypatch.chdir(ROOT)
    words, message = UNKNOWN[case]
    with pytest.raises(InputError, match=re.escape(message)):
        refuse_unknown_keys(["-m", *words])


@pytest.mark.parametrize("case", OWN)
def test_a_file_of_the_users_own(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new key in it must be named by another value, and a block stays a block."""
    monkeypatch.chdir(ROOT)
    content, message = OWN[case]
    (tmp_path / "own.json").write_text(json.dumps(content))
    argv = ["-m", "run", "--config_file", str(["configs/train.json", str(tmp_path / "own.json")])]
    if not message:
        refuse_unknown_keys(argv)
        return
    with pytest.raises(InputError, match=message):
        refuse_unknown_keys(argv)


def test_keys_are_read_as_fire_does(tmp_path: Path) -> None:
    """Literals, texts, switches without a value, and those of an args_file, which the command line overrides."""
    (tmp_path / "args.json").write_text('{"epochs": 1, "seed": 5}')
    words = ["--epochs", "3", "--size=[4, 8]", "--label", "age", "--resume", "--args_file", str(tmp_path / "args.json")]
    keys = read_keys(["-m", "run", *words])
    assert keys | {"args_file": ""} == {
        "epochs": 3, "seed": 5, "size": [4, 8], "label": "age", "resume": True, "args_file": "",
    }  # fmt: skip
    assert read_keys(["-m", "download", *words]) == {}


@pytest.mark.parametrize(("check", "values"), GOOD)
def test_a_setting_within_its_range_passes(check: Callable[..., None], values: list[Any]) -> None:
    """The ends of each range among them."""
    check(*values)


@pytest.mark.parametrize(("check", "values", "message"), BAD)
def test_a_setting_out_of_its_range_is_refused(check: Callable[..., None], values: list[Any], message: str) -> None:
    """With the key and what it may be."""
    with pytest.raises(InputError, match=message):
        check(*values)


@pytest.mark.parametrize(("place", "value"), [(0, "cuda:99"), (1, 9.0), (2, [30, 32, 32]), (3, -1)])
def test_a_job_begins_with_every_check(place: int, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, spacing, size, workers, and the keys of the command line."""
    monkeypatch.setattr("scripts.run.checks.report_input_errors", lambda: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["-m", *TRAIN])
    settings: list[Any] = ["cpu", 1.5, SIZE, 0]
    begin(*settings)
    with pytest.raises(InputError):
        begin(*settings[:place], value, *settings[place + 1 :])
    monkeypatch.setattr(sys, "argv", ["-m", *TRAIN, "--epoch", "3"])
    with pytest.raises(InputError, match="epoch"):
        begin(*settings)
