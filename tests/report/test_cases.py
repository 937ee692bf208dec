"""The volumes that a report shows are the worst, the best and the first, whatever came in which order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.report import Case, Cases


def case(name: str, top: float = 1.0) -> Case:
    """A volume at half of white, and a reconstruction at half of that."""
    volume = np.full((4, 4, 4), 0.5 * top, np.float32)
    return Case.of_volumes(name, volume, {"model": volume / 2}, (1.5, 1.5, 1.5), top)


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


def test_a_case_is_made_only_if_it_is_kept() -> None:
    """Ten thousand volumes cost no more than a handful."""
    cases, made = Cases(1), []
    for number in range(100):
        value = 50.0 if number == 0 else float(number % 10)
        cases.add(value, lambda number=number: made.append(number) or case(str(number)))
    assert len(made) < 5


def test_undefined_is_the_worst() -> None:
    """A figure that is nan ranks behind every number."""
    cases = Cases(1)
    for name, value in {"a": 1.0, "b": float("nan"), "c": 3.0}.items():
        cases.add(value, lambda name=name: case(name))
    assert [(why, made.name) for why, made in cases.result()] == [("worst", "b"), ("best", "a")]


@pytest.mark.parametrize("top", [1.0, 1800.0])
def test_white_is_the_same_in_every_unit(top: float) -> None:
    """Half of the top is step 106 of 255 (0.5 / 1.2), and 0.5 again in the panel, a quarter in the reconstruction's."""
    made = case("a", top)
    assert made.image.max() == 106 and made.recons["model"].max() == 53
    original, recon, _ = (axes.images[0].get_array().max() for axes in made.panel("a").axes[:3])
    assert (original, recon) == pytest.approx((0.5, 0.25), abs=0.003)
    assert [text.get_text() for text in made.strip("a").texts if text.get_text() in ("original", "model")] == [
        "original",
        "model",
    ]


def test_a_fine_volume_has_its_coarser_spacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaged over cubes of two, its voxels are twice as large."""
    monkeypatch.setattr("scripts.report.page.MOST_VOXELS", 8)
    made = case("a")
    assert made.image.shape == (2, 2, 2) and made.spacing == (3, 3, 3)
