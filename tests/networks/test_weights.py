"""Weights files: every form is loaded, whatever else a file holds is named in one sentence and never executed."""

from __future__ import annotations

import copy
import pickle
import zipfile
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

PAGE = b"<!DOCTYPE html>\n<html><body>404: Not Found</body></html>"
NOT_WEIGHTS = {"page.pt": PAGE, "dots.pt": b"....", "page.safetensors": PAGE, "empty.safetensors": b""}
NO_STATE_DICT = [{"model": {}}, {"epoch": 3}, torch.zeros(2)]
BIAS = "post_quant_conv.conv.bias"
NO_NUMBERS = {
    "nan": torch.tensor([0.0, float("nan")]), "complex": torch.zeros(2, dtype=torch.complex64),
}  # fmt: skip
OTHER_NETWORKS: dict[str, tuple[Callable[[State], Any], str]] = {
    "missing": (lambda state: state.pop(BIAS), "1 missing, 0 unknown, 0 .*post_quant_conv.*missing"),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), "0 missing, 1 unknown, 0 .*'extra' is not known"),
    "reshaped": (lambda state: state.update({BIAS: torch.zeros(5)}), r"1 of another shape.*\(5,\) there"),
}
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


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_other_files_are_refused(tmp_path: Path, name: str):
    """A saved error page, a Git LFS pointer and an empty file are named in one sentence."""
    (tmp_path / name).write_bytes(NOT_WEIGHTS[name])
    with pytest.raises(InputError, match=f"{name} is damaged or no weights file; copy it again"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["bare.pt", "plain.safetensors"])
def test_cut_off_file_is_refused(state: State, tmp_path: Path, name: str):
    """A download that broke off is named."""
    path = tmp_path / name
    FORMS[name](state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{name} is damaged"):
        read_state_dict(path)


def test_compressed_archive_is_refused(state: State, tmp_path: Path):
    """torch writes none, and what one unpacks to has no limit."""
    FORMS["bare.pt"](state, tmp_path / "bare.pt")
    with zipfile.ZipFile(tmp_path / "bare.pt") as bare, zipfile.ZipFile(tmp_path / "w.pt", "w", 8) as packed:
        for member in bare.namelist():
            packed.writestr(member, bare.read(member))
    with pytest.raises(InputError, match="w.pt is damaged or no weights file"):
        read_state_dict(tmp_path / "w.pt")


def test_missing_file_is_refused(tmp_path: Path):
    """With the key to change."""
    with pytest.raises(InputError, match="does not exist.*'weights'"):
        read_state_dict(tmp_path / "none.pt")


@pytest.mark.parametrize("content", NO_STATE_DICT, ids=str)
def test_other_content_is_refused(tmp_path: Path, content: Any):
    """A torch file without a state dict is not taken for one."""
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(InputError, match="other.pt holds no state dict"):
        read_state_dict(tmp_path / "other.pt")


@pytest.mark.parametrize("kind", NO_NUMBERS)
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, kind: str):
    """The tensor is named: with it a network gives black or nothing."""
    torch.save({"good": torch.zeros(1), "bad": NO_NUMBERS[kind]}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="w.pt: 'bad' holds NaN, infinite, complex or no values"):
        read_state_dict(tmp_path / "w.pt")


class _Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_not_executed(tmp_path: Path):
    """A pickle that calls a function is refused without calling it."""
    torch.save({"model": _Bomb(tmp_path / "executed")}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(_Bomb(tmp_path / "executed")))
    for name in ("bomb.pt", "bomb.pkl"):
        with pytest.raises(InputError, match="is damaged or no weights file"):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", OTHER_NETWORKS)
def test_other_architecture_is_refused(state: State, tmp_path: Path, kind: str):
    """A name too few, one too many or another shape is counted, and the network is left as it was."""
    change, words = OTHER_NETWORKS[kind]
    state = copy.copy(state)
    change(state)
    torch.save(state, tmp_path / "w.pt")
    network = BrainVAE(**TINY_VAE)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=words):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
