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


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[str], int, int]:
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
def test_largest_group_is_visited_exactly_once(cohort):
    """One process: every scan of the largest group once; in the others no scan twice more than another."""
    labels, batch_size, seed = cohort
    batches = list(BalancedBatchSampler(labels, batch_size, seed=seed))
    counts = visits_by_group(labels, batches)
    largest = max(len(members) for members in counts.values())
    for members in counts.values():
        assert max(members.values()) - min(members.values()) <= 1
        assert sum(members.values()) == largest
        if len(members) == largest:
            assert set(members.values()) == {1}


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts())
def test_each_batch_is_balanced(cohort):
    """As many scans of each group, the asked number in all batches but the last."""
    labels, batch_size, seed = cohort
    batches = list(BalancedBatchSampler(labels, batch_size, seed=seed))
    for batch in batches:
        shares = Counter(labels[index] for index in batch)
        assert set(shares) == set(labels)
        assert len(set(shares.values())) == 1
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 0 < len(batches[-1]) <= batch_size


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts())
def test_groups_are_exhausted_before_they_start_again(cohort):
    """Along the epoch, each round of a group (as many visits as it has scans) holds every scan at most once."""
    labels, batch_size, seed = cohort
    order = list(chain.from_iterable(BalancedBatchSampler(labels, batch_size, seed=seed)))
    for label in set(labels):
        visits, n = [index for index in order if labels[index] == label], labels.count(label)
        for start in range(0, len(visits), n):
            assert len(set(visits[start : start + n])) == len(visits[start : start + n])


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), world_size=st.integers(2, 4), drop_last=st.booleans())
def test_ranks_share_out_the_one_process_batches(cohort, world_size: int, drop_last: bool):
    """Interleaved, the ranks' batches are the one-process batches, plus added full ones or less the surplus."""
    labels, batch_size, seed = cohort
    full = max(Counter(labels).values()) // (batch_size // len(set(labels)))
    if drop_last and full < world_size:
        with pytest.raises(InputError, match="drop_last"):
            BalancedBatchSampler(labels, batch_size, seed, 0, world_size, drop_last)
        return
    samplers = [
        BalancedBatchSampler(labels, batch_size, seed, rank, world_size, drop_last) for rank in range(world_size)
    ]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(sampler) for sampler in samplers} == {len(ranks[0])}
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    alone = list(BalancedBatchSampler(labels, batch_size, seed, drop_last=drop_last))
    assert abs(len(together) - len(alone)) < world_size
    common = min(len(together), len(alone))
    assert together[:common] == alone[:common]
    assert len(together) <= len(alone) if drop_last else len(together) >= len(alone)
    assert all(len(batch) == batch_size for batch in together[len(alone) :])
    for members in visits_by_group(labels, together).values():
        assert max(members.values()) - min(members.values()) <= 1


@pytest.mark.parametrize("kind", ["balanced", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_does_not_depend_on_those_before(kind: str, world_size: int):
    """A resumed run has the batches that the uninterrupted one had; epochs and seeds differ from each other."""

    def sampler(seed: int = 3):
        return batch_sampler(LABELS, 4, kind == "balanced", seed=seed, rank=world_size - 1, world_size=world_size)

    through, resumed = sampler(), sampler()
    epochs = []
    for epoch in range(4):
        through.set_epoch(epoch)
        epochs.append(list(through))
        assert list(through) == epochs[-1]
    resumed.set_epoch(3)
    assert list(resumed) == epochs[3]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert list(sampler(seed=9)) != epochs[0]


@pytest.mark.parametrize("drop_last", [False, True])
def test_length(drop_last: bool):
    """9 scans of the largest group, 2 a batch: four full batches and a smaller one."""
    sampler = BalancedBatchSampler(LABELS, 4, drop_last=drop_last)
    sizes = [len(batch) for batch in sampler]
    assert len(sampler) == len(sizes)
    assert sizes == ([4, 4, 4, 4] if drop_last else [4, 4, 4, 4, 2])


def test_another_group_does_not_change_the_order():
    """Adding a scan to the small group leaves the order of the large one as it was."""
    before = list(chain.from_iterable(BalancedBatchSampler(LABELS, 4)))
    after = list(chain.from_iterable(BalancedBatchSampler([*LABELS, "control"], 4)))
    n = len(LABELS)
    labels = [*LABELS, "control"]
    assert [i for i in before if labels[i] == "depr"] == [i for i in after if i < n and labels[i] == "depr"]


def test_seed_and_epoch_are_not_added_up():
    """The second epoch of one seed is not the first epoch of the next one."""
    second, first = BalancedBatchSampler(LABELS, 4, seed=0), BalancedBatchSampler(LABELS, 4, seed=1)
    second.set_epoch(1)
    assert list(second) != list(first)


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
@pytest.mark.parametrize("balanced", [True, False])
def test_numbers_out_of_range_are_refused(balanced: bool, arguments: dict[str, int]):
    """A rank that does not exist, or a seed that numpy would not take."""
    with pytest.raises(ValueError, match="seed|rank"):
        batch_sampler(LABELS, 2, balanced, **arguments)
    with pytest.raises(ValueError, match="epoch"):
        batch_sampler(LABELS, 2, balanced).set_epoch(-1)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 8), world_size=st.integers(1, 4))
def test_shuffled_visits_every_scan_once(n: int, batch_size: int, world_size: int):
    """One process: once each. Several: all scans, equally many batches, fewer repeats than processes."""
    ranks = [list(ShuffledBatchSampler(n, batch_size, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(ShuffledBatchSampler(n, batch_size, 0, 0, world_size))}
    assert len(ranks[0]) == ceil(ceil(n / world_size) / batch_size)
    visits = Counter(chain.from_iterable(chain.from_iterable(ranks)))
    assert set(visits) == set(range(n))
    assert sum(visits.values()) - n < world_size


def test_shuffled_refuses_nothing():
    """No scans, no batches."""
    with pytest.raises(InputError, match="no scans"):
        batch_sampler([], 2, False)
    with pytest.raises(InputError, match="batch_size is 0"):
        batch_sampler(LABELS, 0, False)


def test_factory_takes_records_and_text():
    """A config gives the cohort's records, the command line a text; a record without a label cannot be balanced."""
    records = [{"image": f"{i}.nii.gz", "label": label} for i, label in enumerate(LABELS)]
    assert list(batch_sampler(records, 4, "True", seed=1)) == list(BalancedBatchSampler(LABELS, 4, seed=1))
    assert list(batch_sampler(records, 5, "False", seed=1)) == list(ShuffledBatchSampler(len(LABELS), 5, seed=1))
    with pytest.raises(InputError, match="no label"):
        batch_sampler([*records, {"image": "x.nii.gz"}], 4, True)


@pytest.mark.parametrize("balanced", [True, False])
def test_dataloader_uses_it(balanced: bool):
    """The DataLoader's batches are the sampler's, and set_epoch reaches it through the loader."""
    data = TensorDataset(torch.arange(len(LABELS)))
    loader = DataLoader(data, batch_sampler=batch_sampler(LABELS, 4, balanced))
    expected = batch_sampler(LABELS, 4, balanced)
    for epoch in (0, 5):
        loader.batch_sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert [batch[0].tolist() for batch in loader] == list(expected)
    assert len(loader) == len(expected)
