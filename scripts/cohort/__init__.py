"""From what a user points at to checked records, and to datasets of preprocessed volumes."""

from __future__ import annotations

from scripts.cohort.datasets import *
from scripts.cohort.forms import *
from scripts.cohort.preflight import *
from scripts.cohort.records import *
