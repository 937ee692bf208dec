"""The volumes that a report shows: the worst, the best, and the first of the cohort, which nobody has chosen.

One pass over any number of volumes keeps a handful, in 256 steps; see `page.quantised`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.figure import Figure

from scripts.report.page import CEILING, quantised
from scripts.report.pictures import recon_panel, volume_strip

__all__ = ["Case", "Cases"]

PICTURE_UNIT = "x 99.5th percentile"


@dataclass(frozen=True)
class Case:
    """One volume with its reconstructions, ready to be shown.

    Attributes:
        name: of the scan.
        image: `quantised` original, RAS.
        recons: `quantised` reconstruction by system, the model's first.
        spacing: voxel size in mm.
        mu: posterior mean (C, D, H, W), where it is known.
    """

    name: str
    image: np.ndarray
    recons: Mapping[str, np.ndarray]
    spacing: tuple[float, float, float]
    mu: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of_volumes(
        cls,
        name: str,
        image: np.ndarray,
        recons: Mapping[str, np.ndarray],
        spacing: tuple[float, float, float],
        top: float = 1.0,
        mu: np.ndarray | None = None,
    ) -> Case:
        """Make a case of volumes (D, H, W) on one RAS grid, of which `top` is white."""
        packed, factor = quantised(image, top)
        x, y, z = (size * factor for size in spacing)
        return cls(name, packed, {key: quantised(recon, top)[0] for key, recon in recons.items()}, (x, y, z), mu)

    def panel(self, title: str) -> Figure:
        """Original, reconstruction of the first system and difference, in three planes."""
        image, recon = _intensity(self.image), _intensity(next(iter(self.recons.values())))
        return recon_panel(image, recon, self.spacing, title=title, unit=PICTURE_UNIT)

    def strip(self, title: str) -> Figure:
        """The original and what every system makes of it, side by side."""
        volumes = {"original": self.image, **self.recons}
        return volume_strip([_intensity(v) for v in volumes.values()], list(volumes), self.spacing, title)


class Cases:
    """Keeps the cases of a run.

    Args:
        n_each: how many of the worst, and of the best.
    """

    def __init__(self, n_each: int = 2) -> None:
        self.n_each = n_each
        self.kept: dict[int, tuple[float, Case]] = {}
        self.n_seen = 0

    def add(self, badness: float, make: Callable[[], Case]) -> None:
        """Take a volume if it is among the cases so far.

        Args:
            badness: the larger the worse; nan is the worst of all.
            make: gives the case; called only for one that is taken.
        """
        badness = math.inf if math.isnan(badness) else badness
        ranked = sorted([*((value, number) for number, (value, _) in self.kept.items()), (badness, self.n_seen)])
        numbers = [number for _, number in ranked]
        chosen = {*numbers[: self.n_each], *numbers[len(numbers) - self.n_each :], 0}
        if self.n_seen in chosen:
            self.kept[self.n_seen] = (badness, make())
        self.kept = {number: kept for number, kept in self.kept.items() if number in chosen}
        self.n_seen += 1

    def result(self) -> list[tuple[str, Case]]:
        """Why a case is shown, and the case: the worst first, then the best, then the first of the cohort."""
        ranked = sorted(self.kept.items(), key=lambda item: (-item[1][0], item[0]))
        chosen = {}
        n_worst = min(self.n_each, (len(ranked) + 1) // 2)
        for place, (number, _) in enumerate(ranked[:n_worst]):
            chosen[number] = "worst" if place == 0 else f"worst but {place}"
        for place, (number, _) in enumerate(reversed(ranked[n_worst:][-self.n_each :])):
            chosen[number] = "best" if place == 0 else f"best but {place}"
        chosen.setdefault(0, "first of the cohort")
        return [(why, self.kept[number][1]) for number, why in chosen.items() if number in self.kept]


def _intensity(packed: np.ndarray) -> np.ndarray:
    return packed.astype(np.float32) * (CEILING / 255)
