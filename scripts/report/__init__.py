"""Pictures, charts and the page that shows a job's results."""

from __future__ import annotations

from scripts.report.canvas import *
from scripts.report.cases import *
from scripts.report.charts import *
from scripts.report.page import *
from scripts.report.pictures import *
from scripts.report.sections import *
