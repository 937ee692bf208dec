"""The volumes that a report shows are the worst, the best and the first, whatever came in which order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scripts.report import Case, Cases


def case(name: str) -> Case:
    """A volume at half of white, and a reconstruction at half of that."""
    volume = np.full((4, 4, 4), 900.0, np.float32)
    return Case.of_volumes(name, volume, {"model": volume / 2}, (1.5, 1.5, 1.5), 1800.0)


@given(badness=st.lists(st.floats(-100, 100), min_size=1, max_size=30, unique=True), n_each=st.integers(1, 3))
def test_worst_and_best_are_kept(badness: list[float], n_each: int) -> None:
    """The law: the n worst, then the n best of the others, and the first unless it is among them."""
    cases = Cases(n_each)
    for number, value in enumerate(badness):
        cases.add(value, lambda number=number: case(str(number)))
        assert len(cases.kept) <= 2 * n_each + 1
    shown = {made.name: why for why, made in cases.result()}
    ranked = sorted(range(len(badness)), key=lambda number: -badness[number])
    n_worst = min(n_each, (len(ranked) + 1) // 2) if len(ranked) <= 2 * n_each else n_each
    assert [name for name, why in shown.items() if why.startswith("worst")] == [str(n) for n in ranked[:n_worst]]
    best = [str(n) for n in reversed(ranked[n_worst:][-n_each:])]
    assert [name for name, why in shown.items() if why.startswith("best")] == best
    assert "0" in shown


def test_undefined_is_the_worst() -> None:
    """A figure that is nan ranks behind every number."""
    cases = Cases(1)
    for name, value in {"a": 1.0, "b": float("nan"), "c": 3.0}.items():
        cases.add(value, lambda name=name: case(name))
    (worst, shown), (best, other) = cases.result()
    assert (worst, shown.name, best, other.name) == ("worst", "b", "best", "a")
    assert shown.image.max() == 106 and shown.recons["model"].max() == 53  # 0.5 / 1.2 of 255 steps, in every unit
