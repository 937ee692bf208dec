"""The figures of a reconstruction, what it is compared with, and the tables of both."""

from __future__ import annotations

from scripts.metrics.baselines import *
from scripts.metrics.lpips import *
from scripts.metrics.peers import *
from scripts.metrics.reconstruction import *
from scripts.metrics.samples import *
from scripts.metrics.spectrum import *
from scripts.metrics.tables import *
