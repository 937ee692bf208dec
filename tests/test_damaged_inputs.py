"""The corpus of damaged inputs, through the readers and through real jobs: a clear sentence, or a correct result."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damaged_inputs
import pytest
from conftest import ROOT, TINY_JOB, write_scan
from damaged_inputs import END, NAMES, PAGE, START, Case, corpus, every_bit, latent_bytes, nifti, outcome, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.cohort import read_cohort

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's means")

MOST_GB = 4.0  # resident, of a whole job with its libraries
MOST_SECONDS = 240.0  # of a whole job on a busy machine
ALLOWED = ("refused", "same", "other")
ANY = " "  # the sentence may name a scan or a subject of the table instead of the table
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    """At least 200 inputs were asked for; two of one name would be one."""
    assert len(corpus()) >= 1000
    assert len({(case.group, case.name) for case in corpus()}) == len(corpus())


@pytest.mark.parametrize("case", corpus(), ids=lambda case: f"{case.group}: {case.name}".encode("ascii", "replace"))
def test_every_input_ends_as_expected(case: Case, tmp_path: Path) -> None:
    """Refused in one sentence that names the file, or read; within 4 GB and 20 s; no file beside the input."""
    found, said = outcome(case, tmp_path)
    assert found == case.expected, said


def test_the_page_counts_the_corpus() -> None:
    """The table of docs/robustness.md is what `damaged_inputs.py write` would put there."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(START, 1)[1].split(END, 1)[0].strip() == damaged_inputs.table()


def found_of(reader: str, make: Callable[[Path], Any], folder: Path, named: str = "") -> str:
    """Outcome of an input that hypothesis has made up."""
    found, said = outcome(Case("", "", reader, make, "other", named), folder)
    assert found in ALLOWED, said
    return found


bytes_changed = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)
names = st.sampled_from(["image", "subject", "session", "split", "label", "x", "training", "test"])
texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["a.nii", "../a.nii", "b.nii", "n/a", "train"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
documents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | texts, inner, max_size=4)
)


def changed(raw: bytes, changes: list[tuple[float, int]], within: int = 0) -> bytes:
    """Bytes at shares of the length, or of the first `within` bytes, set to values."""
    content = bytearray(raw)
    for share, value in changes:
        content[int(share * (within or len(raw)))] = value
    return bytes(content)


@FEW
@given(changes=bytes_changed, in_header=st.booleans())
def test_any_bytes_of_a_scan(changes: list, in_header: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Anywhere, or in the header, where they matter."""
    content = changed(nifti(), changes, 352 if in_header else 0)
    found_of("scan", written("a.nii", content), tmp_path_factory.mktemp("scan"), "a.nii")


@pytest.mark.parametrize("ending", [".safetensors", ".npy", ".npz", ".pt", ".nii", ".nii.gz"])
@FEW
@given(changes=bytes_changed)
def test_any_bytes_of_a_latent(ending: str, changes: list, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In every format; the first 400 bytes hold the headers."""
    for within in (0, 400):
        make = written(f"x{ending}", changed(latent_bytes(ending), changes, within))
        found_of("latent", make, tmp_path_factory.mktemp("latent"), f"x{ending}")


@FEW
@given(rows=st.lists(st.lists(texts | names, max_size=5), max_size=6), comma=st.sampled_from(",;\t"))
def test_any_table(rows: list, comma: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Words that a table may hold in any order, quotes and line ends among them."""
    text = "\n".join(comma.join(row) for row in [["image", *(rows[0] if rows else [])], *rows])
    found_of("cohort", damaged_inputs.beside_scans("t.csv", text), tmp_path_factory.mktemp("table"), ANY)


@FEW
@given(document=documents)
def test_any_datalist(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any JSON: nested, of any type, with the keys that mean something."""
    make = damaged_inputs.beside_scans("t.json", json.dumps(document))
    found_of("cohort", make, tmp_path_factory.mktemp("datalist"), ANY)


@FEW
@given(document=documents)
def test_any_manifest_and_statistics(document: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As a line of the manifest, and as the whole of latent_stats.json."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "1").mkdir()
    (folder / "2").mkdir()
    found_of("folder", damaged_inputs.latent_folder(document), folder / "1", "manifest.jsonl")
    found_of("statistics", written("latent_stats.json", json.dumps(document)), folder / "2", "latent_stats.json")


@FEW
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40))
def test_any_name_makes_a_safe_one(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a scan is called, its outputs stay in the folder, not hidden; or it is refused."""
    found_of("scan", written(f"{name}.nii", nifti()), tmp_path_factory.mktemp("name"), "nii")


@pytest.mark.slow
def test_every_bit_of_a_header() -> None:
    """One at a time; the page gives the counts."""
    counts = every_bit()
    assert set(counts) <= set(ALLOWED), counts
    said = (
        f"{counts['refused']:,} are refused, {counts['same']:,} change nothing, {counts['other']:,} give another scan"
    )
    print(said)
    assert said in PAGE.read_text(encoding="utf-8")


# --- real jobs -------------------------------------------------------------------------------------------------------

# Writes down every path that Python opens for writing, makes, renames or links; imported before anything else.
WATCH = """
import os, sys
log = os.open(os.environ["WATCH_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
def watch(event, args):
    if event == "open" and not isinstance(args[0], int) and args[2] & CHANGING:
        paths = args[:1]
    elif event in ("os.mkdir", "os.symlink", "os.link", "os.rename", "os.truncate"):
        paths = args[:1] if event == "os.mkdir" else args[:2]
    else:
        return
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            os.write(log, os.fsencode(os.path.abspath(path)) + b"\\n")
sys.addaudithook(watch)
"""


def sample() -> list[Case]:
    """Of every class and reader one input that is refused and one that is read, drawn by a fixed seed."""
    drawn: dict[tuple[str, str, bool], Case] = {}
    cases = list(corpus())
    random.Random(0).shuffle(cases)
    for case in cases:
        drawn.setdefault((case.group, case.reader, case.expected == "refused"), case)
    return sorted(drawn.values(), key=lambda case: (case.group, case.name))


def keys_of(case: Case, given: Any, valid: dict[str, Path]) -> dict[str, Any]:
    """The job that an input goes to, as config file and keys."""
    if case.reader == "job":
        config, keys = given
        return {"config_file": f"configs/{config}.json", **keys}
    scan = {"config_file": "configs/inference.json", "dataset_dir": valid["scan"]}
    decode = {"config_file": "configs/decode.json", "check_weights": "False", "spatial_size": "[24, 20, 12]"}
    sample = {"config_file": "configs/sample.json", "prior": "gaussian", "spatial_size": "[24, 20, 12]"}
    train = {"config_file": "configs/train.json", "dataset_dir": valid["bids"], "perceptual_weight": 0, "epochs": 1}
    encode = {"config_file": "configs/encode.json", "dataset_dir": given}
    return {
        "weights": {**scan, "weights": given},
        "latent": {**decode, "dataset_dir": given},
        "listing": {**decode, "dataset_dir": given},
        "header": {**decode, "dataset_dir": given},
        "statistics": {**decode, "dataset_dir": valid["latent"], "scaling": "channel", "latent_stats": given},
        "folder": {**sample, "dataset_dir": given},
        "checkpoint": {**train, "resume": True},
        "label": {**encode, "label": "group"},
    }.get(case.reader, encode)


def run_watched(keys: dict[str, Any], sandbox: Path, weights: Path) -> tuple[int, str, float, list[str]]:
    """Run a job as a user does.

    Args:
        keys: config file and keys; those of the tiny network are put before them.
        sandbox: gets output, home and temporary folders.
        weights: of the tiny network.

    Returns:
        Exit code, standard error, peak resident memory in GB, and the paths written to outside the sandbox's folders.
    """
    (sandbox / "site").mkdir()
    (sandbox / "site" / "sitecustomize.py").write_text(WATCH)
    tiny = dict(zip((word.removeprefix("--") for word in TINY_JOB[::2]), TINY_JOB[1::2], strict=True))
    own = {} if "train" in keys["config_file"] else {"weights": weights}
    words = [
        w for k, v in {**tiny, "output_dir": sandbox / "output", **own, **keys}.items() for w in (f"--{k}", str(v))
    ]
    places = {"HOME": sandbox / "home", "XDG_CACHE_HOME": sandbox / "home", "TMPDIR": sandbox / "tmp"}
    for place in places.values():
        place.mkdir(exist_ok=True)
    environment = {
        **os.environ, **{name: str(place) for name, place in places.items()}, "WATCH_LOG": str(sandbox / "log"),
        "PYTHONPATH": str(sandbox / "site"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(sandbox / "home"),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *words]
    with (sandbox / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
        )
        alarm = threading.Timer(MOST_SECONDS, process.kill)
        alarm.start()
        _, status, usage = os.wait4(process.pid, 0)
        alarm.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    inside = tuple(str(place) for place in (sandbox / "output", *places.values(), "/dev"))
    written_to = [os.fsdecode(line) for line in (sandbox / "log").read_bytes().splitlines()]
    outside = [path for path in written_to if not path.startswith(inside)]
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kB on Linux
    return process.returncode, (sandbox / "stderr").read_text(errors="replace"), usage.ru_maxrss / unit, outside


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a job needs besides the damaged input."""
    folder = tmp_path_factory.mktemp("valid")
    bids = folder / "bids"
    for number in range(4):
        write_scan(bids / f"sub-{number}" / "anat" / f"sub-{number}_T1w.nii.gz", number)
    split = "".join(f"sub-{number}\t{'val' if number == 3 else 'train'}\n" for number in range(4))
    (bids / "participants.tsv").write_text(f"participant_id\tsplit\n{split}")
    latent = written("x.npy", latent_bytes(".npy"))(folder)
    return {"scan": written("a.nii", nifti())(folder), "latent": latent, "bids": bids}


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(), ids=lambda case: f"{case.group}: {case.name}".encode("ascii", "replace"))
def test_a_job_ends_as_its_reader(case: Case, valid: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line that names the input, or 0 and outputs; below 4 GB, and nothing written elsewhere."""
    (tmp_path / "in").mkdir()
    given = case.make(tmp_path / "in")
    if case.reader == "checkpoint":
        (tmp_path / "output").mkdir()
        shutil.copytree(given.parent, tmp_path / "output" / "checkpoints")
    if case.reader == "folder":  # the job reads it before the manifest
        about = {**damaged_inputs.STATISTICS, "weights_sha256": "", "shape": list(damaged_inputs.LATENT)}
        (given / "latent_stats.json").write_text(json.dumps(about))
    keys = keys_of(case, given, valid)
    if keys.get("output_dir") == str(tmp_path / "in" / "out"):
        keys["output_dir"] = tmp_path / "output"
    code, stderr, memory, outside = run_watched(keys, tmp_path, weights)
    assert outside == []
    assert memory < MOST_GB
    assert "Traceback" not in stderr
    if case.expected != "refused":
        assert code == 0, stderr
        assert len(list((tmp_path / "output").iterdir())) > 1
        return
    assert code == 2, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    named = case.named or (given.name if isinstance(given, Path) else "")
    assert named in stderr or str(tmp_path / "in") in errors[0]
    left = (
        {path.name for path in (tmp_path / "output").rglob("*") if path.is_file()}
        if case.reader != "checkpoint"
        else {}
    )
    assert set(left) <= {"preflight.json"}


@pytest.mark.slow
def test_a_folder_of_hard_names_is_encoded(weights: Path, tmp_path: Path) -> None:
    """Quotes, dashes, dollars, unicode: a latent for each, in the output folder, under a name that a shell can take."""
    plain = [name for name in NAMES if name.isprintable() and "\\" not in name and not name.startswith(".")]
    for name in plain:
        written(name, nifti())(tmp_path / "in '$HOME' @x %run")
    keys = {"config_file": "configs/encode.json", "dataset_dir": tmp_path / "in '$HOME' @x %run"}
    code, stderr, _, outside = run_watched(keys, tmp_path, weights)
    assert code == 0, stderr
    assert outside == []
    latents = list((tmp_path / "output").glob("*_latent.safetensors"))
    assert len(latents) == len(plain) == len(read_cohort(str(keys["dataset_dir"])))
    assert all(re.fullmatch(r"[\w+][\w.+-]*", path.name) for path in latents)


@pytest.mark.slow
def test_markup_in_a_table_stays_text(weights: Path, tmp_path: Path) -> None:
    """Subject and label of a table appear in the report of the job, where they must not become a script."""
    markup = "<script>alert(1)</script>"
    image = "<img src=x onerror=alert(1)>"
    rows = [{"image": "a.nii", "subject": image, "group": markup}, {"image": "b.nii", "group": "'\"&"}]
    table = damaged_inputs.beside_scans("t.json", json.dumps(rows))(tmp_path)
    keys = {"config_file": "configs/encode.json", "dataset_dir": table, "label": "group"}
    code, stderr, _, outside = run_watched(keys, tmp_path, weights)
    assert code == 0, stderr
    assert outside == []
    report = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert "alert(1)" in report
    assert markup not in report and "<img src=x" not in report


CONFIGS = {
    "cut off": '{"spacing": 4.0,', "empty": "", "a list": "[1]", "deep": "[" * 100_000, "binary": "\0\1\2",
    "a class that is not there": '{"preprocessing": {"_target_": "scripts.gone.Nothing"}}',
    "a reference to nothing": '{"amp": "@gone"}', "a reference to itself": '{"amp": "@amp"}',
    "no Python": '{"amp": "$1 +"}', "a list for a text": '{"amp": [true, "x"]}',
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", CONFIGS)
def test_a_damaged_config_writes_nothing(what: str, valid: dict[str, Path], weights: Path, tmp_path: Path) -> None:
    """MONAI reads configs before any of our code, so the words are MONAI's; the job ends, and leaves nothing."""
    (tmp_path / "my.json").write_text(CONFIGS[what])
    files = f"['configs/inference.json', '{tmp_path / 'my.json'}']"
    code, stderr, memory, outside = run_watched({"config_file": files, "dataset_dir": valid["scan"]}, tmp_path, weights)
    assert code > 0
    assert outside == []
    assert memory < MOST_GB
    assert not [path for path in tmp_path.glob("output/*") if path.name != "preflight.json"]
