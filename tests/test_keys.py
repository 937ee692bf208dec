"""The page of all keys is that of the configs as they are now."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

from scripts.keys import JOBS, PAGE, job_keys, keys_page, show
from scripts.run import InputError


def test_the_page_is_current():
    """After a change of a config or of a job's page: python -m scripts.keys write."""
    assert PAGE.read_text(encoding="utf-8") == keys_page()


@pytest.mark.parametrize("job", JOBS)
def test_every_key_is_shown_with_its_default(job, capsys):
    show(job)
    shown = capsys.readouterr().out
    config = json.loads((ROOT / "configs" / f"{job}.json").read_text())
    for key, default, meaning in job_keys(job):
        assert f"--{key}  (default {default})" in shown
        assert json.loads(default) == config[key] and meaning.strip()
    assert "](" not in shown, "no links on the command line"


def test_another_job_is_named():
    with pytest.raises(InputError, match="give one of train, evaluate"):
        job_keys("training")
