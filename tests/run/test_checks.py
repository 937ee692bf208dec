"""What is refused before anything is built."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
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
KEYS: dict[str, tuple[Any, str]] = {  # a command line, or a file of the user's own after train.json; what is said
    "nested, with ::": (["run", "training", "--config_file=configs/train.json", "--train::trainer::max_epochs=3"], ""),
    "of an overlay, and MONAI's own": (
        [*MAISI, "--nonlocal_attention", "True", "--meta_file", "configs/metadata.json"], "",
    ),
    "of MLflow": ([*TRAIN, "--tracking", "mlflow", "--experiment_name", "study"], ""),
    "of our tracking": ([*TRAIN, "--tracking", "configs/tracking.json", "--run_name", "first"], ""),
    "a block in place of a block": ([*TRAIN, "--perceptual", "{'_target_': 'torch.nn.MSELoss'}"], ""),
    "another tool": (["verify_net_in_out", "--config_file", "configs/train.json", "--nonsense", "1"], ""),
    "misspelt": ([*TRAIN, "--epoch", "3"], "no key 'epoch'; did you mean --epochs"),
    "of an overlay that is not given": ([*TRAIN, "--nonlocal_attention", "True"], "no key 'nonlocal_attention'"),
    "nested, with =": ([*TRAIN, "--train#trainer#max_epoch=3"], "no key 'train#trainer#max_epoch'"),
    "a block": ([*TRAIN, "--network", "model.pt"], "'network' on the command line is a block of the config, no"),
    "own settings": ({"epochs": 3, "train#trainer#max_epochs": 2}, ""),
    "own, named": ({"side": 64, "twice": "$2 * @side", "crop_size": "@twice"}, ""),
    "own block, more steps": ({"perceptual": {"_target_": "torch.nn.MSELoss"}, "+initialize": ["$print(1)"]}, ""),
    "own, misspelt": ({"epoch": 3}, "own.json has the key 'epoch', which nothing reads; did you mean --epochs"),
    "own, the beginning of one that is named": ({"sid": 1, "side": 64, "crop_size": "@side"}, "has the key 'sid'"),
    "own, plain for a block": ({"network": "model.pt"}, "'network' on .*own.json is a block of the config"),
}  # fmt: skip
SIZE = [112, 136, 112]
# check, its other arguments, what passes, the ends of its range among it, what does not, and what is said of that
RANGES: list[tuple[Callable[..., None], list[Any], list[Any], list[Any], str]] = [
    (check_device, [], ["cpu"], ["cuda:99", "meta", 7], "'device' is .*; try --device cpu"),
    (check_size, ["size"], [[4, 4, 4], [600, 600, 600]],
     [[30, 32, 32], [32, 32], [0, 32, 32], [32.0, 32, 32], 32, [600, 600, 604]], "'size' is "),
    (check_crop, [SIZE], [0, 4, 112], [30, 116, -4, True], r"'crop_size' is .* side of 'spatial_size' \(112\)"),
    (check_spacing, [], [0.3, 4.0], [0.29, 4.1, "1.5", True], "'spacing' is .*0.3 to 4"),
    (check_count, ["num_workers"], [0], [-1, 2.0, True], "'num_workers' is .*0 or more"),
]  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_every_key_is_known(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the config, overlays, tracking, MONAI itself; in a file of one's own, a new key is named by another value."""
    monkeypatch.chdir(ROOT)
    words, message = KEYS[case]
    if isinstance(words, dict):
        (tmp_path / "own.json").write_text(json.dumps(words))
        words = ["run", "--config_file", str(["configs/train.json", str(tmp_path / "own.json")])]
    with pytest.raises(InputError, match=message) if message else nullcontext():
        refuse_unknown_keys(["-m", *words])


def test_keys_are_read_as_fire_does(tmp_path: Path) -> None:
    """Literals, texts, switches without a value, and those of an args_file, which the command line overrides."""
    (tmp_path / "args.json").write_text('{"epochs": 1, "seed": 5}')
    words = ["--epochs", "3", "--size=[4, 8]", "--label", "age", "--resume", "--args_file", str(tmp_path / "args.json")]
    keys = read_keys(["-m", "run", *words]) | {"args_file": ""}
    assert keys == {"epochs": 3, "seed": 5, "size": [4, 8], "label": "age", "resume": True, "args_file": ""}


@pytest.mark.parametrize(("check", "more", "good", "bad", "message"), RANGES)
def test_a_setting_has_its_range(
    check: Callable[..., None], more: list[Any], good: list[Any], bad: list[Any], message: str
) -> None:
    """What is refused is told with the key and what it may be."""
    for value in good:
        check(value, *more)
    for value in bad:
        with pytest.raises(InputError, match=message):
            check(value, *more)


@pytest.mark.parametrize(
    ("place", "value"), [(0, "cuda:99"), (1, 9.0), (2, [30, 32, 32]), (3, -1), (4, ["--epoch", "3"])]
)
def test_a_job_begins_with_every_check(place: int, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device, spacing, size, workers, and the keys of the command line."""
    monkeypatch.setattr("scripts.run.checks.report_input_errors", lambda: None)
    monkeypatch.chdir(ROOT)
    settings: list[Any] = ["cpu", 1.5, SIZE, 0, []]
    settings[place] = value
    monkeypatch.setattr(sys, "argv", ["-m", *TRAIN, *settings.pop()])
    with pytest.raises(InputError):
        begin(*settings)
