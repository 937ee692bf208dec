"""The original system's pickles: read whatever wrote them, written for them, and never run."""

from __future__ import annotations

import builtins
import os
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import original_latents
from scripts.errors import InputError
from scripts.original_latents import convert_from_original, read_original, write_original

SHAPE = (4, 3, 5, 2)
VALUES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)

# How the original system may have kept an array: name, from (C, D, H, W) float32 to what stands in the dict.
FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "big endian": lambda x: x.astype(">f4"),
    "batch axis": lambda x: x[None],
    "Fortran order": np.asfortranarray,
    "not contiguous": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "permuted axes": lambda x: np.ascontiguousarray(x.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2),
    "torch": torch.from_numpy,
    "torch double": lambda x: torch.from_numpy(x).double(),
    "torch view": lambda x: torch.from_numpy(np.stack([x + 1, x]))[1:],
    "torch permuted": lambda x: torch.from_numpy(x.transpose(3, 2, 1, 0).copy()).permute(3, 2, 1, 0),
    "parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x)),
}
LABELS = [(1, "1"), ("AD", "AD"), (np.int64(2), "2"), (np.str_("äü"), "äü"), (np.array([3]), "3"),
          (torch.tensor(4), "4"), (None, "")]  # fmt: skip


class Payload:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        return self.call


def write(path: Path, protocol: int = 4, **changes: Any) -> Path:
    """A pickle with good content except for what is changed."""
    content = {"mu": VALUES, "logvar": VALUES - 1, "label": 1} | changes
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form_of_array(tmp_path: Path, form: str, protocol: int) -> None:
    """Values come back as float32 (C, D, H, W), exactly, contiguous, without a graph, and can be written to."""
    make = FORMS[form]
    content = read_original(write(tmp_path / "a.pkl", protocol, mu=make(VALUES), logvar=make(VALUES - 1)))
    torch.testing.assert_close(content["mu"], torch.from_numpy(VALUES), rtol=0, atol=0)
    torch.testing.assert_close(content["logvar"], torch.from_numpy(VALUES - 1), rtol=0, atol=0)
    assert content["mu"].is_contiguous() and not content["mu"].requires_grad
    assert content["label"] == "1"
    content["mu"].zero_()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("not ")])
def test_reads_what_torch_save_wrote(tmp_path: Path, form: str, is_zip: bool) -> None:
    """Both formats of torch.save, tensors and numpy arrays, whatever the ending."""
    make, path = FORMS[form], tmp_path / "a.pickle"
    content = {"mu": make(VALUES), "logvar": make(VALUES - 1), "label": "AD"}
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    found = read_original(path)
    torch.testing.assert_close(found["mu"], torch.from_numpy(VALUES), rtol=0, atol=0)
    assert found["label"] == "AD"


@pytest.mark.parametrize(("label", "expected"), LABELS)
def test_labels_become_text(tmp_path: Path, label: Any, expected: str) -> None:
    """Whole numbers and texts in any wrapping; None is no label."""
    for protocol in (2, 5):
        assert read_original(write(tmp_path / "a.pkl", protocol, label=label))["label"] == expected


def test_half_precision_and_ordered_dicts(tmp_path: Path) -> None:
    """float16, bfloat16 and an OrderedDict are read too."""
    half, brain = torch.from_numpy(VALUES).half(), torch.from_numpy(VALUES).bfloat16()
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(mu=half, logvar=brain)))
    content = read_original(path)
    torch.testing.assert_close(content["mu"], half.float(), rtol=0, atol=0)
    torch.testing.assert_close(content["logvar"], brain.float(), rtol=0, atol=0)
    assert content["label"] == ""


def test_names_of_numpy_1_are_known(tmp_path: Path) -> None:
    """numpy before 2 calls its modules numpy.core."""
    path = write(tmp_path / "a.pkl", 2)
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))
    assert b"numpy.core.multiarray" in path.read_bytes()
    torch.testing.assert_close(read_original(path)["mu"], torch.from_numpy(VALUES), rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 5)] * 4),
    label=st.integers(-(2**70), 2**70) | st.text(st.characters(exclude_categories=["Cs"])),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: tuple, label: int | str, seed: int) -> None:
    """What is written is read back, any shape and label; only logvar is clamped."""
    generator = torch.Generator().manual_seed(seed)
    mu, logvar = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) * 20
    path = tmp_path_factory.getbasetemp() / "round_trip.pkl"
    write_original(path, mu, logvar, label)
    content = read_original(path)
    assert torch.equal(content["mu"], mu) and torch.equal(content["logvar"], logvar.clamp(-30, 20))
    assert content["label"] == str(label)


def test_written_files_are_plain_pickles(tmp_path: Path) -> None:
    """Any unpickler gives float32 numpy arrays; protocol 4; no temporary file stays; the label keeps its type."""
    mu = torch.from_numpy(VALUES).double().requires_grad_().transpose(1, 3)
    write_original(tmp_path / "new" / "a.pkl", mu, mu - 1, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pkl"]
    raw = (tmp_path / "new" / "a.pkl").read_bytes()
    content = pickle.loads(raw)
    assert next(pickletools.genops(raw))[1] == 4
    assert list(content) == ["mu", "logvar", "label"] and content["label"] == 3
    assert content["mu"].dtype == np.float32 and content["mu"].flags.c_contiguous
    np.testing.assert_array_equal(content["mu"], VALUES.transpose(0, 3, 2, 1))


def test_bad_latents_are_not_written(tmp_path: Path) -> None:
    """Another number of axes, unequal shapes, NaN, or a label of another type are the caller's errors."""
    good = torch.zeros(SHAPE)
    for mu, logvar, label in [(good[0], good[0], 1), (good, good[:1], 1), (good / 0, good, 1), (good, good, 1.5)]:
        with pytest.raises(ValueError, match="must be"):
            write_original(tmp_path / "a.pkl", mu, logvar, label)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saved_by", ["pickle", "torch", "old torch", "storage"])
@pytest.mark.parametrize("place", ["mu", "label", "extra"])
def test_code_is_not_run(tmp_path: Path, saved_by: str, place: str) -> None:
    """A command in a pickle, in a torch file, or in the bytes of a tensor's storage is refused and named."""
    sentinel, path = tmp_path / "was_run", tmp_path / "a.pkl"
    bomb: Any = Payload(os.system, f"touch {sentinel}")
    if saved_by == "storage":
        bomb = Payload(torch.storage._load_from_bytes, pickle.dumps(bomb, protocol=2))
    content = {"mu": VALUES, "logvar": VALUES, "label": 1} | {place: bomb}
    if "torch" in saved_by:
        torch.save(content, path, _use_new_zipfile_serialization=saved_by == "torch")
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="a.pkl holds code.*system"):
        read_original(path)
    assert not sentinel.exists()
    with pytest.raises(InputError):
        list(convert_from_original(tmp_path))
    assert not sentinel.exists()


@pytest.mark.parametrize("function", [eval, exec, builtins.__import__, getattr, os.listdir, np.load, torch.load])
def test_other_functions_are_refused(tmp_path: Path, function: Callable[..., Any]) -> None:
    """Nothing but the few names of arrays is known, whatever it would do."""
    with pytest.raises(InputError, match="holds code"):
        read_original(write(tmp_path / "a.pkl", mu=Payload(function, "1")))


def test_stand_ins_cannot_be_changed(tmp_path: Path) -> None:
    """A pickle that gives a state to a function instead of an array is damaged."""
    state = pickle.dumps((None, {"function": 1}), protocol=2)[2:-1]
    for name in original_latents.STAND_INS:
        module, _, attribute = name.rpartition(".")
        path = tmp_path / "a.pkl"
        path.write_bytes(b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + state + b"b.")
        with pytest.raises(InputError, match="damaged"):
            read_original(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",  # pointers
        b"\x80\x02cnumpy\ndtype\nX\x04\x00\x00\x00V8,O\x85R.",
        b"\x80\x02cnumpy\ndtype\nX\x03\x00\x00\x00U99\x85R(K\x03X\x01\x00\x00\x00<K\x01NNtb.",  # a compound
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01K\x02\x86R.",
    ],
    ids=["object", "record", "subarray", "codec", "no storage"],
)
def test_hostile_arguments_are_refused(tmp_path: Path, raw: bytes) -> None:
    """The names of arrays called with what no array needs."""
    (tmp_path / "a.pkl").write_bytes(raw)
    with pytest.raises(InputError, match="a.pkl"):
        read_original(tmp_path / "a.pkl")


def test_tensors_stay_within_their_storage(tmp_path: Path) -> None:
    """Sizes and strides beyond the storage, and a stride of 0 that pretends to be large, are refused."""
    storage = Payload(torch.storage._load_from_bytes, _storage_bytes(torch.zeros(8)))
    for size, stride, offset in [
        ((1, 1, 3, 3), (9, 9, 3, 1), 0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 8),
        ((10**4,) * 4, (0,) * 4, 0),
    ]:
        mu = Payload(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
        with pytest.raises(InputError, match="a.pkl (is damaged|has 'mu')"):
            read_original(write(tmp_path / "a.pkl", mu=mu))


def _storage_bytes(tensor: torch.Tensor) -> bytes:
    return tensor._typed_storage().__reduce__()[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": VALUES * np.nan}, "'mu' that are not finite"),
        ({"logvar": torch.full(SHAPE, -torch.inf)}, "'logvar' that are not finite"),
        ({"mu": np.full(SHAPE, 1e300)}, "'mu' that are not finite"),
        ({"mu": VALUES.astype(complex)}, "type 'c16'"),
        ({"mu": VALUES.astype(object)}, "type 'O8'"),
        ({"mu": torch.zeros(SHAPE, dtype=torch.complex64)}, "'mu' that are not finite real"),
        ({"mu": VALUES[:2]}, "mu of 2 x 3 x 5 x 2 and logvar of 4 x 3 x 5 x 2"),
        ({"mu": VALUES[0]}, "'mu' of shape 3 x 5 x 2"),
        ({"mu": np.stack([VALUES, VALUES])}, "'mu' of shape 2 x 4"),
        ({"mu": VALUES[:0]}, "'mu' of shape 0 x"),
        ({"mu": [1.0, 2.0]}, "no array as 'mu'"),
        ({"mu": None}, "no array as 'mu'"),
        ({"label": 1.5}, "float as label"),
        ({"label": {"a": 1}}, "dict as label"),
        ({"label": np.zeros(2)}, "ndarray as label"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Values, shapes, types and labels that cannot be a latent's."""
    with pytest.raises(InputError, match=f"a.pkl .*{message}"):
        read_original(write(tmp_path / "a.pkl", **changes))


@pytest.mark.parametrize("content", [[VALUES, VALUES], {"mu": VALUES}, 3, "text", {}], ids=type)
def test_other_objects_are_no_latents(tmp_path: Path, content: Any) -> None:
    """A pickle of something else."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="a.pkl is no dict with mu, logvar and label"):
        read_original(tmp_path / "a.pkl")


@pytest.mark.parametrize("saved_by", ["pickle", "torch", "old torch"])
def test_damaged_files_are_named(tmp_path: Path, saved_by: str) -> None:
    """Files cut anywhere, empty ones, texts and folders end in one sentence."""
    path, tensors = tmp_path / "a.pkl", torch.from_numpy(VALUES)
    if saved_by == "pickle":
        write(path, 5, logvar=tensors)
    else:
        content = {"mu": tensors, "logvar": tensors, "label": 1}
        torch.save(content, path, _use_new_zipfile_serialization=saved_by == "torch")
    raw = path.read_bytes()
    for length in [0, 1, 2, 5, 20, *range(40, len(raw) - 1, len(raw) // 20)]:
        path.write_bytes(raw[:length])
        with pytest.raises(InputError, match="a.pkl"):
            read_original(path)
    for other in (b"<html></html>", b"\x80\x04\x8e" + b"\xff" * 8, b"\x80\xff."):
        path.write_bytes(other)
        with pytest.raises(InputError, match="a.pkl is damaged"):
            read_original(path)
    for missing in (tmp_path, tmp_path / "b.pkl"):
        with pytest.raises(InputError, match="does not exist"):
            read_original(missing)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255), protocol=st.integers(2, 5))
def test_a_changed_byte_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, protocol: int
) -> None:
    """One byte overwritten anywhere: a latent, or an InputError."""
    path = write(tmp_path_factory.getbasetemp() / "changed.pkl", protocol, mu=VALUES[:1, :1], logvar=VALUES[:1, :1])
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        assert read_original(path)["mu"].dtype == torch.float32
    except InputError as error:
        assert "changed.pkl" in str(error)


def test_conversion_goes_through_a_folder(tmp_path: Path) -> None:
    """Both endings, sorted, names without them; hidden files and others are left out."""
    for number, name in enumerate(["b.pkl", "a.v2.pickle", ".c.pkl", "d.npy"]):
        write(tmp_path / name, label=number, logvar=VALUES * 100)
    (tmp_path / "e.pkl").mkdir()
    found = list(convert_from_original(str(tmp_path)))
    assert [(name, label) for name, _, _, label in found] == [("a.v2", "1"), ("b", "0")]
    for _, mu, logvar, _ in found:
        assert torch.equal(mu, torch.from_numpy(VALUES))
        assert torch.equal(logvar, torch.from_numpy(VALUES * 100).clamp(-30, 20))


def test_conversion_refuses_at_once(tmp_path: Path) -> None:
    """No folder, an empty one, and two files of one name, before the first is read."""
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="no folder with .pkl or .pickle files"):
            convert_from_original(folder)
    write(tmp_path / "a.pkl")
    write(tmp_path / "a.pickle")
    with pytest.raises(InputError, match="holds a with two endings"):
        convert_from_original(tmp_path)
