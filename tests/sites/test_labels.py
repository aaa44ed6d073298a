"""Labels: the vectorised union-find against a naive one, and what layers read of a label tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.sites.labels import WILD, Units, compress, distinct, number_pairs

SIZE = 24
LABEL = st.integers(-1, SIZE - 1)
PAIRS = st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=12)


class Naive:
    """Sets in a list."""

    def __init__(self) -> None:
        self.of = {i: {i} for i in range(SIZE)}

    def union(self, a: int, b: int) -> None:
        if WILD in (a, b):
            return
        merged = self.of[a] | self.of[b]
        for member in merged:
            self.of[member] = merged


def units() -> Units:
    made = Units()
    made.fresh(SIZE)
    return made


@given(st.lists(PAIRS, max_size=5))
def test_union_find_agrees_with_sets(rounds: list[list[tuple[int, int]]]) -> None:
    ours, naive = units(), Naive()
    for pairs in rounds:
        a, b = (np.array(side) for side in zip(*pairs, strict=True))
        ours.union(a, b)
        for x, y in pairs:
            naive.union(x, y)
    roots = ours.find(np.arange(SIZE)).tolist()
    for i in range(SIZE):
        assert roots[i] == min(naive.of[i])  # the lowest label speaks for its set
        for j in range(SIZE):
            assert (roots[i] == roots[j]) == (j in naive.of[i])


@given(st.lists(PAIRS, max_size=3), st.lists(st.lists(LABEL, min_size=1), max_size=3))
def test_pins_hold_for_the_whole_set(rounds: list[list[tuple[int, int]]], pins: list[list[int]]) -> None:
    ours = units()
    for number, labels in enumerate(pins):
        ours.pin(np.array(labels), f"reason {number}")
    for pairs in rounds:  # united only after they were pinned
        ours.union(*(np.array(side) for side in zip(*pairs, strict=True)))
    wanted = {int(r) for labels in pins for r in ours.find(np.array(labels)) if r != WILD}
    assert set(ours.pinned()) == wanted


def test_the_first_reason_stays() -> None:
    ours = units()
    ours.pin(np.array([3]), "first")
    ours.pin(np.array([3, 4]), "second")
    assert ours.pinned() == {3: "first", 4: "second"}


@pytest.mark.parametrize("size", [1022, 1023, 1024, 3000])
def test_wild_stays_wild_however_many_labels_there_are(size: int) -> None:
    ours = Units()
    ours.fresh(size)
    assert ours.find(np.array([WILD, size - 1])).tolist() == [WILD, size - 1]


@pytest.mark.parametrize("size", [7, 5000])
@pytest.mark.parametrize("lowest", [WILD, 0, 40])
def test_distinct_labels_are_numpy_unique(size: int, lowest: int) -> None:
    labels = np.random.default_rng(size).integers(lowest, 50, (size, 2))
    assert np.array_equal(distinct(labels), np.unique(labels))


@given(st.lists(st.tuples(LABEL, LABEL), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 3))
def test_pairs_are_numbered_as_sorted(columns: list[tuple[int, int]], first: int, then: int) -> None:
    """Against numpy's unique, on maps of which parts repeat and parts do not."""
    a, b = np.array(columns).T
    a = np.concatenate([np.tile(a, (first, 1)), np.tile(a[::-1], (then, 1))])[None]
    b = np.broadcast_to(b, a.shape)
    found, ranks = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1, return_inverse=True)
    count, ours = number_pairs(a, b)
    assert count == found.shape[1]
    assert np.array_equal(ours, ranks.reshape(a.shape))


def test_many_labels() -> None:
    ours = Units()
    a, b = ours.fresh(3000), ours.fresh(3000)
    assert torch.equal(torch.cat([a, b]), torch.arange(6000))
    ours.union(a, b)
    assert np.array_equal(ours.find(b), a.numpy())
    chain = ours.fresh(500)
    ours.union(chain[:-1], chain[1:])
    assert set(ours.find(chain).tolist()) == {6000}


def test_wild_labels_constrain_nothing() -> None:
    ours = units()
    ours.union(np.array([WILD, 1]), np.array([2, WILD]))
    assert ours.find(np.array([WILD, 1, 2])).tolist() == [WILD, 1, 2]


def test_compress_cuts_broadcasts() -> None:
    labels = torch.arange(6).view(1, 6, 1, 1).expand(2, 6, 4, 5)
    assert compress(labels).shape == (1, 6, 1, 1)
    assert torch.equal(compress(labels).expand(labels.shape), labels)


def test_a_layer_unites_what_shares_a_position() -> None:
    ours = units()
    # Position 0 holds units 0 and 1 in different places; position 1 holds unit 2 and padding.
    labels = torch.tensor([[0, 2], [1, WILD]]).view(1, 2, 2)
    assert ours.along(labels, 2).tolist() == [0, 2]
    assert ours.find(np.array([0, 1, 2])).tolist() == [0, 0, 2]


def test_along_a_broadcast_dimension() -> None:
    ours = units()
    assert ours.along(torch.tensor([5]).expand(2, 3, 4), 1).tolist() == [5, 5, 5]


def test_reduction_says_whether_anything_was_mixed() -> None:
    ours = units()
    labels = torch.arange(3).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    out, constant = ours.reduce(labels, (2, 3))
    assert constant
    assert out.shape == (2, 3, 1, 1)
    assert out[0, :, 0, 0].tolist() == [0, 1, 2]
    assert not ours.reduce(labels, (1,))[1]
