"""Federated training: MONAI's `MonaiAlgo` with this bundle, the client of docs/federated, and NVFlare's simulator.

The client is run with a stand-in for NVFlare's Client API, so that these tests need no NVFlare. Those marked slow run
the real one in an environment of its own, whose Python is named by NVFLARE_PYTHON; docs/federated.md says how to make
it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY_VAE, write_scan
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject

from scripts.networks import BrainVAE, read_state_dict

Run = Callable[..., subprocess.CompletedProcess[str]]
State = Mapping[str, torch.Tensor]

NVFLARE = os.environ.get("NVFLARE_PYTHON", "")
TINY = {
    "network_def#channels": [4, 8], "spatial_size": [32, 36, 32], "spacing": 4.0,
    "perceptual_weight": 0.0, "batch_size": 1, "amp": False,
}  # fmt: skip
SITES = {
    "site-1": (2, 1),
    "site-2": (4, 1),
}  # scans to train on and to validate with: a third of the steps and the rest
ROUNDS = 2
PAGE = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")


def clones(state: State) -> dict[str, torch.Tensor]:
    """A copy: on the CPU a state dict shares its memory with the network, which goes on training."""
    return {name: value.clone() for name, value in state.items()}


def average(states: Mapping[str, State], weights: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The weighted average of state dicts."""
    shares = torch.tensor([weights[name] for name in states], dtype=torch.float64) / sum(weights.values())
    return {
        key: torch.tensordot(shares, torch.stack([state[key].double() for state in states.values()]), dims=1).float()
        for key in next(iter(states.values()))
    }


class StandInServer(ModuleType):
    """`nvflare.client` for one site: it sends the weights back that it got, for `ROUNDS` rounds, then asks to validate.

    Args:
        start: the first global weights.
    """

    def __init__(self, start: State) -> None:
        super().__init__("nvflare.client")
        self.weights, self.tasks = clones(start), ["train"] * ROUNDS + ["validate"]
        self.answers: list[SimpleNamespace] = []

    def init(self) -> None:
        """Nothing to set up."""

    def get_site_name(self) -> str:
        """The only site."""
        return "site-2"

    def is_running(self) -> bool:
        """Until every task is answered."""
        return len(self.answers) < len(self.tasks)

    def is_evaluate(self) -> bool:
        """Whether the task is the last, of validation."""
        return self.tasks[len(self.answers)] == "validate"

    def receive(self) -> SimpleNamespace:
        """The global weights."""
        return SimpleNamespace(params=clones(self.weights))

    def FLModel(self, **given: Any) -> SimpleNamespace:  # noqa: N802, the name is NVFlare's
        """What a site sends."""
        return SimpleNamespace(**given)

    def send(self, model: SimpleNamespace) -> None:
        """The average over one site is its own weights."""
        if hasattr(model, "params"):
            model.params = self.weights = clones(model.params)
        self.answers.append(model)


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
    spec = importlib.util.spec_from_file_location("federated_client", ROOT / "docs" / "federated" / "client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_files(study: Path) -> list[str]:
    """What all sites have in common."""
    return ["configs/train.json", str(study / "tiny.json")]


def plainly(study: Path, site: str, weights: Path, output: Path, *more: str) -> list[str]:
    """Arguments of `monai.bundle run` for a training of one site's scans without any federation."""
    return [
        "--config_file", str([*config_files(study), str(study / f"{site}.json")]), "--output_dir", str(output),
        "--weights", str(weights), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain(study: Path, weights: Path, run_bundle: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of `monai.bundle run` on the scans of one site."""
    output = tmp_path_factory.mktemp("plain")
    run_bundle(*plainly(study, "site-2", weights, output, "--epochs", str(ROUNDS)))
    return output


def network_after(plain: Path, epoch: int) -> State:
    """The network of a plain training, not its EMA, after an epoch."""
    return torch.load(plain / "checkpoints" / f"epoch_{epoch:04d}.pt", weights_only=True)["objects"]["network"]


@pytest.fixture(scope="module")
def served(study: Path, weights: Path) -> StandInServer:
    """The stand-in after it was served by the client, with the same scans."""
    server = StandInServer(read_state_dict(weights))
    with pytest.MonkeyPatch.context() as monkeypatch:
        client_with(server, monkeypatch).main(config_files(study), str(study / "site-2.json"), ROUNDS, 1)
    return server


def test_monai_algo_trains_evaluates_and_returns_weights(
    study: Path, weights: Path, plain: Path, served: StandInServer, tmp_path: Path
) -> None:
    """MONAI's class alone, told the number of rounds: a round of one epoch is one of `monai.bundle run`, to the bit."""
    settings = {**TINY, "dataset_dir": str(study / "site-2.csv"), "device": "cpu", "output_dir": str(tmp_path)}
    settings["epochs"] = ROUNDS
    algo = MonaiAlgo(
        str(ROOT), send_weight_diff=False, train_kwargs=settings, config_evaluate_filename="configs/train.json",
        eval_kwargs={**settings, "writer#log_dir": str(tmp_path / "global")},
    )  # fmt: skip
    algo.initialize()
    start = read_state_dict(weights)
    metrics = algo.evaluate(ExchangeObject(weights=start)).metrics
    algo.train(ExchangeObject(weights=start))
    returned = algo.get_weights()
    algo.finalize()

    expected = network_after(plain, 1)
    assert returned.weights.keys() == expected.keys()
    assert all(torch.equal(returned.weights[name], value) for name, value in expected.items())
    assert any(not torch.equal(start[name], value) for name, value in expected.items())
    assert returned.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == SITES["site-2"][0]
    assert metrics == served.answers[0].metrics and "val_psnr_brain" in metrics


def test_one_site_alone_is_plain_training(study: Path, plain: Path, served: StandInServer) -> None:
    """Two rounds of the client, whose weights come back unchanged, are two epochs: weights, schedule, EMA, figures."""
    for number in range(ROUNDS):
        sent = served.answers[number]
        assert all(torch.equal(sent.params[name], value) for name, value in network_after(plain, number + 1).items())
        assert sent.meta == {"NUM_STEPS_CURRENT_ROUND": SITES["site-2"][0]}
    output = study / "out" / "site-2"
    assert (output / "metrics.csv").read_bytes() == (plain / "metrics.csv").read_bytes()
    assert not list(output.rglob("*.pt"))


def test_what_a_site_reports_is_the_validation_of_the_global_weights(
    study: Path, served: StandInServer, run_bundle: Run, tmp_path: Path
) -> None:
    """The figures sent for the last weights, without weights, are those of `configs/evaluate.json`."""
    torch.save({"model": served.weights}, tmp_path / "last.pt")
    psnr_brain, l1 = evaluated(run_bundle, study, "site-2", tmp_path / "last.pt", tmp_path)
    reported = served.answers[-1].metrics
    assert reported["val_psnr_brain"] == pytest.approx(psnr_brain, abs=1e-4)
    assert reported["val_l1"] == pytest.approx(l1, abs=1e-6)
    assert not hasattr(served.answers[-1], "params")


def evaluated(run_bundle: Run, study: Path, site: str, weights: Path, output: Path) -> tuple[float, float]:
    """Mean psnr_brain and l1 of `configs/evaluate.json` over the site's validation scans."""
    arguments = plainly(study, site, weights, output, "--baselines", "[]", "--split", "val")
    run_bundle(*[argument.replace("train.json", "evaluate.json") for argument in arguments])
    table = pd.read_csv(output / "metrics.csv").query("system == 'model'")
    return table["psnr_brain"].mean(), table["l1"].mean()


@pytest.mark.parametrize("key", ["bundle_root", "dataset_dir", "output_dir"])
def test_a_site_file_without_a_key_is_named(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Without `dataset_dir` a hospital would train on the demo cohort and not notice."""
    content = json.loads((study / "site-1.json").read_text())
    del content[key]
    (tmp_path / "site.json").write_text(json.dumps(content))
    client = client_with(StandInServer({}), monkeypatch)
    with pytest.raises(ValueError, match=f"site.json has no {key}"):
        client.site_algo(config_files(study), str(tmp_path / "site.json"), "site-1", ROUNDS, 1)


def test_the_program_of_the_page_runs(study: Path, weights: Path, tmp_path: Path) -> None:
    """`MonaiAlgo` without NVFlare, as docs/federated.md has it, on tiny heads."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    tiny = f"settings = {TINY} | {{'device': 'cpu', "
    for there, here in (
        ("settings = {", tiny), ("/data/study", str(study / "site-1.csv")), ("/data/federated", str(tmp_path)),
    ):  # fmt: skip
        assert there in program
        program = program.replace(there, here)
    program += f"\nassert algo.trainer.state.iteration == {SITES['site-1'][0]} and metrics['val_psnr_brain'] > 0"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_table_of_arguments_is_the_script() -> None:
    """Names, order and defaults of job.py."""
    tree = ast.parse((ROOT / "docs" / "federated" / "job.py").read_text())
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    table = re.findall(r"^\| `--(\w+)` \| (.*?) \|", PAGE, re.M)
    assert [name for name, _ in table] == [argument.arg for argument in main.args.args]
    defaults = [str(ast.literal_eval(default)) or "none" for default in main.args.defaults]
    assert [default.strip("`") for _, default in table[1:]] == defaults and table[0][1] == ""


def test_all_that_is_exchanged_can_be_averaged() -> None:
    """The state dict holds parameters alone: no running statistics, no counters."""
    network = BrainVAE(**TINY_VAE)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.fixture(scope="module")
def federation(study: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of job.py: two sites, two rounds, in NVFlare's simulator."""
    if not NVFLARE:
        pytest.skip("NVFLARE_PYTHON names no Python with NVFlare; docs/federated.md says how to make one")
    workspace = tmp_path_factory.mktemp("flare")
    sites = {site: str(study / f"{site}.json") for site in SITES}
    command = [
        NVFLARE, "-W", "ignore", "docs/federated/job.py", "--sites", str(sites), "--config_file",
        str(config_files(study)), "--num_rounds", str(ROUNDS), "--weights", str(weights), "--workspace", str(workspace),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return workspace


def server_file(federation: Path, name: str) -> Path:
    """A file of NVFlare's server."""
    return federation / "brain_t1_vae" / "server" / "simulate_job" / name


@pytest.mark.slow
def test_the_simulator_starts_from_the_given_weights(federation: Path, weights: Path) -> None:
    """The first global model is the file of `--weights`."""
    first, given = read_state_dict(federation / "first_model.pt"), read_state_dict(weights)
    assert first.keys() == given.keys() and all(torch.equal(first[name], value) for name, value in given.items())


@pytest.mark.slow
def test_the_global_model_is_the_weighted_average(
    federation: Path, study: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each round, of what two clients with the same scans return when nobody but this test averages."""
    client = client_with(StandInServer({}), monkeypatch)
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
        averaged = average(returned, {site: n_train for site, (n_train, _) in SITES.items()})
        state = read_state_dict(server_file(federation, f"app_server/{name}"))
        assert state.keys() == averaged.keys()
        for key, value in state.items():
            # The server adds in fp32 and in the order in which the sites answer.
            torch.testing.assert_close(value, averaged[key], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_client_sees_its_own_scans_alone(federation: Path, study: Path) -> None:
    """What each folder's pre-flight check has read are the site's scans; the steps are those of its training scans."""
    for site, counts in SITES.items():
        passed = json.loads((study / "out" / site / "preflight.json").read_text())["passed"]
        scans = [scan.stat() for scan in (study / site).iterdir()]
        assert sorted(passed.values()) == sorted([scan.st_size, scan.st_mtime_ns] for scan in scans)
        assert len(scans) == sum(counts)
    lines = server_file(federation, "metrics/round_metrics.jsonl").read_text().splitlines()
    for line in lines:
        steps = {site["name"]: site["weight"] for site in json.loads(line)["sites"]}
        assert steps == {site: n_train for site, (n_train, _) in SITES.items()}


@pytest.mark.slow
def test_validation_figures_are_written(federation: Path) -> None:
    """Of both rounds, and of the last model; training has made them better."""
    lines = [json.loads(line) for line in server_file(federation, "metrics/round_metrics.jsonl").open()]
    assert [line["round"] for line in lines] == list(range(ROUNDS))
    last = json.loads(server_file(federation, "cross_site_val/cross_val_results.json").read_text())
    assert last.keys() == SITES.keys()
    for site, models in last.items():
        rounds = [
            metric["value"] for line in lines for row in line["sites"] if row["name"] == site
            for metric in row["metrics"] if metric["name"] == "val_psnr_brain"
        ]  # fmt: skip
        assert rounds[0] < rounds[1] < models["SRV_FL_global_model.pt"]["val_psnr_brain"]


@pytest.mark.slow
def test_the_global_model_runs_in_the_bundle(federation: Path, study: Path, run_bundle: Run, tmp_path: Path) -> None:
    """NVFlare's file is a weights file as it is: the figure of `configs/evaluate.json` is the client's."""
    file = server_file(federation, "app_server/FL_global_model.pt")
    last = json.loads(server_file(federation, "cross_site_val/cross_val_results.json").read_text())
    reported = last["site-1"]["SRV_FL_global_model.pt"]["val_psnr_brain"]
    assert evaluated(run_bundle, study, "site-1", file, tmp_path)[0] == pytest.approx(reported, abs=1e-4)


@pytest.mark.slow
def test_an_exported_job_holds_no_path_of_this_machine_but_the_given(study: Path, tmp_path: Path) -> None:
    """`--export`: server and client apps with the first weights and the script, for the admin of a real federation."""
    if not NVFLARE:
        pytest.skip("NVFLARE_PYTHON names no Python with NVFlare; docs/federated.md says how to make one")
    command = [
        NVFLARE, "-W", "ignore", "docs/federated/job.py", "--sites", "{'a': '/site/a.json', 'b': '/site/b.json'}",
        "--workspace", str(tmp_path / "workspace"), "--export", "--export-dir", str(tmp_path / "job"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    job = tmp_path / "job" / "brain_t1_vae"
    assert len(list(job.rglob("first_model.pt"))) == 1 and len(list(job.rglob("client.py"))) == 2
    texts = [path.read_text() for path in job.rglob("*") if path.suffix in (".json", ".py")]
    assert sum("/site/a.json" in text for text in texts) == 1
    assert not any(str(ROOT) in text or str(tmp_path) in text for text in texts)
