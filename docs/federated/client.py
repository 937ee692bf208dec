"""What each site of a federated training runs: NVFlare's Client API around MONAI's `MonaiAlgo`.

NVFlare starts this file at every site, with the arguments that `job.py` has written into the job. Each round it
receives the global weights, validates them on the site's own scans, trains on them from this bundle's `train.json`,
and sends the weights back. Scans, optimizer, EMA and schedule stay here for as long as the job runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import fire
import nvflare.client as flare
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject


def site_algo(config_file: Sequence[str], site_file: str, name: str, num_rounds: int, local_epochs: int) -> MonaiAlgo:
    """Build trainer and evaluator of one site.

    Args:
        config_file: `configs/train.json` and overlays, relative to the bundle.
        site_file: the site's own overlay, with `bundle_root`, `dataset_dir` and `output_dir` as whole paths, because
            NVFlare starts this in a folder of its own.
        name: the site's name; files are written to a folder of this name in `output_dir`.
        num_rounds: rounds of the whole training, for the learning rate's schedule.
        local_epochs: epochs a round.

    Returns:
        The algorithm, initialised.

    Raises:
        ValueError: the site's file lacks a key; without `dataset_dir` the demo cohort would be used unnoticed.
    """
    site = ConfigParser.load_config_file(site_file)
    missing = [key for key in ("bundle_root", "dataset_dir", "output_dir") if not site.get(key)]
    if missing:
        raise ValueError(f"{site_file} has no {' and no '.join(missing)}; give this site's own.")
    sys.path.insert(0, site["bundle_root"])
    settings: dict[str, Any] = {
        "output_dir": f"{site['output_dir']}/{name}",
        "weights": "",  # they come from the server
        "epochs": num_rounds * local_epochs,
        "finalize": ["$@writer.close()"],
    }
    files = [*config_file, site_file]
    algo = MonaiAlgo(
        site["bundle_root"],
        local_epochs=local_epochs,
        send_weight_diff=False,
        config_train_filename=files,
        train_kwargs=settings,
        config_evaluate_filename=files,
        eval_kwargs={**settings, "writer#log_dir": "$@output_dir + '/tensorboard_global'"},
    )
    algo.initialize({ExtraItems.CLIENT_NAME: name})
    return algo


def main(config_file: Sequence[str], site_file: str, num_rounds: int, local_epochs: int) -> None:
    """Answer the server until it ends the job.

    Args:
        config_file: see `site_algo`.
        site_file: see `site_algo`.
        num_rounds: see `site_algo`.
        local_epochs: see `site_algo`.
    """
    flare.init()
    algo = site_algo(config_file, site_file, flare.get_site_name(), num_rounds, local_epochs)
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        received = ExchangeObject(weights=model.params)
        metrics = {name: float(value) for name, value in algo.evaluate(received).metrics.items()}
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics=metrics))
            continue
        algo.train(received)
        update = algo.get_weights()
        # Sites weigh in the average as many optimizer steps as they have done.
        steps = {"NUM_STEPS_CURRENT_ROUND": update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]}
        flare.send(flare.FLModel(params=update.weights, metrics=metrics, meta=steps))
    algo.finalize()


if __name__ == "__main__":
    fire.Fire(main)
