"""From what a user points at to checked records, and to datasets of preprocessed volumes."""

from __future__ import annotations

from scripts.cohort.datasets import (
    AheadLoader,
    DiskCacheDataset,
    cached_dataset,
    record_hash,
    transforms_hash,
)
from scripts.cohort.forms import (
    IMAGE_SUFFIXES,
    READERS,
    SPLITS,
    Scan,
    recognise,
    scan_stem,
)
from scripts.cohort.preflight import (
    DATA_CRITERIA,
    HEADER_CRITERIA,
    check_cohort,
    check_scan,
)
from scripts.cohort.records import FORMS, read_cohort, select, split_of

__all__ = [
    "AheadLoader",
    "DATA_CRITERIA",
    "DiskCacheDataset",
    "FORMS",
    "HEADER_CRITERIA",
    "IMAGE_SUFFIXES",
    "READERS",
    "SPLITS",
    "Scan",
    "cached_dataset",
    "check_cohort",
    "check_scan",
    "read_cohort",
    "recognise",
    "record_hash",
    "scan_stem",
    "select",
    "split_of",
    "transforms_hash",
]
