"""Federated training: MONAI's `MonaiAlgo` with this bundle, the client of docs/federated, and NVFlare's simulator.

The client runs with a stand-in for NVFlare's Client API. Slow tests run the real one in an environment of its own;
NVFLARE_PYTHON names its Python (docs/federated.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, RunBundle, write_scan
from monai.fl.utils.exchange_object import ExchangeObject

from scripts.networks import read_state_dict

State = Mapping[str, torch.Tensor]

NVFLARE = os.environ.get("NVFLARE_PYTHON", "")
TINY = {
    "network_def#channels": [4, 8], "spatial_size": [32, 36, 32], "spacing": 4.0,
    "perceptual_weight": 0.0, "batch_size": 1, "amp": False,
}  # fmt: skip
SITES = {"site-1": (2, 1), "site-2": (4, 1)}  # scans to train on and to validate with: a third of the steps, the rest
ROUNDS = 2
PAGE = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")


def clones(state: State) -> dict[str, torch.Tensor]:
    """A copy: on the CPU a state dict shares its memory with the network, which goes on training."""
    return {name: value.clone() for name, value in state.items()}


def stand_in(start: State) -> Any:
    """`nvflare.client` for one site: `ROUNDS` times it sends back the weights that it got, then it asks to validate."""
    server: Any = ModuleType("nvflare.client")
    server.weights, server.answers, tasks = clones(start), [], ["train"] * ROUNDS + ["validate"]

    def send(model: SimpleNamespace) -> None:
        if hasattr(model, "params"):
            model.params = server.weights = clones(model.params)
        server.answers.append(model)

    server.init, server.get_site_name = lambda: None, lambda: "site-2"
    server.is_running = lambda: len(server.answers) < len(tasks)
    server.is_evaluate = lambda: tasks[len(server.answers)] == "validate"
    server.receive = lambda: SimpleNamespace(params=clones(server.weights))
    server.FLModel, server.send = SimpleNamespace, send
    return server


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that these tests compare with: sums in the same order."""
    before, hook, path = torch.get_num_threads(), sys.excepthook, list(sys.path)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    sys.excepthook, sys.path[:] = hook, path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites with tiny heads of their own, a file for each, and the overlay `tiny.json` for all."""
    root = tmp_path_factory.mktemp("study")
    number = 0
    for site, (n_train, n_val) in SITES.items():
        rows = []
        for split in ["train"] * n_train + ["val"] * n_val:
            scan = write_scan(root / site / f"sub-{number:02d}_T1w.nii.gz", number)
            rows.append({"image": str(scan), "subject": f"sub-{number:02d}", "split": split})
            number += 1
        pd.DataFrame(rows).to_csv(root / f"{site}.csv", index=False)
        given = {"bundle_root": ROOT, "dataset_dir": root / f"{site}.csv", "output_dir": root / "out", "device": "cpu"}
        (root / f"{site}.json").write_text(json.dumps({key: str(value) for key, value in given.items()}))
    (root / "tiny.json").write_text(json.dumps(TINY))
    return root


def client_with(server: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """docs/federated/client.py, which takes `server` for NVFlare's Client API."""
    package = ModuleType("nvflare")
    package.client = server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvflare", package)
    monkeypatch.setitem(sys.modules, "nvflare.client", server)
    spec: Any = importlib.util.spec_from_file_location("client", ROOT / "docs" / "federated" / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_files(study: Path) -> list[str]:
    """What all sites have in common."""
    return ["configs/train.json", str(study / "tiny.json")]


@pytest.fixture(scope="module")
def plain(study: Path, weights: Path, run_bundle: RunBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of `monai.bundle run` on the scans of one site, without any federation."""
    output = tmp_path_factory.mktemp("plain")
    run_bundle(
        "--config_file", str([*config_files(study), str(study / "site-2.json")]), "--output_dir", str(output),
        "--weights", str(weights), "--epochs", str(ROUNDS),
    )  # fmt: skip
    return output


def test_one_site_alone_is_plain_training(
    study: Path, weights: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of the client, whose weights come back unchanged, are two epochs, to the bit: weights (not their EMA),
    schedule, EMA, figures; what it reports is the validation of the weights that it got."""
    server = stand_in(read_state_dict(weights))
    client_with(server, monkeypatch).main(config_files(study), str(study / "site-2.json"), ROUNDS, 1)
    *rounds, last = server.answers
    for sent, file in zip(rounds, ("epoch_0001.pt", "epoch_0002.pt"), strict=True):
        expected = torch.load(plain / "checkpoints" / file, weights_only=True)["objects"]["network"]
        assert sent.params.keys() == expected.keys()
        assert all(torch.equal(sent.params[name], value) for name, value in expected.items())
        assert sent.meta == {"NUM_STEPS_CURRENT_ROUND": SITES["site-2"][0]}
    output = study / "out" / "site-2"
    assert (output / "metrics.csv").read_bytes() == (plain / "metrics.csv").read_bytes()
    assert not list(output.rglob("*.pt")) and not hasattr(last, "params")
    start = pd.read_csv(plain / "metrics.csv").iloc[0]
    assert rounds[0].metrics["val_psnr_brain"] == pytest.approx(start["val_psnr_brain"], abs=1e-4)
    assert len({answer.metrics["val_psnr_brain"] for answer in server.answers}) == ROUNDS + 1


def test_a_site_file_without_a_key_is_named(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `dataset_dir` a hospital would train on the demo cohort and not notice."""
    client, content = client_with(stand_in({}), monkeypatch), json.loads((study / "site-1.json").read_text())
    for key in ("bundle_root", "dataset_dir", "output_dir"):
        (tmp_path / "site.json").write_text(json.dumps({**content, key: ""}))
        with pytest.raises(ValueError, match=f"site.json has no {key}"):
            client.site_algo(config_files(study), str(tmp_path / "site.json"), "site-1", ROUNDS, 1)


def test_the_program_of_the_page_runs(study: Path, tmp_path: Path) -> None:
    """`MonaiAlgo` without NVFlare, as docs/federated.md has it, on tiny heads."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    tiny, scans = f"settings = {TINY} | {{'device': 'cpu', ", str(study / "site-1.csv")
    for there, here in (("settings = {", tiny), ("/data/study", scans), ("/data/federated", str(tmp_path))):
        assert there in program
        program = program.replace(there, here)
    program += f"\nassert algo.trainer.state.iteration == {SITES['site-1'][0]} and metrics['val_psnr_brain'] > 0"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_job(*arguments: str) -> None:
    """docs/federated/job.py by the Python that has NVFlare."""
    if not NVFLARE:
        pytest.skip("NVFLARE_PYTHON names no Python with NVFlare; docs/federated.md says how to make one")
    command = [NVFLARE, "-W", "ignore", "docs/federated/job.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def federation(study: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of job.py: two sites, two rounds, in NVFlare's simulator."""
    workspace = tmp_path_factory.mktemp("flare")
    run_job(
        "--sites", str({site: str(study / f"{site}.json") for site in SITES}), "--config_file",
        str(config_files(study)), "--num_rounds", str(ROUNDS), "--weights", str(weights), "--workspace", str(workspace),
    )  # fmt: skip
    return workspace


def server_file(federation: Path, name: str) -> Path:
    """A file of NVFlare's server."""
    return federation / "brain_t1_vae" / "server" / "simulate_job" / name


@pytest.mark.slow
def test_the_global_model_is_the_weighted_average(
    federation: Path, study: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each round, from the given weights on, of what two clients with the same scans return when only this test
    averages; NVFlare's files are weights files as they are."""
    client = client_with(stand_in({}), monkeypatch)
    algos = {}
    for site in SITES:
        content = json.loads((study / f"{site}.json").read_text()) | {"output_dir": str(tmp_path)}
        (tmp_path / f"{site}.json").write_text(json.dumps(content))
        algos[site] = client.site_algo(config_files(study), str(tmp_path / f"{site}.json"), site, ROUNDS, 1)
    state: dict[str, torch.Tensor] = read_state_dict(weights)
    # The best model is the one validated last, that of the first round; the final one is that of the second.
    for name in ("best_FL_global_model.pt", "FL_global_model.pt"):
        returned = {}
        for site, algo in algos.items():
            algo.train(ExchangeObject(weights=clones(state)))
            returned[site] = clones(algo.get_weights().weights)
        assert any(not torch.equal(returned["site-1"][key], returned["site-2"][key]) for key in state)
        first, second = (returned[site] for site in SITES)
        state = read_state_dict(server_file(federation, f"app_server/{name}"))
        assert state.keys() == first.keys()
        for key, value in state.items():
            # The server adds in fp32 and in the order in which the sites answer.
            averaged = ((2 * first[key].double() + 4 * second[key].double()) / 6).float()
            torch.testing.assert_close(value, averaged, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_client_sees_its_own_scans_alone(federation: Path, study: Path) -> None:
    """What each folder's pre-flight check has read are the site's scans; the steps are those of its training scans."""
    for site, counts in SITES.items():
        passed = json.loads((study / "out" / site / "preflight.json").read_text())["passed"]
        scans = [scan.stat() for scan in (study / site).iterdir()]
        assert sorted(passed.values()) == sorted([scan.st_size, scan.st_mtime_ns] for scan in scans)
        assert len(scans) == sum(counts)
    for line in server_file(federation, "metrics/round_metrics.jsonl").open():
        steps = {site["name"]: site["weight"] for site in json.loads(line)["sites"]}
        assert steps == {site: n_train for site, (n_train, _) in SITES.items()}


@pytest.mark.slow
def test_an_exported_job_holds_no_path_of_this_machine_but_the_given(tmp_path: Path) -> None:
    """`--export`: server and client apps with the first weights and the script, for the admin of a real federation."""
    run_job(
        "--sites", "{'a': '/site/a.json', 'b': '/site/b.json'}", "--workspace", str(tmp_path / "workspace"), "--export",
        "--export-dir", str(tmp_path / "job"),
    )  # fmt: skip
    job = tmp_path / "job" / "brain_t1_vae"
    assert len(list(job.rglob("first_model.pt"))) == 1 and len(list(job.rglob("client.py"))) == 2
    texts = [path.read_text() for path in job.rglob("*") if path.suffix in (".json", ".py")]
    assert sum("/site/a.json" in text for text in texts) == 1
    assert not any(str(ROOT) in text or str(tmp_path) in text for text in texts)
