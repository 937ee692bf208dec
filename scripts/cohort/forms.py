"""The forms a cohort comes in, each read into a list of scans; only `records` calls this.

A form is one function: a path and the label's column in, scans out. What a row, a folder or participants.tsv does not
say stays "". Mistakes in tables and datalists are found here, where the row's number is still known.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.run import InputError

__all__ = ["IMAGE_SUFFIXES", "READERS", "SPLITS", "Scan", "recognise", "scan_stem"]

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}

_SUPPORTED = f"a scan ({', '.join(IMAGE_SUFFIXES)}), a .csv or .tsv table, a .json datalist or a folder"

_Rows = list[tuple[str, dict[str, str]]]  # ("row 2", {column: text})


@dataclass(frozen=True)
class Scan:
    """A scan as its cohort lists it; `where` names the row for errors."""

    image: Path
    subject: str
    session: str = ""
    label: str = ""
    split: str = ""
    where: str = ""


def recognise(source: Path, form: str = "auto") -> str:
    """Tell the form of a path, or check that the given form can be its own.

    Raises:
        InputError: the path does not exist, or is a folder where a file is needed, or the other way round.
    """
    if not os.path.exists(source):
        raise InputError(f"{source} does not exist; give in dataset_dir a path to {_SUPPORTED}.")
    if source.is_dir():
        if form in ("csv", "datalist", "file"):
            raise InputError(f"{source} is a folder; the form '{form}' needs a file.")
        is_bids = any(source.glob("sub-*/anat")) or any(source.glob("sub-*/ses-*/anat"))
        return form if form != "auto" else "bids" if is_bids else "folder"
    if form in ("bids", "folder"):
        raise InputError(f"{source} is a file; the form '{form}' needs a folder.")
    by_suffix = {".csv": "csv", ".tsv": "csv", ".json": "datalist"}
    return form if form != "auto" else by_suffix.get(source.suffix.lower(), "file")


def scan_stem(path: str | Path) -> str:
    """Give a scan's file name without its image suffix; further dots stay ("scan.v1.nii.gz" gives "scan.v1")."""
    name = Path(path).name
    suffix = next((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def _read_file(path: Path, label: str) -> list[Scan]:
    _refuse_label(path, label)
    _check_suffix(path, str(path))
    return [Scan(path, *_person(path, path.parent))]


def _read_folder(root: Path, label: str) -> list[Scan]:
    _refuse_label(root, label)

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); check its permissions.")

    images: list[Path] = []
    others: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if Path(folder).name == "mri" and "T1.mgz" in files:  # FreeSurfer: beside it lie segmentations and the like
            files, folders[:] = ["T1.mgz"], []
        for file in sorted(name for name in files if not name.startswith(".")):
            if file.lower().endswith(IMAGE_SUFFIXES):
                images.append(Path(folder, file))
            else:
                others[Path(file).suffix.lower() or "no suffix"] += 1
    if not images:
        held = ", ".join(f"{n} x {suffix}" for suffix, n in others.most_common(3)) or "no files"
        is_dicom = not others.keys().isdisjoint((".dcm", ".ima", "no suffix"))
        raise InputError(
            f"{root} holds no scan ({', '.join(IMAGE_SUFFIXES)}) but {held} (links to folders are not followed); "
            + ("convert DICOM with dcm2niix first." if is_dicom else "check the path.")
        )
    return [Scan(image, *_person(image, root)) for image in images]


def _read_bids(root: Path, label: str) -> list[Scan]:
    people = _read_participants(root, label)
    scans: list[Scan] = []
    for pattern in ("sub-*/anat/*", "sub-*/ses-*/anat/*"):
        for image in root.glob(pattern):
            if re.fullmatch(r"[^.].*_T1w\.nii(\.gz)?", image.name):
                subject, *session = image.relative_to(root).parts[:-2]
                person = people.get(subject, Scan(root, subject))
                scans.append(Scan(image, subject, "".join(session), person.label, person.split))
    if not scans:
        raise InputError(f"{root} holds no sub-*/[ses-*/]anat/*_T1w.nii.gz; is it a BIDS root with T1w scans?")
    return scans


def _read_participants(root: Path, label: str) -> dict[str, Scan]:
    """Read each subject's label and split from participants.tsv; no such file, nobody."""
    table = root / "participants.tsv"
    if not table.is_file():
        if label:
            raise InputError(f"{root} has no participants.tsv, so no column '{label}' for the label; add the table.")
        return {}
    columns, rows = _read_table(table)
    if "participant_id" not in columns:
        raise InputError(
            f"{table} has no column 'participant_id' but {_short(', '.join(columns))}; add it, as BIDS asks."
        )
    _check_label(table, label, columns)
    people: dict[str, Scan] = {}
    for where, row in rows:
        subject = "sub-" + row["participant_id"].removeprefix("sub-")
        if subject in people:
            raise InputError(f"{table} lists {subject} twice ({people[subject].where}, {where}); remove one row.")
        split = _split_text(row.get("split", ""), f"{table}, {where}")
        people[subject] = Scan(root, subject, label=row.get(label, ""), split=split, where=where)
    return people


def _read_csv(path: Path, label: str) -> list[Scan]:
    columns, rows = _read_table(path)
    if "image" not in columns:
        held = _short(", ".join(columns)) or "nothing"
        raise InputError(f"{path} has no column 'image' but {held}; name the column with the scans' paths 'image'.")
    return _scans_of(path, columns, rows, label)


def _read_datalist(path: Path, label: str) -> list[Scan]:
    text = _read_text(path)
    try:
        content = json.loads(text, parse_float=str, parse_int=str)  # numbers stay as they are written
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); correct it or write it anew.") from None
    sections = {"": content} if isinstance(content, list) else content
    known = [key for key in sections if key in SPLITS or not key] if isinstance(sections, dict) else []
    if not known:
        held = f"the keys {_short(', '.join(content))}" if isinstance(content, dict) and content else "none"
        raise InputError(f"{path} should hold a list, or lists under training, validation, test; it has {held}.")
    rows: _Rows = []
    for section in known:
        items = sections[section]
        for number, item in enumerate(items if isinstance(items, list) else [items]):
            where = f"{section or 'item'}[{number}]"
            fields = {"image": item} if isinstance(item, str) else item
            if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
                raise InputError(f'{path}, {where}: an item is {{"image": "one path", ...}}; correct it.')
            row = {key: _plain(value) for key, value in fields.items()}
            rows.append((where, row | {"split": section or row.get("split", "")}))
    return _scans_of(path, sorted({key for _, row in rows for key in row}), rows, label)


READERS: dict[str, Callable[[Path, str], list[Scan]]] = {
    "bids": _read_bids,
    "csv": _read_csv,
    "datalist": _read_datalist,
    "folder": _read_folder,
    "file": _read_file,
}


def _scans_of(path: Path, columns: Sequence[str], rows: _Rows, label: str) -> list[Scan]:
    """Make scans of a table's or datalist's rows; paths are relative to its folder."""
    _check_label(path, label, columns)
    scans: list[Scan] = []
    missing: list[str] = []
    for where, row in rows:
        image = path.parent / os.path.expanduser(row["image"])
        if not row["image"] or not os.path.exists(image):
            missing.append(f"{where}: {_short(row['image']) or 'no file given'}")
            continue
        _check_suffix(image, f"{path}, {where}: {_short(row['image'])}")
        subject, session = _person(image, path.parent)
        subject, session = row.get("subject") or subject, row.get("session") or session
        split = _split_text(row.get("split", ""), f"{path}, {where}")
        scans.append(Scan(image, subject, session, row.get(label, ""), split, where))
    if missing:
        more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"{path} lists {len(missing)} of {len(rows)} scans that do not exist ({'; '.join(missing[:5])}{more}); "
            f"correct the paths (relative ones are read from the folder {path.parent})."
        )
    if not scans:
        raise InputError(f"{path} lists no scan; add one row or item for each.")
    return scans


def _person(image: Path, root: Path) -> tuple[str, str]:
    """Read subject and session off the path below `root` (its own name included), the deepest part first."""
    inside = [part for part in Path(os.path.relpath(image, root)).parts if part != ".."]
    parts = [Path(os.path.abspath(root)).name, *inside]

    def entity(prefix: str) -> str:
        found = (re.match(rf"(?:.*_)?({prefix}[^_.]+)", part) for part in reversed(parts))
        return next((match[1] for match in found if match), "")

    above = Path(os.path.abspath(image)).parent
    freesurfer = above.parent.name if above.name == "mri" else ""
    own = "_".join([*inside[:-1], scan_stem(image)])
    if os.path.relpath(image, root).startswith(".."):  # folders outside the cohort's may be named after people
        own = f"{scan_stem(image)}_{hashlib.sha256(str(above).encode()).hexdigest()[:8]}"
    return entity("sub-") or freesurfer or own, entity("ses-")


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} is a pipe, socket or device, not a file; copy its content into a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions.") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark decodes, but every second character is NUL
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8 (in Excel: CSV UTF-8).")
    return text


def _read_table(path: Path) -> tuple[list[str], _Rows]:
    """Give a table's columns and its rows; row 1 is the header, as in a spreadsheet."""
    text = _read_text(path)
    # spreadsheets of some countries write CSV with semicolons
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [column.strip() for column in next(reader, [])]
        lines = [(f"row {number}", [_plain(cell) for cell in cells]) for number, cells in enumerate(reader, 2)]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}, cannot be read ({error}); save the table anew.") from None
    twice = next((column for column in columns if column and columns.count(column) > 1), "")
    if twice:
        raise InputError(f"{path} has the column '{_short(twice)}' twice; rename or remove one.")
    rows: _Rows = []
    for where, cells in lines:
        if len(cells) > len(columns):
            fields = f"{len(cells)} fields for {len(columns)} columns"
            raise InputError(f"{path}, {where}, has {fields}; put texts with the separator in quotes.")
        if any(cells):
            rows.append((where, dict.fromkeys(columns, "") | dict(zip(columns, cells, strict=False))))
    return columns, rows


def _plain(value: object) -> str:
    text = "" if value is None else str(value).strip()
    return "" if text.lower() == "n/a" else text


def _short(text: str) -> str:
    """A text for an error: a quote that is never closed swallows the rest of its table."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _split_text(text: str, where: str) -> str:
    if text and text.lower() not in SPLITS:
        raise InputError(f"{where}: the split is '{_short(text)}'; give train, validation or test, or leave it empty.")
    return SPLITS.get(text.lower(), "")


def _refuse_label(path: Path, label: str) -> None:
    if label:
        raise InputError(f"{path} has no labels, so no '{label}'; list its scans in a CSV with that column.")


def _check_label(path: Path, label: str, columns: Iterable[str]) -> None:
    if label and label not in columns:
        raise InputError(f"{path} has no column '{label}' for the label; it has {_short(', '.join(columns))}.")


def _check_suffix(path: Path, what: str) -> None:
    if path.is_dir() or not path.name.lower().endswith(IMAGE_SUFFIXES):
        found = "is a folder" if path.is_dir() else f"has the suffix '{path.suffix}', which is not supported"
        dicom = "; convert DICOM with dcm2niix first" if path.suffix.lower() in (".dcm", ".ima", "") else ""
        raise InputError(f"{what} {found}{dicom}; give {_SUPPORTED}.")
