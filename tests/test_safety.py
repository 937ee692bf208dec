"""What docs/security.md promises: no file runs code, no job opens a connection, no output tells where a scan lay."""

from __future__ import annotations

import ast
import base64
import binascii
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_JOB, head, make_weights
from PIL import Image
from scripts.GONE_original_latents import read_original
from torch import nn

from scripts.cohort import DiskCacheDataset, read_cohort
from scripts.convert_weights import convert
from scripts.latents import load_prior, read_latent, read_tensor
from scripts.metrics import LPIPS3D
from scripts.networks import load_weights
from scripts.run import InputError, command_line

Run = Callable[..., subprocess.CompletedProcess[str]]

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "cloudpickle.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load",
    "os.system", "os.popen", "subprocess.run", "subprocess.Popen", "subprocess.check_output",
    "urllib.request.urlopen", "urllib.request.urlretrieve", "requests.get",
}  # fmt: skip
# What must be said to readers that could otherwise run code.
REQUIRED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def python_sources() -> Iterator[tuple[str, str]]:
    """File and text of the bundle's Python: modules, examples, benchmarks, the notebook, `$` of configs."""
    for path in sorted(path for folder in ("scripts", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        yield path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("*.md")):
        for block in re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
            yield path.name, block
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
            yield path.name, "\n".join(line for line in lines if line[:1] not in ("%", "!"))
    for path in sorted((ROOT / "configs").glob("*.json")):
        for text in re.findall(r'"\$((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8")):
            yield path.name, re.sub(r"[@%][\w:#]+", "reference", json.loads(f'"{text}"'))


def faults(source: str) -> list[str]:
    """Calls of a source that could run what stands in a file, or open a connection."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, arguments = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        key, wanted = REQUIRED.get(name, ("", None))
        given = arguments.get(key)
        is_open = key and not (isinstance(given, ast.Constant) and given.value is wanted)
        # network.eval() takes nothing; pandas' eval takes a program
        is_eval = isinstance(node.func, ast.Attribute) and node.func.attr == "eval" and bool(node.args)
        if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS or is_open or is_eval:
            found.append(ast.unparse(node))
    return found


SOURCES = sorted({name for name, _ in python_sources()})
ALLOWED = {"fresh_process.py": ["subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)"]}  # itself


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_loads_nothing_that_could_run(name: str) -> None:
    """No eval of our own, and torch and NumPy read with their locks on."""
    found = [fault for file, source in python_sources() if file == name for fault in faults(source)]
    assert found == ALLOWED.get(name, [])


@pytest.mark.parametrize(
    "line",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=safe)", "np.load(p)", "eval(t)",
     "pickle.load(f)", "frame.eval('a')"],
)  # fmt: skip
def test_an_open_reader_is_found(line: str) -> None:
    """The search itself."""
    assert faults(line)
    assert not faults("torch.load(p, weights_only=True), np.load(p, allow_pickle=False), network.eval()")


class Poison:
    """Unpickled without a lock, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), "w"))


def poisoned(path: Path, marker: Path) -> Path:
    """A file whose ending says how it is packed, and that makes `marker` where it is loaded carelessly."""
    if path.suffix == ".pt":
        torch.save({"model": {"weight": Poison(marker)}, "epoch": 1}, path)
    elif path.suffix == ".npy":
        np.save(path, np.array([Poison(marker)], dtype=object), allow_pickle=True)
    elif path.suffix == ".npz":
        np.savez(path, mu=np.array([Poison(marker)], dtype=object))
    else:
        path.write_bytes(pickle.dumps({"mu": Poison(marker), "logvar": 0}))
    return path


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights": ("model.pt", lambda path: load_weights(nn.Linear(2, 2), path)),
    "weights in safetensors": ("model.safetensors", lambda path: load_weights(nn.Linear(2, 2), path)),
    "foreign weights": ("foreign.pt", lambda path: convert(str(path), str(path.with_name("out.pt")))),
    "perceptual weights": ("lpips.safetensors", lambda path: LPIPS3D(weights=path)),
    "latent": ("a_latent.safetensors", read_latent),
    "prior": ("prior.safetensors", load_prior),
    "latent to decode, torch": ("a.pt", read_tensor),
    "latent to decode, array": ("a.npy", read_tensor),
    "latent to decode, arrays": ("a.npz", read_tensor),
    "original latent": ("a.pkl", read_original),
    "original latent, torch": ("a.pt", read_original),
}


def careless(path: Path) -> None:
    """What none of our readers does."""
    if path.suffix == ".pt":
        torch.load(path, weights_only=False)
    elif path.suffix in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=True)
        _ = loaded["mu"] if path.suffix == ".npz" else loaded
    else:
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_malicious_pickle_is_refused(reader: str, tmp_path: Path) -> None:
    """One clear error, and what it wanted to run has not run; loaded carelessly it does run."""
    name, read = READERS[reader]
    path, marker = poisoned(tmp_path / name, tmp_path / "marker"), tmp_path / "marker"
    with pytest.raises(InputError, match=re.escape(name)):
        read(path)
    assert not marker.exists()
    careless(path)
    assert marker.exists()


def test_a_malicious_cache_file_is_made_again(tmp_path: Path) -> None:
    """Somebody else's file in a shared cache folder is not believed."""
    from monai.transforms import Compose, Lambdad

    marker = tmp_path / "marker"
    dataset = DiskCacheDataset([{"image": 1.0}], Compose([Lambdad("image", np.float32)]), str(tmp_path / "cache"))
    assert dataset[0]["image"] == 1
    (file,) = (tmp_path / "cache").glob("*.pt")
    poisoned(file, marker)
    with pytest.warns(UserWarning, match="is damaged and is made again"):
        assert dataset[0]["image"] == 1
    assert not marker.exists()


def test_a_malicious_checkpoint_does_not_run(run_bundle: Run, bids: Path, tmp_path: Path) -> None:
    """`--resume` on a folder that somebody has prepared."""
    (tmp_path / "checkpoints").mkdir()
    poisoned(tmp_path / "checkpoints" / "epoch_0001.pt", tmp_path / "marker")
    job = ["--config_file", "configs/train.json", "--dataset_dir", str(bids), "--output_dir", str(tmp_path)]
    done = run_bundle(*job, "--resume", "True", "--perceptual_weight", "0", *TINY_JOB, check=False)
    assert done.returncode == 2 and "holds only damaged checkpoints" in done.stderr
    assert not (tmp_path / "marker").exists()


def test_a_config_is_a_program(run_bundle: Run, tmp_path: Path) -> None:
    """The page says so: what stands behind a $ in a config is run, so a stranger's config is a stranger's program."""
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({"initialize": [f"$open({str(tmp_path / 'marker')!r}, 'w')", "$sys.exit(5)"]}))
    files = str([str(ROOT / "configs" / "inference.json"), str(overlay)])
    run_bundle("--config_file", files, check=False)
    assert (tmp_path / "marker").exists()


def test_the_keys_that_the_page_offers_exist() -> None:
    """Keys of docs/security.md that may be changed without knowing Python."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = page.split("| key |", 1)[1].split("\n\n", 1)[0]
    keys = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in table.splitlines()[2:])))
    offered: set[str] = set()
    for job in ("train", "evaluate", "inference", "encode", "decode", "sample"):
        names = list(json.loads((ROOT / "configs" / f"{job}.json").read_text(encoding="utf-8")))
        offered |= set(names[names.index("bundle_root") : names.index("network_def")])
    assert keys and keys <= offered


# Python calls an audit hook before each of these, also in worker processes; an error could be caught and hidden. Left
# alone are sockets that are files, and the loopback port that urllib3 binds and closes to see whether IPv6 is there.
GUARD = """
import os, sys
def guard(event, arguments):
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.gethostname"):
        return
    is_file = bool(arguments) and getattr(arguments[0], "family", None) == 1  # AF_UNIX
    if is_file or event == "socket.bind" and arguments[1][0] == "::1":
        return
    os.write(2, f"a connection was tried: {event} {arguments}".encode())
    os._exit(97)
sys.addaudithook(guard)
"""


@pytest.fixture
def no_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python that is started ends with 97 as soon as it connects, listens, sends or looks up a name."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "guard"))


@pytest.mark.parametrize(
    "attempt",
    [
        "socket.socket().connect(('127.0.0.1', 9))",
        "socket.socket().bind(('0.0.0.0', 0))",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "socket.getaddrinfo('localhost', 80)",
        "urllib.request.urlopen('http://127.0.0.1')",
    ],
)
def test_the_guard_ends_what_connects(no_sockets: None, attempt: str) -> None:
    """Also where the error would be caught."""
    code = f"import socket, urllib.request\ntry:\n    {attempt}\nexcept BaseException:\n    pass"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 97


def test_training_opens_no_connection(no_sockets: None, run_bundle: Run, bids: Path, tmp_path: Path) -> None:
    """With a worker process, the perceptual loss and TensorBoard."""
    job = ["--config_file", "configs/train.json", "--dataset_dir", str(bids), "--output_dir", str(tmp_path / "out")]
    run_bundle(*job, "--epochs", "1", "--num_workers", "1", *TINY_JOB)
    assert (tmp_path / "out" / "model.pt").is_file()


def test_inference_opens_no_connection(
    no_sockets: None, run_bundle: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's first command on a machine that has no demo cohort yet: it is made, not fetched."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = ["--config_file", "configs/inference.json", "--output_dir", str(tmp_path / "out")]
    run_bundle(*job, "--weights", str(weights), *TINY_JOB)
    assert list((tmp_path / "cache").rglob("sub-01_T1w.nii.gz"))
    assert (tmp_path / "out" / "report.html").is_file()


NAME = "Krautwurst"
LEAK_JOBS = ("encode", "evaluate", "inference", "train", "decode", "sample")


def contents(data: bytes) -> Iterator[bytes]:
    """The bytes of a file and of everything that is packed in them: gzip, zip, PNG texts, base64."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield data[:512]  # the file name that gzip may keep
        yield from contents(gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield member.encode()
                yield from contents(archive.read(member))
    if data[:4] in (b"\x89PNG", b"RIFF"):
        yield str(Image.open(io.BytesIO(data)).info).encode()
    for found in re.finditer(rb"[A-Za-z0-9+/]{24,}={0,2}", data):
        try:
            decoded = base64.b64decode(found[0], validate=True)
        except binascii.Error:
            continue
        yield decoded
        with suppress(OSError, EOFError, zlib.error):  # text that only looks like a packed file in base64
            yield from contents(decoded)


def leaks(folder: Path) -> list[str]:
    """Where the name stands: the file, and what is around it."""
    found = []
    needles = [NAME.lower().encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-32-le")]
    for path in sorted(folder.rglob("*")):
        texts = [path.relative_to(folder).as_posix().encode(), *(contents(path.read_bytes()) if path.is_file() else ())]
        for text in texts:
            for at in (text.lower().find(needle) for needle in needles):
                if at >= 0:
                    found.append(f"{path.relative_to(folder)}: {text[max(0, at - 60) : at + 60]!r}")
    return found


def private_scan(path: Path, seed: int) -> None:
    """A scan that says a name wherever NIfTI and gzip have room for a text."""
    path.parent.mkdir(parents=True)
    image = nib.Nifti1Image(head(seed), np.diag([-4.0, 4.0, 4.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = f"{NAME} {field[:3]}".encode()
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", f"{NAME} extension".encode()))
    with path.open("wb") as file, gzip.GzipFile(f"{NAME}.nii", "wb", fileobj=file) as stream:
        stream.write(image.to_bytes())


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder of that name: a BIDS cohort with tables and sidecars that tell it, and weights."""
    home = tmp_path_factory.mktemp("home") / f"{NAME},Otto"
    for number, split in enumerate(("train", "train", "val"), 1):
        scan = home / NAME / f"sub-{number:02d}" / "anat" / f"sub-{number:02d}_T1w.nii.gz"
        private_scan(scan, number)
        scan.with_name(scan.name.replace(".nii.gz", ".json")).write_text(json.dumps({"PatientName": NAME}))
        table = home / NAME / "participants.tsv"
        table.parent.mkdir(exist_ok=True)
        lines = table.read_text() if table.exists() else "participant_id\tsplit\tname\n"
        table.write_text(f"{lines}sub-{number:02d}\t{split}\t{NAME}\n")
    make_weights(home / "model.pt", 0)
    return home


@pytest.fixture(scope="module")
def outputs(private: Path, run_bundle: Run) -> Callable[[str], Path]:
    """Runs a job on the private cohort, once, in a private folder; gives what it left."""
    more = {
        "evaluate": ["--split", "all"],
        "inference": ["--save_model_space", "True"],
        "train": ["--epochs", "1", "--perceptual_weight", "0", "--cache_dir", str(private / "out" / "cache")],
        "sample": ["--prior", "gaussian", "--n_samples", "2", "--compare_with", str(private / NAME)],
    }

    def run(job: str) -> Path:
        folder = private / "out" / job
        if not folder.exists():
            source = run("encode") if job in ("decode", "sample") else private / NAME
            given = ["--config_file", f"configs/{job}.json", "--dataset_dir", str(source), "--output_dir", str(folder)]
            weights = [] if job == "train" else ["--weights", str(private / "model.pt")]
            run_bundle(*given, *weights, *more.get(job, []), *TINY_JOB)
        return folder

    return run


@pytest.mark.parametrize("job", LEAK_JOBS)
def test_no_output_tells_the_name(job: str, outputs: Callable[[str], Path]) -> None:
    """Not in a header, a report, a table, a picture, a latent, a checkpoint or an event file, packed or not."""
    folder = outputs(job)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds >= {"encode": {".safetensors", ".jsonl", ".html"}, "train": {".pt", ".html"}}.get(job, {".html"})
    assert not leaks(folder)


def test_the_disk_cache_tells_no_name(private: Path, outputs: Callable[[str], Path]) -> None:
    """What `--cache_dir` keeps of a training."""
    outputs("train")
    assert list((private / "out" / "cache").glob("*.pt"))
    assert not leaks(private / "out" / "cache")


def _npz(path: Path) -> None:
    np.savez_compressed(path, name=np.array([NAME]))


def _png(path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    texts = PngInfo()
    texts.add_text("name", NAME, zip=True)
    Image.new("L", (4, 4)).save(path, pnginfo=texts)


def _event(path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(path)) as writer:
        writer.add_text("name", NAME)


def _page(path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    image.header["descrip"] = NAME.encode()
    path.write_text(f'<script>{{"volume":"{base64.b64encode(gzip.compress(image.to_bytes())).decode()}"}}</script>')


HIDING: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text(f"of {NAME.upper()}"),
    f"{NAME}.txt": lambda path: path.write_text(""),
    "a.nii.gz": lambda path: path.write_bytes(gzip.compress(f"x{NAME}".encode())),
    "header.gz": lambda path: private_scan(path.parent / "b" / "header.gz", 0),
    "a.pt": lambda path: torch.save({"name": NAME}, path),
    "a.npz": _npz,
    "a.png": _png,
    "events": _event,
    "report.html": _page,
    "text.html": lambda path: path.write_text(base64.b64encode(f"patient {NAME} of ward 3".encode()).decode()),
}


@pytest.mark.parametrize("name", HIDING)
def test_a_hidden_name_is_found(name: str, tmp_path: Path) -> None:
    """The search itself, in each kind of file that a job writes."""
    HIDING[name](tmp_path / name)
    assert leaks(tmp_path)


COMMANDS = {
    "file": (["--dataset_dir", "{}/scan.nii.gz"], "--dataset_dir scan.nii.gz"),
    "folder": (["--dataset_dir", "{}"], '--dataset_dir "<folder>"'),
    "folder with =": (["--dataset_dir={}"], '"--dataset_dir=<folder>"'),
    "list": (["--dataset_dir", "['{}','{}/a.csv']"], "--dataset_dir \"['<folder>', 'a.csv']\""),
    "dict": (["--peers", "{'first':'{}/model.pt'}"], "--peers \"{'first': 'model.pt'}\""),
    "expression": (["--output_dir", "$'{}' + '/out'"], "--output_dir $..."),
    "Windows": (["--dataset_dir", rf"C:\{NAME}\scan.nii"], "--dataset_dir scan.nii"),
    "the bundle's own": (["--weights", "models/model.pt"], "--weights models/model.pt"),
    "numbers": (["--spatial_size", "[32,36,32]"], '--spatial_size "[32,36,32]"'),
    "split": (["--split", "val"], "--split val"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_shows_no_folder(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports and tables show the command; folders are named after people, with a comma at times."""
    folder = tmp_path / f"{NAME},Otto"
    folder.mkdir()
    given, expected = COMMANDS[case]
    monkeypatch.setattr(sys, "argv", ["python", "run", *(word.replace("{}", str(folder)) for word in given)])
    assert command_line() == f"python -m monai.bundle run {expected}"


def test_a_folder_without_a_slash_is_no_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cd /data` and `--dataset_dir Krautwurst`."""
    (tmp_path / NAME).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["python", "run", "--dataset_dir", NAME])
    assert NAME not in command_line()


def test_the_event_file_of_a_fine_tuning_tells_no_folder(private: Path, run_bundle: Run) -> None:
    """The hyperparameter `weights`."""
    job = ["--config_file", "configs/train.json", "--dataset_dir", str(private / NAME), "--epochs", "1"]
    folder = private / "out" / "finetune"
    more = ["--perceptual_weight", "0", "--weights", str(private / "model.pt"), "--output_dir", str(folder)]
    run_bundle(*job, *more, *TINY_JOB)
    assert not leaks(folder)


def test_a_subject_is_not_named_after_folders_outside_the_cohort(tmp_path: Path) -> None:
    """A table without a column 'subject' whose scans lie elsewhere."""
    scan = tmp_path / "home" / NAME / "a.nii.gz"
    private_scan(scan, 0)
    table = tmp_path / "tables" / "study.csv"
    table.parent.mkdir()
    table.write_text(f"image\n{scan}\n")
    (record,) = read_cohort(str(table))
    shown = {key: record[key] for key in ("name", "subject", "session", "label", "split", "cohort")}
    assert NAME not in str(shown)


def test_a_home_folder_is_no_part_of_what_is_shipped() -> None:
    """No path of a user's machine in configs, pages, scripts or the notebook."""
    texts = [p for pattern in ("configs/*", "docs/**/*", "scripts/**/*.py") for p in ROOT.glob(pattern)]
    found = [
        f"{path.name}: {match}"
        for path in texts
        if path.suffix in (".json", ".md", ".py", ".ipynb", ".txt", ".sh", ".conf")
        for match in re.findall(r"(?:/home|/Users|/root)/\w+|/work/\w+", path.read_text(encoding="utf-8"))
    ]
    assert not found, found
    assert os.path.expanduser("~") not in (ROOT / "README.md").read_text(encoding="utf-8")
