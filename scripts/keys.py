"""Every key that a user may change, job by job: a help on the command line, and the table of docs/keys.md.

    python -m scripts.keys show --job train
    python -m scripts.keys write

Keys and defaults are the configs'; what a key means is written by hand in the last column of docs/keys.md.
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
ROW = re.compile(r"^\| `(\w+)` \| `.*` \| (.*?) \| (.*) \|$", re.M)
TABLE = re.compile(r"(?<=\| key \| default \| jobs \| meaning \|\n\|---\|---\|---\|---\|\n)(?:\|.*\n)*")
OVERLAYS = re.compile(r"(?<=\| file \| what it sets \|\n\|---\|---\|\n)(?:\|.*\n)*")


def job_keys(job: str) -> list[tuple[str, str, str]]:
    """Keys of a job: key, default as JSON, meaning; in the config's order.

    Raises:
        InputError: there is no such job, or the page has no meaning for a key.
    """
    if job not in JOBS:
        raise InputError(f"'job' is {job!r}; give one of {', '.join(JOBS)}.")
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    config = json.loads((ROOT / "configs" / f"{job}.json").read_text(encoding="utf-8"))
    names = list(config)
    keys = []
    for key in names[: names.index("network_def")]:
        meanings = {jobs: meaning for name, jobs, meaning in rows if name == key}
        own = [meaning for jobs, meaning in meanings.items() if f"[{job}]" in jobs or jobs == "all"]
        if len(own or set(meanings.values())) != 1:
            raise InputError(f"docs/keys.md does not say what {key} means for {job}; add a row for it to the table.")
        keys.append((key, json.dumps(config[key]), (own or [*meanings.values()])[0]))
    return keys


def keys_page() -> str:
    """The page with defaults, jobs and overlays as they now are; a key's lines stand where it first appears."""
    jobs_of: dict[tuple[str, str, str], list[str]] = {}
    for job in JOBS:
        for row in job_keys(job):
            jobs_of.setdefault(row, []).append(job)
    places: dict[str, int] = {}
    for key, *_ in jobs_of:
        places.setdefault(key, len(places))
    lines = ""
    for key, default, meaning in sorted(jobs_of, key=lambda row: places[row[0]]):
        jobs = jobs_of[key, default, meaning]
        which = "all" if len(jobs) == len(JOBS) else ", ".join(f"[{job}]({job}.md)" for job in jobs)
        lines += f"| `{key}` | `{default}` | {which} | {meaning} |\n"
    overlays = ""
    for path in sorted((ROOT / "configs").glob("*.json")):
        if path.stem not in NOT_OVERLAYS:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            overlays += f"| `configs/{path.name}` | {', '.join(f'`{key}`' for key in content)} |\n"
    page = TABLE.sub(lambda _: lines, PAGE.read_text(encoding="utf-8"), count=1)
    return OVERLAYS.sub(lambda _: overlays, page, count=1)


def show(job: str) -> None:
    """Print a job's keys."""
    for key, default, meaning in job_keys(job):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", meaning).replace("`", "")
        print(f"--{key}  (default {default})\n    {plain}")


def write() -> None:
    """Refresh docs/keys.md."""
    page = keys_page()
    with replacing(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    report_input_errors()
    fire.Fire({"show": show, "write": write})
