"""Federated training of this bundle with NVFlare: simulated on this machine, or exported for a real federation.

From the bundle's folder, with one file a site that says where its scans are:

    python docs/federated/job.py --sites "{'site-1': 'site-1.json', 'site-2': 'site-2.json'}" --num_rounds 2

With `--export --export-dir FOLDER`, NVFlare's own, nothing is run and the job is written to FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import fire
import torch
from monai.bundle import ConfigWorkflow
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv
from nvflare.recipe.utils import add_final_global_evaluation, set_per_site_config

HERE = Path(__file__).resolve().parent


def save_first_weights(config_file: Sequence[str], weights: str, path: Path) -> None:
    """Write what the configs begin a training with: random weights of their seed, or their `weights`.

    Args:
        config_file: `configs/train.json` and overlays.
        weights: a weights file to use instead; "" for none.
        path: where to write.
    """
    sys.path.insert(0, str(HERE.parents[1]))
    given = {"weights": weights} if weights else {}
    workflow = ConfigWorkflow(
        config_file=list(config_file), workflow_type="train", logging_file=False, device="cpu", **given
    )
    workflow.initialize()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": workflow.network_def.state_dict()}, path)


def main(
    sites: Mapping[str, str],
    config_file: str | Sequence[str] = "configs/train.json",
    num_rounds: int = 2,
    local_epochs: int = 1,
    weights: str = "",
    workspace: str = "output/federated",
) -> None:
    """Run the job in NVFlare's simulator.

    Args:
        sites: name of each site to its file, as that site finds it.
        config_file: `configs/train.json` and overlays, the same at every site.
        num_rounds: how often weights are exchanged.
        local_epochs: epochs of each site between two exchanges.
        weights: the weights to start from, such as `models/model.pt`; empty: those that the configs name, or random.
        workspace: NVFlare's folder.
    """
    config_file = [config_file] if isinstance(config_file, str) else list(config_file)
    first = Path(workspace) / "first_model.pt"
    save_first_weights(config_file, weights, first)
    recipe = FedAvgRecipe(
        name="brain_t1_vae",
        min_clients=len(sites),
        num_rounds=num_rounds,
        train_script=os.path.relpath(HERE / "client.py"),  # a whole path would be looked up at the sites
        # The server only averages tensors by name: it needs the file, not the network.
        model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=first.name),
        key_metric="val_psnr_brain",
    )
    files = json.dumps(config_file, separators=(",", ":"))  # NVFlare splits the arguments at every space
    common = f"--config_file {files} --num_rounds {num_rounds} --local_epochs {local_epochs}"
    set_per_site_config(recipe, {name: {"train_args": f"{common} --site_file {file}"} for name, file in sites.items()})
    recipe.add_server_file(str(first))
    add_final_global_evaluation(recipe)
    run = recipe.execute(SimEnv(clients=list(sites), workspace_root=workspace))
    if run is not None:
        print(f"results: {run.get_result()}")


if __name__ == "__main__":
    fire.Fire(main)
