"""Balanced and plain batches: who is visited how often, and the same batches in every run and process."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from scripts.run import InputError
from scripts.training import BalancedBatchSampler, ShuffledBatchSampler, batch_sampler

LABELS = ["depr"] * 7 + ["control"] * 3 + ["depr"] * 2  # 9 and 3, not in blocks
Cohort = tuple[list[str], int, int]  # labels, batch size, seed

# labels, batch size, words of the error
REFUSED = [
    (["a", "b", ""], 2, "1 of 3 scans have no label"),
    (["a", "a"], 2, "all 2 scans are 'a'"),
    ([], 2, "no scans"),
    (["a", "b", "b"], 3, "a: 1 scans, b: 2 scans.*multiple of 2; give for example 4"),
    (["a", "b", "c"], 2, "multiple of 3; give for example 3"),
    (["a", "b"], 0, "batch_size is 0"),
]
OUT_OF_RANGE = [{"seed": -1}, {"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}]


def samplers(labels: list[str], batch_size: int, **arguments: int) -> list[BalancedBatchSampler | ShuffledBatchSampler]:
    """One of each kind."""
    return [
        BalancedBatchSampler(labels, batch_size, **arguments),
        ShuffledBatchSampler(len(labels), batch_size, **arguments),
    ]


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Labels of two to four groups in any order, a batch size that they allow, and a seed."""
    sizes = draw(st.lists(st.integers(1, 15), min_size=2, max_size=4))
    labels = draw(st.permutations([f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]))
    return labels, len(sizes) * draw(st.integers(1, 4)), draw(st.integers(0, 5))


def visits_by_group(labels: list[str], batches: list[list[int]]) -> dict[str, Counter]:
    """How often each scan was visited, by group; scans that were not visited count 0."""
    counts = {label: Counter({i: 0 for i, other in enumerate(labels) if other == label}) for label in labels}
    for index in chain.from_iterable(batches):
        counts[labels[index]][index] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts())
def test_batches_are_balanced(cohort: Cohort):
    """As many scans of each group in every batch, as many batches as the largest group needs, each of its scans once;
    in the other groups none is used again before all were used."""
    labels, batch_size, seed = cohort
    batches = list(BalancedBatchSampler(labels, batch_size, seed=seed))
    for batch in batches:
        shares = Counter(labels[index] for index in batch)
        assert set(shares) == set(labels) and len(set(shares.values())) == 1
    assert {len(batch) for batch in batches[:-1]} <= {batch_size} and 0 < len(batches[-1]) <= batch_size
    largest = max(Counter(labels).values())
    for members in visits_by_group(labels, batches).values():
        assert sum(members.values()) == largest
    for label, n in Counter(labels).items():
        visits = [index for index in chain.from_iterable(batches) if labels[index] == label]
        for start in range(0, len(visits), n):
            assert len(set(visits[start : start + n])) == len(visits[start : start + n])


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), world_size=st.integers(2, 4), drop_last=st.booleans())
def test_ranks_share_out_the_one_process_batches(cohort: Cohort, world_size: int, drop_last: bool):
    """Interleaved, the ranks' batches are the one-process batches, plus added full ones or less the surplus."""
    labels, batch_size, seed = cohort
    full = max(Counter(labels).values()) // (batch_size // len(set(labels)))
    if drop_last and full < world_size:
        with pytest.raises(InputError, match="drop_last"):
            BalancedBatchSampler(labels, batch_size, seed, 0, world_size, drop_last)
        return
    each = [BalancedBatchSampler(labels, batch_size, seed, rank, world_size, drop_last) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in each]
    assert {len(batches) for batches in ranks} == {len(sampler) for sampler in each} == {len(ranks[0])}
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    alone = list(BalancedBatchSampler(labels, batch_size, seed, drop_last=drop_last))
    assert abs(len(together) - len(alone)) < world_size
    common = min(len(together), len(alone))
    assert together[:common] == alone[:common]
    assert len(together) <= len(alone) if drop_last else len(together) >= len(alone)
    assert all(len(batch) == batch_size for batch in together[len(alone) :])
    for members in visits_by_group(labels, together).values():
        assert max(members.values()) - min(members.values()) <= 1


@pytest.mark.parametrize("kind", [0, 1], ids=["balanced", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_does_not_depend_on_those_before(kind: int, world_size: int):
    """A resumed run has the batches that the uninterrupted one had; epochs and seeds differ, and are not added up."""
    through, resumed, other = (
        samplers(LABELS, 4, seed=seed, rank=world_size - 1, world_size=world_size)[kind] for seed in (3, 3, 4)
    )
    epochs = []
    for epoch in range(4):
        through.set_epoch(epoch)
        epochs.append(list(through))
        assert list(through) == epochs[-1]
    resumed.set_epoch(3)
    assert list(resumed) == epochs[3]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert list(other) != epochs[0]
    if kind == 0:  # torch's own sampler adds seed and epoch
        assert list(other) != epochs[1]


def test_another_group_does_not_change_the_order():
    """Adding a scan to the small group leaves the order of the large one as it was."""
    before, after = (
        list(chain.from_iterable(BalancedBatchSampler(labels, 4))) for labels in (LABELS, [*LABELS, "control"])
    )
    large = {index for index, label in enumerate(LABELS) if label == "depr"}
    assert [i for i in before if i in large] == [i for i in after if i in large]


def test_groups_of_one_size_are_not_paired():
    """Who stands with whom is random: equal groups are not put into the same order."""
    pairs = list(BalancedBatchSampler(["a"] * 20 + ["b"] * 20, 2))
    assert sum(b - a == 20 for a, b in pairs) < 10  # 1 expected by chance


@pytest.mark.parametrize(("labels", "batch_size", "message"), REFUSED)
def test_what_cannot_be_balanced_is_refused(labels: list[str], batch_size: int, message: str):
    """One sentence that names the groups and what to do."""
    with pytest.raises(InputError, match=message):
        BalancedBatchSampler(labels, batch_size)


@pytest.mark.parametrize("arguments", OUT_OF_RANGE, ids=str)
@pytest.mark.parametrize("kind", [BalancedBatchSampler, ShuffledBatchSampler])
def test_numbers_out_of_range_are_refused(kind: type, arguments: dict[str, int]):
    """A rank that does not exist, a seed that numpy would not take, or an epoch before the first."""
    scans = LABELS if kind is BalancedBatchSampler else len(LABELS)
    with pytest.raises(ValueError, match="seed is|rank must"):
        kind(scans, 2, **arguments)
    with pytest.raises(ValueError, match="epoch must"):
        kind(scans, 2).set_epoch(-1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 8), world_size=st.integers(1, 4))
def test_shuffled_visits_every_scan_once(n: int, batch_size: int, world_size: int):
    """One process: once each. Several: all scans, equally many batches, fewer repeats than processes."""
    each = [ShuffledBatchSampler(n, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in each]
    assert {len(batches) for batches in ranks} == {len(each[0])} == {ceil(ceil(n / world_size) / batch_size)}
    visits = Counter(chain.from_iterable(chain.from_iterable(ranks)))
    assert set(visits) == set(range(n)) and sum(visits.values()) - n < world_size


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("balanced", ["True", "False"])
def test_a_config_gets_this_processs_share(balanced: str, rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch):
    """Of records, with a switch that is text; ignite knows the process; set_epoch reaches it through the loader."""
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: world_size)
    records = [{"image": f"{i}.nii.gz", "label": label} for i, label in enumerate(LABELS)]
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_sampler=batch_sampler(records, 4, balanced, 1))
    expected = samplers(LABELS, 4, seed=1, rank=rank, world_size=world_size)[balanced == "False"]
    for epoch in (0, 5):
        loader.batch_sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert [batch[0].tolist() for batch in loader] == list(expected)
    with pytest.raises(InputError, match="no scans"):
        batch_sampler([], 4, balanced)
    if balanced == "True":
        with pytest.raises(InputError, match="no label"):
            batch_sampler([*records, {"image": "x.nii.gz"}], 4, balanced)
