"""Pictures, charts and the page that shows a job's results."""

from __future__ import annotations

from scripts.report.cases import Case, Cases
from scripts.report.charts import (
    cumulative_charts,
    curve_charts,
    distribution_charts,
    spectrum_chart,
)
from scripts.report.page import CEILING, Report, quantised
from scripts.report.pictures import (
    DPI,
    figure_to_array,
    latent_strip,
    mosaic,
    recon_panel,
    save_png,
    to_ras,
    volume_strip,
)
from scripts.report.sections import (
    FILE_NAME,
    LATENT_TEXT,
    NOTES,
    add_cases,
    add_volumes,
    facts_of,
    group_of,
    origin,
)

__all__ = [
    "CEILING",
    "Case",
    "Cases",
    "DPI",
    "FILE_NAME",
    "LATENT_TEXT",
    "NOTES",
    "Report",
    "add_cases",
    "add_volumes",
    "cumulative_charts",
    "curve_charts",
    "distribution_charts",
    "facts_of",
    "figure_to_array",
    "group_of",
    "latent_strip",
    "mosaic",
    "origin",
    "quantised",
    "recon_panel",
    "save_png",
    "spectrum_chart",
    "to_ras",
    "volume_strip",
]
