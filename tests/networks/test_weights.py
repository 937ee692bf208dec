"""Weights files: every form is loaded, whatever else a file holds is named in one sentence and never executed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_VAE
from safetensors.torch import save_file

from scripts.networks import BrainVAE, load_weights, read_state_dict
from scripts.run import InputError

State = dict[str, torch.Tensor]

OTHER_CONTENT = [
    ({"epoch": 3}, " holds no state dict"), (torch.zeros(2), " holds no state dict"),
    ({"good": torch.zeros(1), "bad": torch.tensor([0.0, float("nan")])}, ": 'bad' holds NaN"),
]  # fmt: skip
BIAS = "post_quant_conv.conv.bias"
OTHER_NETWORKS: list[tuple[State, str]] = [
    ({"extra": torch.zeros(1)}, "0 missing, 1 unknown, 0 .*'extra' is not known"),
    ({BIAS: torch.zeros(5)}, r"1 of another shape.*\(5,\) there"),
]
FORMS: dict[str, Callable[[State, Path], Any]] = {
    "bare.pt": torch.save,
    "model.pt": lambda state, path: torch.save({"model": state, "epoch": 3}, path),
    "plain.safetensors": save_file,
}


@pytest.fixture
def state() -> State:
    """Random weights of the tiny network."""
    return BrainVAE(**TINY_VAE).state_dict()


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_loaded_from_every_form(state: State, tmp_path: Path, name: str):
    """A bare state dict, one under `model`, and safetensors all fill the network."""
    FORMS[name](state, tmp_path / name)
    network = BrainVAE(**TINY_VAE)
    assert load_weights(network, str(tmp_path / name)) is network
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["bare.pt", "plain.safetensors"])
def test_damaged_files_are_refused(state: State, tmp_path: Path, name: str):
    """A saved error page, an empty file and a download that broke off are named in one sentence."""
    path = tmp_path / name
    FORMS[name](state, path)
    for content in (b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>", b"", path.read_bytes()[:-100]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is damaged or no weights file; copy it again"):
            read_state_dict(path)


def test_missing_file_is_refused(tmp_path: Path):
    """With the key to change."""
    with pytest.raises(InputError, match="does not exist.*'weights'"):
        read_state_dict(tmp_path / "none.pt")


@pytest.mark.parametrize(("content", "message"), OTHER_CONTENT)
def test_other_content_is_refused(tmp_path: Path, content: Any, message: str):
    """A torch file without a state dict, or whose tensors would make a network give black or nothing."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match=f"other.pt{message}"):
        read_state_dict(tmp_path / "other.pt")


class _Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pickle that calls a function is refused without calling it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Bomb()}, "bomb.pt")
    Path("bomb.pkl").write_bytes(pickle.dumps(_Bomb()))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(InputError, match="is damaged or no weights file"):
            read_state_dict(name)
    assert not Path("executed").exists()


@pytest.mark.parametrize(("change", "words"), OTHER_NETWORKS)
def test_other_architecture_is_refused(state: State, tmp_path: Path, change: State, words: str):
    """A name too many or another shape is counted, and the network is left as it was."""
    torch.save({**state, **change}, tmp_path / "w.pt")
    network = BrainVAE(**TINY_VAE)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=words):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
