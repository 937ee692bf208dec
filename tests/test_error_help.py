"""The page of errors is that of the code as it is now, and what a job says can be found on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, head, write_scan

from scripts.arguments import check_device, check_size
from scripts.cohort import read_cohort, select
from scripts.error_help import PAGE, errors_page, messages, preflight_messages
from scripts.errors import InputError, as_flag
from scripts.handlers import WarmEMA
from scripts.latents import latent_path, read_manifest
from scripts.networks import load_weights
from scripts.preflight import DATA_CRITERIA, HEADER_CRITERIA, check_cohort, check_scan
from scripts.priors import fit_prior

# Words of the messages that say what is wrong and leave the remedy to the reader; none should be added.
WITHOUT_REMEDY = (
    "there is another data set's",
)  # fmt: skip

# Mistakes that are really made, and where on the page the reader finds the sentence.
MISTAKES: dict[str, Callable[[Path], object]] = {
    "no cohort": lambda folder: read_cohort(str(folder / "none")),
    "empty folder": lambda folder: read_cohort(str(folder)),
    "label of a folder": lambda folder: read_cohort(str(write_scan(folder / "a.nii.gz").parent), label="group"),
    "fraction": lambda folder: read_cohort(str(write_scan(folder / "a.nii.gz")), val_fraction=2),
    "split": lambda folder: select([{"split": "train", "cohort": "c", "subject": "s"}], "dev"),
    "empty split": lambda folder: select([{"split": "train", "cohort": "c", "subject": "s"}], "val"),
    "checks": lambda folder: check_cohort([{"image": "a"}], "never", report_dir=folder),
    "weights": lambda folder: load_weights(torch.nn.Linear(1, 1), folder / "model.pt"),
    "size": lambda folder: check_size([1, 2, 3], "spatial_size"),
    "device": lambda folder: check_device("cuda:99"),
    "flag": lambda folder: as_flag("maybe", "resume"),
    "decay": lambda folder: WarmEMA(torch.nn.Linear(1, 1), 2),
    "shards": lambda folder: latent_path(folder, "a", -1),
    "manifest": lambda folder: list(read_manifest(folder)),
    "prior": lambda folder: fit_prior("normal", [], [4, 8, 9, 8]),
}
BAD_SCANS: dict[str, tuple[str, np.ndarray, float]] = {
    "one volume": ("a.nii.gz", np.ones((30, 30, 30, 5), np.int16), 4),
    "spacing": ("a.nii.gz", head(0), 40),
    "field of view": ("a.nii.gz", head(0)[:5], 4),
    "not empty": ("a.nii.gz", np.zeros((36, 44, 36), np.int16), 4),
    "not constant": ("a.nii.gz", np.full((36, 44, 36), 7, np.int16), 4),
    "bright": ("a.nii.gz", -head(0), 4),
}


EVERYTHING, CRITERIA = messages(), preflight_messages()


def matches(template: str, sentence: str) -> bool:
    """Whether a sentence is the template with something in each place."""
    pattern = ".+?".join(re.escape(part) for part in re.split(r"<[^>]*>", template))
    return re.fullmatch(pattern, sentence, re.S) is not None


def test_the_page_is_current() -> None:
    """After a change of a message: python -m scripts.error_help write."""
    assert PAGE.read_text(encoding="utf-8") == errors_page()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_raised_stands_on_the_page(mistake: str, tmp_path: Path) -> None:
    """The sentence itself, as one of the templates, whose two parts are cells of the page."""
    with pytest.raises(InputError) as error:
        MISTAKES[mistake](tmp_path)
    found = [message for message in EVERYTHING if matches(message.text, str(error.value))]
    assert found, str(error.value)
    assert all(f"`{message.parts[0]}` | " in PAGE.read_text(encoding="utf-8") for message in found)


@pytest.mark.parametrize("criterion", BAD_SCANS)
def test_what_the_check_says_stands_on_the_page(criterion: str, tmp_path: Path) -> None:
    """Beside its criterion."""
    name, volume, spacing = BAD_SCANS[criterion]
    nib.save(nib.Nifti1Image(volume, np.diag([spacing, spacing, spacing, 1.0])), tmp_path / name)
    failed, sentence = check_scan(tmp_path / name) or ("", "")
    assert failed == criterion
    assert any(name == criterion and matches(message.text, sentence) for name, message in CRITERIA)


def test_every_criterion_has_a_line() -> None:
    """Those of the file, of the header and of the voxels, in their order."""
    names = ["label", "unique", "exists", "opens", *HEADER_CRITERIA, *DATA_CRITERIA]
    assert list(dict.fromkeys(name for name, _ in CRITERIA)) == names


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_no_place_that_raises_is_missed(path: Path) -> None:
    """As many places by a plain search as by the syntax tree, less those that only pass on another's text."""
    source = path.read_text(encoding="utf-8")
    passed_on = len(re.findall(r'\bInputError\(f"\{\w+\} \{\w+\}"\)', source))
    places = len(re.findall(r"\bInputError\((?!ValueError\))", source)) - passed_on
    assert len([message for message in EVERYTHING if message.module == path.stem]) >= places


def test_every_message_says_what_to_do() -> None:
    """Less those that are named above."""
    without = {message.text for message in EVERYTHING if not message.parts[1]}
    assert not {text for text in without if not any(words in text for words in WITHOUT_REMEDY)}
    assert len(without) == len(WITHOUT_REMEDY), "one was mended: take it out of the list"


@pytest.mark.parametrize(
    "text",
    [
        "'dtype' is <dtype>; give float16 or float32.",  # choices
        "'<key>' is <size>; give three positive multiples of 4.",  # a constant
        "is empty (0 bytes); copy or export it again.",
        "<path> was made with another <changed>; add --overwrite True or give another output_dir.",  # a choice of texts
        "<path> lists <number> of <number> scans that do not exist (<missing>; and <number> more); mend the paths "
        "(relative ones are read from the folder <folder>).",  # a part that may be empty
        "The cohort's form is <form>; give one of auto, bids, csv, datalist, folder, file.",  # a parameter
    ],
)
def test_what_is_fixed_is_filled_in(text: str) -> None:
    """Templates as a reader wants them."""
    assert text in {message.text for message in [*EVERYTHING, *(message for _, message in CRITERIA)]}
