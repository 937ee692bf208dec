"""Every key that a user may change, job by job: a help on the command line, and the page docs/keys.md.

    python -m scripts.command_help show --job train
    python -m scripts.command_help write

Keys and defaults are read from the configs, meanings from the tables of the jobs' pages.
"""

from __future__ import annotations

import json
import re
from typing import Any

import fire

from scripts.conventions import ROOT
from scripts.run import InputError, replacing, report_input_errors

__all__ = ["JOBS", "job_keys", "keys_page", "show", "write"]

PAGE = ROOT / "docs" / "keys.md"
JOBS = ("train", "evaluate", "inference", "encode", "decode", "sample")
NOT_OVERLAYS = ("metadata", "tracking", *JOBS)
HEAD = """# Every key

What each config lets you change on the command line (`--key value`) or in a config of your own, with its default. This
page is made from the configs by `python -m scripts.command_help write`; `python -m scripts.command_help show --job
train` prints one job's keys.

A default that begins with `$` is computed; `@` stands for another key. Values inside a block are reached with `#`:
`--network_def#channels "[16, 32, 64]"`, `--optimizer#weight_decay 0.01`, `--train#trainer#max_epochs 5`.

| key | default | jobs | meaning |
|---|---|---|---|
"""
OVERLAY_HEAD = """
## Overlays

Config files that change only some values of a job: `--config_file "['configs/train.json','configs/finetune.json']"`.

| file | what it sets |
|---|---|
"""


def job_keys(job: str) -> list[tuple[str, str, str]]:
    """Keys of a job: key, default as JSON, meaning; in the config's order.

    Raises:
        InputError: there is no such job, or its page has no meaning for a key.
    """
    if job not in JOBS:
        raise InputError(f"'job' is {job!r}; give one of {', '.join(JOBS)}.")
    config = json.loads((ROOT / "configs" / f"{job}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / f"{job}.md").read_text(encoding="utf-8")
    table = page.split("| key | default | meaning |", 1)[1].split("\n\n", 1)[0]
    meanings = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", table, re.M))
    names = list(config)
    keys = names[names.index("bundle_root") : names.index("network_def")]
    missing = [key for key in keys if key not in meanings]
    if missing:
        raise InputError(f"docs/{job}.md does not say what {', '.join(missing)} means; add it to its table of keys.")
    return [(key, json.dumps(config[key]), meanings[key]) for key in keys]


def keys_page() -> str:
    """The page: keys with the same default and meaning share a line."""
    jobs_of: dict[tuple[str, str, str], list[str]] = {}
    for job in JOBS:
        for row in job_keys(job):
            jobs_of.setdefault(row, []).append(job)
    places: dict[str, int] = {}  # all lines of a key stand together, where it appears first
    for key, *_ in jobs_of:
        places.setdefault(key, len(places))
    lines = []
    for key, default, meaning in sorted(jobs_of, key=lambda row: places[row[0]]):
        jobs = jobs_of[key, default, meaning]
        which = "all" if len(jobs) == len(JOBS) else ", ".join(f"[{job}]({job}.md)" for job in jobs)
        lines.append(f"| `{key}` | `{default}` | {which} | {meaning} |")
    overlays = []
    for path in sorted((ROOT / "configs").glob("*.json")):
        if path.stem not in NOT_OVERLAYS:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            overlays.append(f"| `configs/{path.name}` | {', '.join(f'`{key}`' for key in content)} |")
    return HEAD + "\n".join(lines) + "\n" + OVERLAY_HEAD + "\n".join(overlays) + "\n"


def show(job: str) -> None:
    """Print a job's keys."""
    for key, default, meaning in job_keys(job):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "")
        print(f"--{key}  (default {default})\n    {plain}")


def write() -> None:
    """Write docs/keys.md."""
    with replacing(PAGE) as temporary:
        temporary.write_text(keys_page(), encoding="utf-8")


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"show": show, "write": write})
