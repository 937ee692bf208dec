"""Balanced and plain batches: who is visited how often, and the same batches in every run and process."""

from __future__ import annotations

from collections import Counter
from itertools import chain

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
]


def samplers(labels: list[str], batch_size: int, **arguments: int) -> list[BalancedBatchSampler | ShuffledBatchSampler]:
    """One of each kind."""
    plain = ShuffledBatchSampler(len(labels), batch_size, **arguments)
    return [BalancedBatchSampler(labels, batch_size, **arguments), plain]


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    """Labels of two to four groups in any order, a batch size that they allow, and a seed."""
    sizes = draw(st.lists(st.integers(1, 15), min_size=2, max_size=4))
    labels = draw(st.permutations([f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]))
    return labels, len(sizes) * draw(st.integers(1, 4)), draw(st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts())
def test_batches_are_balanced(cohort: Cohort):
    """As many scans of each group in every batch and as many batches as the largest group needs, each of its scans
    once; in the other groups none is used again before all were used."""
    labels, batch_size, seed = cohort
    batches = list(BalancedBatchSampler(labels, batch_size, seed=seed))
    for batch in batches:
        shares = Counter(labels[index] for index in batch)
        assert set(shares) == set(labels) and len(set(shares.values())) == 1
    assert {len(batch) for batch in batches[:-1]} <= {batch_size} and 0 < len(batches[-1]) <= batch_size
    largest = max(Counter(labels).values())
    for label, n in Counter(labels).items():
        visits = [index for index in chain.from_iterable(batches) if labels[index] == label]
        assert len(visits) == largest
        for start in range(0, len(visits), n):
            assert len(set(visits[start : start + n])) == len(visits[start : start + n])


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), world_size=st.integers(2, 4))
def test_ranks_share_out_the_one_process_batches(cohort: Cohort, world_size: int):
    """Interleaved, the ranks' batches are the one-process batches and fewer full ones than ranks; equally many each."""
    labels, batch_size, seed = cohort
    ranks = [list(BalancedBatchSampler(labels, batch_size, seed, rank, world_size)) for rank in range(world_size)]
    together = list(chain.from_iterable(zip(*ranks, strict=True)))
    alone = list(BalancedBatchSampler(labels, batch_size, seed))
    assert together[: len(alone)] == alone and 0 <= len(together) - len(alone) < world_size
    assert all(len(batch) == batch_size for batch in together[len(alone) :])


@pytest.mark.parametrize("kind", [0, 1], ids=["balanced", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_does_not_depend_on_those_before(kind: int, world_size: int):
    """A resumed run has the batches that the uninterrupted one had; epochs and seeds differ."""
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


def test_groups_of_one_size_are_not_paired():
    """Who stands with whom is random: equal groups are not put into the same order."""
    pairs = list(BalancedBatchSampler(["a"] * 20 + ["b"] * 20, 2))
    assert sum(b - a == 20 for a, b in pairs) < 10  # 1 expected by chance


@pytest.mark.parametrize(("labels", "batch_size", "message"), REFUSED)
def test_what_cannot_be_balanced_is_refused(labels: list[str], batch_size: int, message: str):
    """One sentence that names the groups and what to do."""
    with pytest.raises(InputError, match=message):
        BalancedBatchSampler(labels, batch_size)
    with pytest.raises(InputError, match="seed is -1"):
        ShuffledBatchSampler(3, 2, seed=-1)


@pytest.mark.parametrize("balanced", ["True", "False"])
def test_a_config_gets_this_processs_share(balanced: str, monkeypatch: pytest.MonkeyPatch):
    """Of records, with a switch that is text; ignite knows the process; set_epoch reaches it through the loader."""
    monkeypatch.setattr("ignite.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("ignite.distributed.get_world_size", lambda: 2)
    records = [{"image": f"{i}.nii.gz", "label": label} for i, label in enumerate(LABELS)]
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_sampler=batch_sampler(records, 4, balanced, 1))
    expected = samplers(LABELS, 4, seed=1, rank=1, world_size=2)[balanced == "False"]
    for epoch in (0, 5):
        loader.batch_sampler.set_epoch(epoch)
        expected.set_epoch(epoch)
        assert [batch[0].tolist() for batch in loader] == list(expected)
