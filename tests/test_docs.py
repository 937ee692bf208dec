"""The pages of docs/ say what the code does: their commands, keys, messages, links and examples are tried."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import pandas as pd
import pytest
from conftest import ROOT, TINY_JOB, TINY_VAE, Job, write_scan
from monai.bundle import ConfigParser

from scripts.cohort import DATA_CRITERIA, HEADER_CRITERIA, read_cohort, recognise
from scripts.latents import read_header

NOT_PAGES = ("README", "performance")  # the card has a test of its own; figures of machines have none
PAGES = sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - {*NOT_PAGES})
LINKING = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "visualize_recon.ipynb", ROOT / "README.md"]
OVERLAYS = ["finetune", "lite"]
# Arguments of `monai.bundle run` itself, and keys that its `--tracking` adds.
NOT_KEYS = {
    "config_file", "logging_file", "meta_file", "run_id", "tracking", "tracking_uri", "experiment_name", "run_name",
}  # fmt: skip
FOLDER = "/path/to/brain_t1_vae"
RUNS = {
    "train": "trained", "evaluate": "evaluated", "inference": "reconstructed", "encode": "encoded",
    "decode": "decoded", "sample": "sampled",
}  # fmt: skip
RECORD_KEYS = {"name", "subject", "session", "label", "split", "system"}


def text(page: str) -> str:
    """A page of docs/."""
    return (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.M | re.S)


def rows(page: str, header: str) -> list[list[str]]:
    """Cells of the table whose first line begins with `header`, without header and rule."""
    lines = text(page).split(header, 1)[1].splitlines()[2:]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table]


def code(cell: str) -> str:
    """What stands between the backticks of a cell."""
    found = re.fullmatch(r"`(.*)`", cell)
    assert found, cell
    return found[1]


def bundle_commands(page: str) -> list[list[str]]:
    """Arguments after `python -m monai.bundle run` of every command, in the page's order."""
    commands = []
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line.replace("$BUNDLE", FOLDER))
        start = words.index("monai.bundle") if "monai.bundle" in words else 0
        if start and words[start + 1] == "run":
            assert words[start - 1] == "-m", line
            assert words[start - 2] == "python" or "torchrun" in words, line
            commands.append(words[start + 2 :])
    return commands


def config(name: str) -> dict[str, Any]:
    """A config as it stands in the file."""
    return json.loads((ROOT / "configs" / f"{name}.json").read_text())


COMMANDS = [(page, command) for page in PAGES for command in bundle_commands(page)]
MESSAGES = [(page, code(row[0])) for page in PAGES if "| message |" in text(page) for row in rows(page, "| message |")]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_and_pictures_exist(page: Path) -> None:
    """Every relative link leads to a file, and to a heading where it names one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)])
def test_a_command_names_files_and_keys_that_exist(page: str, command: list[str], tmp_path: Path) -> None:
    """`--key value` pairs; config files exist (or stand on the page); every key is one of the overlaid config."""
    assert len(command) % 2 == 0 and all(word.startswith("--") for word in command[::2])
    given = {key.removeprefix("--"): value for key, value in zip(command[::2], command[1::2], strict=True)}
    files, named = [], given["config_file"]
    for name in ast.literal_eval(named) if named.startswith("[") else [named]:
        own = re.search(rf"`{re.escape(name)}`:\n\n```json\n(.*?)```", text(page), re.S)
        file = tmp_path / name if own else ROOT / name.replace(FOLDER, ".")
        if own:
            file.write_text(own[1])
            assert json.loads(own[1]).keys() <= config("train").keys()
        files.append(str(file))
    parser = ConfigParser(ConfigParser.load_config_files(files))
    assert not [key for key in given if key not in NOT_KEYS and key not in parser]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_table_of_overlays_is_the_files(name: str) -> None:
    """What finetune.json and lite.json set, less the blocks."""
    expected = {key: value for key, value in config(name).items() if "#" not in key and not isinstance(value, dict)}
    column = 1 + OVERLAYS.index(name)
    table = rows("train", "| key | `finetune.json` | `lite.json` |")
    assert {code(row[0]): json.loads(code(row[column])) for row in table if row[column]} == expected


def parsed(*names: str) -> ConfigParser:
    """Configs, a later over an earlier."""
    return ConfigParser(ConfigParser.load_config_files([ROOT / "configs" / f"{name}.json" for name in names]))


def test_the_table_of_sizes_is_the_networks() -> None:
    """Channels, blocks and parameters of all sizes; weights of both losses."""
    table = rows("network_and_loss", "| size |")
    for (_, _, *sizes, n_parameters), overlay in zip(table, ([], ["lite"], ["maisi"]), strict=True):
        parser = parsed("train", *overlay)
        assert [json.loads(code(cell)) for cell in sizes] == [
            parser[f"network_def#{key}"] for key in ("channels", "num_res_blocks")
        ]
        network = parser.get_parsed_content("network_def")
        assert f"{sum(parameter.numel() for parameter in network.parameters()):,}" == n_parameters
    for column, overlay in ((2, []), (3, ["lite"])):
        parser = parsed("train", *overlay)
        weights = [json.loads(code(row[column])) for row in rows("network_and_loss", "| term |")]
        assert weights == [parser[f"{term}_weight"] for term in ("recon", "mse", "kl", "perceptual", "equivariance")]


def test_the_table_of_criteria_is_the_check() -> None:
    """Every criterion of the pre-flight check, in its order."""
    names = ["label", "unique", "exists", "opens", *HEADER_CRITERIA, *DATA_CRITERIA]
    assert [code(name) for name, _ in rows("cohort", "| criterion |")] == names


@functools.cache
def _literals() -> str:
    """All texts of scripts/ and of the examples, f-strings joined, a NUL where a value is put in."""
    texts = []
    for file in [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "docs").glob("*/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.parametrize(("page", "message"), MESSAGES)
def test_a_quoted_message_is_one_of_the_code(page: str, message: str) -> None:
    """Every part of it between `...` stands in our code."""
    assert [part for part in message.split("...") if part.strip(" ") not in _literals()] == []


def test_the_examples_of_cohorts_are_read(tmp_path: Path) -> None:
    """CSV and JSON of cohort.md give the subjects, labels and splits that the page says; the BIDS tree is BIDS with two
    subjects; the other folder holds a FreeSurfer subject and a plain scan."""
    (table,), (datalist,), (bids, folder) = (blocks("cohort", kind) for kind in ("csv", "json", "text"))
    names = re.findall(r"scans/\w+\.nii\.gz|(?<=^/)data/.*", f"{table}{datalist}\n{bids}{folder}", re.M)
    for name in [*names, "data/recon-all/bert/mri/aseg.mgz"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "study.csv").write_text(table)
    (tmp_path / "study.json").write_text(datalist)
    (tmp_path / "data/study/participants.tsv").unlink()  # empty here; needed for labels alone
    by_table = read_cohort(str(tmp_path / "study.csv"), label="group")
    assert [record["subject"] for record in by_table] == ["a", "a", "b", "c"]
    assert [record["split"] for record in by_table[:3]] == ["train", "train", "val"]
    by_datalist = read_cohort(str(tmp_path / "study.json"), label="group")
    assert {(record["label"], record["split"]) for record in by_datalist} >= {("patient", "train"), ("control", "val")}
    assert recognise(tmp_path / "data/study") == "bids"
    study = read_cohort(str(tmp_path / "data/study"))
    assert [(record["subject"], record["session"]) for record in study] == [("sub-01", ""), ("sub-02", "ses-1")]
    both = [str(tmp_path / "data" / name) for name in ("recon-all", "other")]
    assert {record["subject"] for record in read_cohort(both)} == {"bert", "s001_t1"}


PROGRAM_CHECKS = {  # what programs of network_and_loss.md have to have made
    0: "assert recon.shape == (1, 1, 32, 36, 32) and mu.shape == (1, 4, 8, 9, 8)",
    3: "import nibabel\nassert home.shape[1:] == nibabel.load('SCAN').shape and mu.shape == (1, 4, 8, 9, 8)",
    4: "assert network.latent_channels == 8",
}


@pytest.mark.parametrize("number", range(5))
def test_the_programs_of_the_network_page_run(number: int, tmp_path: Path) -> None:
    """On small volumes, each in a process of its own as its reader starts it."""
    scan = write_scan(tmp_path / "scan.nii.gz")
    small = f'dataset_dir="{scan}", spatial_size=[32, 36, 32], spacing=4.0'
    program = blocks("network_and_loss", "python")[number].replace("112, 136, 112", "32, 36, 32")
    program = program.replace('dataset_dir="scan.nii.gz"', small).replace("output/python", str(tmp_path / "out"))
    check = PROGRAM_CHECKS.get(number, "").replace("SCAN", str(scan))
    command = [sys.executable, "-W", "ignore", "-c", f"{program}\n{check}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_looking_at_a_cohort(bids: Path) -> None:
    """The two one-liners of cohort.md list the cohort and check it."""
    lines = re.findall(r"^python (-c .*)$", text("cohort"), re.M)
    for line, shown in zip(lines, ("'subject': 'sub-08'", "8 good"), strict=True):
        words = shlex.split(line.replace("/data/study", str(bids)))
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
        assert shown in done.stdout


def generic(name: str) -> str:
    """A file's name with any volume's for its first part."""
    return re.sub(r"^(sub-\d\d_T1w|<name>|sample_\d{4})_", "scan_", name)


@pytest.mark.parametrize(("page", "run"), RUNS.items())
def test_a_job_leaves_the_files_of_its_page(page: str, run: str, request: pytest.FixtureRequest) -> None:
    """All of them, and no others."""
    job = request.getfixturevalue(run)
    found = {generic(path.name) for path in getattr(job, "folder", job).iterdir()}
    assert found == {generic(code(name).rstrip("/")) for name, _ in rows(page, "| file |")}


def test_tables_list_the_columns_of_the_files(
    trained: Job, evaluated: Job, reconstructed: Job, encoded: Path, sampled: Job
) -> None:
    """Of metrics.csv and summary.csv, with the systems of an evaluation; keys of a latent, figures of samples."""
    columns = {code(row[0]) for row in rows("train", "| column | unit | meaning |")}
    assert columns == set(pd.read_csv(trained.folder / "metrics.csv"))
    measured = pd.read_csv(evaluated.folder / "metrics.csv")
    columns = {code(row[0]) for row in rows("evaluate", "| column | unit | better |")}
    assert set(measured) == RECORD_KEYS | columns - {"active_units"}
    assert list(measured["system"].unique()) == [code(name) for name, _ in rows("evaluate", "| system |")]
    summary = pd.read_csv(reconstructed.folder / "summary.csv")
    assert list(summary) == [code(row[0]) for row in rows("inference", "| column | unit |")]
    keys = {key for cell, _ in rows("encode", "| key | what it is |") for key in re.findall(r"`(\w+)`", cell)}
    assert keys == set(read_header(encoded / "sub-01_T1w_latent.safetensors"))
    names = {name for cell, _ in rows("sample", "| figure | meaning |") for name in re.findall(r"`(\w+)`", cell)}
    assert names == set(json.loads((sampled.folder / "figures.json").read_text())) - {"n_samples", "n_real"}


def test_the_diffusion_page_runs(encoded: Path, weights: Path, tmp_path: Path) -> None:
    """Its Python and its command, on tiny latents of a tiny network: a sample comes out as NIfTI."""
    (program,) = blocks("diffusion", "python")
    for there, here in (
        ("output/latents", str(encoded)), ("models/model.pt", str(weights)), ("output/diffusion", str(tmp_path)),
        ("num_inference_steps=10", "num_inference_steps=2"),
        ('parser.get_parsed_content("network_def")', "__import__('scripts.networks').networks.BrainVAE(**TINY_VAE)"),
    ):  # fmt: skip
        assert there in program
        program = program.replace(there, here)
    exec(program, {"TINY_VAE": TINY_VAE})  # the page's own text
    assert nib.load(tmp_path / "sample.nii.gz").shape == (32, 36, 32)
    (commands,) = blocks("diffusion", "bash")
    for command in commands.replace("output/latents", str(encoded)).replace("output/", f"{tmp_path}/").splitlines():
        subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)
    assert len(list((tmp_path / "pickles").glob("*.pkl"))) == 8


def test_a_job_runs_from_another_folder(weights: Path, tmp_path: Path) -> None:
    """The block of inference.md, by a shell in another folder."""
    write_scan(tmp_path / "scan.nii.gz")
    block = next(block for block in blocks("inference", "bash") if "PYTHONPATH" in block).rstrip()
    tiny = shlex.join([*TINY_JOB, "--weights", str(weights)])
    python = f'python() {{ {shlex.quote(sys.executable)} -W ignore "$@"; }}'  # the interpreter that runs the tests
    script = f"{python}\n{block.replace(FOLDER, shlex.quote(str(ROOT)))} {tiny}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert (tmp_path / "out" / "scan_recon.nii.gz").is_file()


def test_the_licences_name_every_weights_file() -> None:
    """data_license.txt says whose each file of models/ is."""
    licences = (ROOT / "docs" / "data_license.txt").read_text(encoding="utf-8")
    exported = (".md", ".ts", ".onnx")  # what a user made of model.pt has its licence
    assert all(f"models/{file.name}" in licences for file in (ROOT / "models").iterdir() if file.suffix not in exported)
