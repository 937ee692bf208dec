"""What is refused before anything is built."""

from __future__ import annotations

import pytest
from conftest import ROOT

from scripts.run import InputError, check_crop, check_device, check_size, refuse_unknown_keys

TRAIN = "configs/train.json"
MAISI = "['configs/train.json', 'configs/maisi.json']"
GOOD = [
    ["run", "--config_file", TRAIN, "--epochs", "3"],
    ["run", "training", f"--config_file={TRAIN}", "--train#trainer#max_epochs=3"],
    ["run", "--config_file", MAISI, "--nonlocal_attention", "True", "--meta_file", "configs/metadata.json"],
    ["run", "--config_file", TRAIN, "--train::trainer::max_epochs", "3"],
    ["verify_net_in_out", "--config_file", TRAIN, "--nonsense", "1"],
    [],
]
BAD = [
    (["run", "--config_file", TRAIN, "--epoch", "3"], "did you mean --epochs"),
    (["run", "--config_file", TRAIN, "--nonlocal_attention", "True"], "no key 'nonlocal_attention'"),
    (["run", "--config_file", TRAIN, "--train#trainer#max_epoch=3"], "no key 'train#trainer#max_epoch'"),
]
BAD_CROPS = [30, 116, -4, 64.0, None, True]
BAD_SIZES = [[30, 32, 32], [32, 32], [0, 32, 32], [32.0, 32, 32]]


@pytest.mark.parametrize("words", GOOD)
def test_known_keys_pass(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the config, of an overlay, nested ids, MONAI's own arguments, and other tools."""
    monkeypatch.chdir(ROOT)
    refuse_unknown_keys(["-m", *words])


@pytest.mark.parametrize(("words", "message"), BAD)
def test_a_misspelt_key_is_refused(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the nearest key that exists."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=message):
        refuse_unknown_keys(["-m", *words])


def test_a_device_that_is_not_there_is_refused() -> None:
    """cuda:99 is nowhere; the remedy is named."""
    check_device("cpu")
    with pytest.raises(InputError, match="--device cpu"):
        check_device("cuda:99")


@pytest.mark.parametrize("size", BAD_SIZES)
def test_a_size_that_the_network_cannot_code_is_refused(size: list) -> None:
    """Sides are multiples of 4."""
    check_size([112, 136, 112], "spatial_size")
    with pytest.raises(InputError, match="spatial_size"):
        check_size(size, "spatial_size")


@pytest.mark.parametrize("side", BAD_CROPS)
def test_a_crop_that_is_no_cube_of_every_volume_is_refused(side: object) -> None:
    """Up to the smallest side, 112; 0 is for whole volumes."""
    for good in (0, 4, 64, 112):
        check_crop(good, [112, 136, 112])
    with pytest.raises(InputError, match="'crop_size' is .* smallest side of 'spatial_size' \\(112\\)"):
        check_crop(side, [112, 136, 112])
