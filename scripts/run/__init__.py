"""Around every job's work: checks of settings, errors as one sentence, whole files, records, processes."""

from __future__ import annotations

from scripts.run.checks import *
from scripts.run.errors import *
from scripts.run.files import *
from scripts.run.output_folder import *
from scripts.run.processes import *
from scripts.run.progress import *
from scripts.run.record import *
