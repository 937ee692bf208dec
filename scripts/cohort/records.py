"""From what a user points at (a scan, folder, table, MONAI datalist or BIDS root) to one list of records.

Every config reads its cohort here and hands the records to the pre-flight check and to MONAI's datasets. A record is
a dict of texts with the keys image, name, subject, session, label, split and cohort; what is not known is "". The one
idea: the split is a hash of the subject's id alone, so all sessions of a person fall together and a new person moves
nobody. Subjects of different cohorts count as different persons, even where their ids are equal.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from scripts.cohort.forms import READERS, SPLITS, Scan, recognise, scan_stem
from scripts.run import InputError

__all__ = ["FORMS", "read_cohort", "select", "split_of"]

FORMS = ("auto", *READERS)

_LONGEST_NAME = 180  # bytes; leaves room in a file name's 255 for what writers append


def read_cohort(
    dataset_dir: str | Sequence[str],
    form: str = "auto",
    label: str = "",
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    max_scans: int = 0,
) -> list[dict[str, str]]:
    """List the scans of one or several cohorts.

    Args:
        dataset_dir: a scan, folder, BIDS root, CSV or TSV table, or MONAI datalist; or a list of these, also as text
            ("['a', 'b']"); "" or an empty list means the demo cohort. Relative paths inside a table or datalist are
            read from its folder. From a folder that holds `mri/T1.mgz` (FreeSurfer) only that file is taken.
        form: `auto` recognises the form from the path; else one of `bids`, `csv`, `datalist`, `folder`, `file`.
        label: column of participants.tsv or of the table, or key of the datalist's items; "" for no labels.
        val_fraction: share of subjects in the split `val`, where no explicit split is given.
        test_fraction: the same for `test`.
        max_scans: take only the first so many scans; 0 takes all.

    Returns:
        Records sorted by cohort, subject, session, path. `name` is a file stem for outputs, unique without regard to
        case. `split` is the explicit one of the row, else of the subject's other rows, else by `split_of`. Without a
        subject column or a `sub-<id>` in the path each scan counts as a person of its own, named after its path.

    Raises:
        InputError: a path, table, column, fraction or subject id that the user has to correct.
    """
    if form not in FORMS:
        raise InputError(f"The cohort's form is {form!r}; give one of {', '.join(FORMS)}.")
    _check_fractions(val_fraction, test_fraction)
    if isinstance(max_scans, bool) or not isinstance(max_scans, int) or max_scans < 0:
        raise InputError(f"max_scans is {max_scans!r}; give a whole number, or 0 for all scans.")
    label = "" if label is None else str(label)  # a command line turns None and 3 into their Python values
    sources = _sources(dataset_dir)
    if not sources:
        from scripts.cohort.demo import (  # seconds of imports that other cohorts need not pay for
            N_SUBJECTS,
            demo_cohort,
        )

        sources, form = [demo_cohort(n_subjects=min(max_scans or N_SUBJECTS, N_SUBJECTS))], "bids"
    records: list[dict[str, str]] = []
    for cohort, source in zip(_cohort_names(sources), sources, strict=True):
        scans = READERS[recognise(source, form)](source, label)
        records += [_record(scan, cohort, source) for scan in scans]
    records.sort(key=lambda record: [record[key] for key in ("cohort", "subject", "session", "image")])
    _refuse_repeated_files(records)
    _set_splits(records, val_fraction, test_fraction)
    _set_names(records)  # before max_scans cuts, so that a name is the same in a short run
    return records[:max_scans] if max_scans else records


def split_of(subject: str, val_fraction: float = 0.2, test_fraction: float = 0.0) -> str:
    """Give the subject's split, `train`, `val` or `test`, from the sha256 of its id and nothing else.

    Raises:
        InputError: a fraction is not between 0 and 1, or both add up to more than 1.
    """
    _check_fractions(val_fraction, test_fraction)
    position = int(hashlib.sha256(subject.encode()).hexdigest()[:16], 16) / 16**16
    if position < val_fraction:
        return "val"
    return "test" if position < val_fraction + test_fraction else "train"


def select(records: Sequence[dict[str, str]], split: str) -> list[dict[str, str]]:
    """Take the records of one split (`train`, `val`, `test`) or of `all`.

    Raises:
        InputError: the split is unknown, or nothing is in it.
    """
    wanted = "all" if split == "all" else SPLITS.get(str(split), "")
    if not wanted:
        raise InputError(f"split is {split!r}; give train, val, test or all.")
    chosen = [record for record in records if wanted in ("all", record["split"])]
    if not chosen:
        subjects = {(r["cohort"], r["subject"]): r["split"] for r in records}
        counts = Counter(subjects.values())
        found = ", ".join(f"{counts[name]} in {name}" for name in ("train", "val", "test"))
        fraction = f"raise {wanted}_fraction" if wanted in ("val", "test") else "lower val_fraction and test_fraction"
        raise InputError(
            f"No scan is in the split '{wanted}': the cohort has {len(subjects)} subjects ({found}). "
            f"Take another split, add subjects, {fraction}, or give the cohort's table a column 'split'."
        )
    return chosen


def _sources(dataset_dir: str | Sequence[str]) -> list[Path]:
    """Give the paths of one cohort or several; none for the demo cohort."""
    items = dataset_dir
    if isinstance(items, str) and items.strip().startswith("[") and not os.path.exists(items):
        try:
            items = ast.literal_eval(items.strip())
        except (ValueError, SyntaxError):
            raise InputError(f"dataset_dir is {items!r}; write several cohorts as \"['first', 'second']\".") from None
    if items is None or isinstance(items, (str, Path)):
        items = [str(items)] if items else []
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, (str, Path)) and str(item) for item in items):
        remedy = "give a path, or a list of paths; a name that is a number as ./2024"
        raise InputError(f"dataset_dir is {dataset_dir!r}; {remedy}.")
    return [Path(os.path.expanduser(item)) for item in items]


def _cohort_names(sources: Iterable[Path]) -> list[str]:
    names: list[str] = []
    for source in sources:
        base, number = re.sub(r"\.(csv|tsv|json)$", "", scan_stem(os.path.abspath(source))) or "cohort", 2
        name = base
        while name in names:
            name, number = f"{base}_{number}", number + 1
        names.append(name)
    return names


def _record(scan: Scan, cohort: str, source: Path) -> dict[str, str]:
    place = f"{source}, {scan.where or scan.image.name}"
    place = place if place.isprintable() else ascii(place)
    for kind, text in (("subject", scan.subject), ("session", scan.session)):
        # ids become parts of file names, so they must not lead out of the output folder
        if re.search(r"[/\\\x00-\x1f\x7f]", text) or text in (".", ".."):
            raise InputError(f"{place}: the {kind} {text!r} looks like a path; use letters and digits.")
    texts = {"subject": scan.subject, "session": scan.session, "label": scan.label, "split": scan.split}
    for kind, text in (("path", str(scan.image)), *texts.items()):
        if not _is_utf8(text):  # could be written into no table and no report
            raise InputError(f"{place}: the {kind} {ascii(text)} is not UTF-8; rename it.")
    return {"image": str(scan.image), "name": "", **texts, "cohort": cohort}


def _is_utf8(text: str) -> bool:
    return not re.search(r"[\ud800-\udfff]", text)  # how Python keeps bytes that are none


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{key} is {value!r}; give a number from 0 to 1.")
    if val_fraction + test_fraction > 1 + 1e-9:  # sums of decimal fractions may round up
        fractions = f"val_fraction {val_fraction} and test_fraction {test_fraction}"
        raise InputError(f"{fractions} add up to more than 1; lower one.")


def _refuse_repeated_files(records: Iterable[dict[str, str]]) -> None:
    seen: dict[str, str] = {}
    for record in records:
        path = os.path.realpath(record["image"])
        if path in seen:
            raise InputError(f"{record['image']} is listed twice (it is the file {seen[path]}); remove one.")
        seen[path] = record["image"]


def _set_splits(records: Iterable[dict[str, str]], val_fraction: float, test_fraction: float) -> None:
    explicit: dict[tuple[str, str], str] = {}
    for record in records:
        person = record["cohort"], record["subject"]
        if record["split"] and explicit.setdefault(person, record["split"]) != record["split"]:
            raise InputError(
                f"Subject {record['subject']} of {record['cohort']} is in the splits {explicit[person]} and "
                f"{record['split']}; put all scans of a subject into one."
            )
    for record in records:
        given = explicit.get((record["cohort"], record["subject"]))
        record["split"] = given or split_of(record["subject"], val_fraction, test_fraction)


def _set_names(records: Sequence[dict[str, str]]) -> None:
    groups: defaultdict[str, list[dict[str, str]]] = defaultdict(list)
    for record in records:
        record["name"] = _safe(scan_stem(record["image"]))
        groups[record["name"].casefold()].append(record)
    for group in groups.values():
        if len(group) > 1:
            _tell_apart(group)
    taken = Counter(record["name"].casefold() for record in records)
    for record in records:  # equal but for the suffix, cut short, or equal to another's own stem
        if taken[record["name"].casefold()] > 1:
            key = "/".join((record["cohort"], record["subject"], record["session"], *Path(record["image"]).parts[-8:]))
            record["name"] += "_" + hashlib.sha256(key.encode()).hexdigest()[:8]


def _tell_apart(group: Sequence[dict[str, str]]) -> None:
    """Put before the stems what differs: cohort, subject, session; where that is not enough, the folders too."""
    keys = [key for key in ("cohort", "subject", "session") if len({record[key] for record in group}) > 1]
    folders = [os.path.dirname(os.path.abspath(record["image"])) for record in group]
    top = os.path.commonpath(folders)
    enough = len({tuple(record[key].casefold() for key in keys) for record in group}) == len(group)
    for record, folder in zip(group, folders, strict=True):
        parts = [record[key] for key in keys]
        parts += [] if enough else os.path.relpath(folder, top).split(os.sep)
        stem = scan_stem(record["image"])
        if not any(part == stem or part.endswith(f"_{stem}") for part in parts):  # a subject named after its path
            parts.append(stem)
        record["name"] = _safe("_".join(part for part in parts if part not in ("", ".")))


def _safe(text: str) -> str:
    """Keep letters, digits, dot, dash, plus and underscore; no leading dot or dash; at most `_LONGEST_NAME` bytes."""
    text = re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFC", text)).lstrip(".-").rstrip(".")
    return text.encode()[:_LONGEST_NAME].decode(errors="ignore") or "scan"
