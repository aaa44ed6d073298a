"""Chance by position: the same place draws the same, whatever came before."""

from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.finetune.chance import EpochSampler, SeededDataset, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_same_position_draws_the_same() -> None:
    seen = set()
    for position in ((0, 1, 2), (0, 1, 3), (0, 2, 1), (1, 1, 2), (0, 1)):
        seed_everything(*position)
        one = draw()
        draw()
        seed_everything(*position)
        assert draw() == one
        seen.add(one)
    assert len(seen) == 5


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_is_whole_batches_of_different_images_in_its_own_order(
    n: int, batch: int, seed: int, epoch: int
) -> None:
    sampler = EpochSampler(n, batch, seed)
    sampler.at(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) == n // batch * batch
    assert {e for e, _ in order} <= {epoch}
    indices = [i for _, i in order]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(n))
    for step in range(n // batch + 1):
        sampler.at(epoch, step)
        assert list(sampler) == order[step * batch :]
        assert len(sampler) == len(order) - step * batch


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = EpochSampler(50, 5, seed)
        for epoch in (0, 1, 2):
            sampler.at(epoch)
            orders.add(tuple(i for _, i in sampler))
    assert len(orders) == 6


class Noise:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[tuple[float, float, float], np.int64]:
        return draw(), np.int64(index)


def test_augmentation_follows_from_epoch_and_index() -> None:
    data = SeededDataset(Noise(), seed=5)
    first = data[0, 3]
    assert [data[0, i] for i in (1, 2, 3)][-1] == first
    assert len({data[epoch, i][0] for epoch in (0, 1) for i in range(4)}) == 8
    assert SeededDataset(Noise(), seed=6)[0, 3] != first
    assert type(first[1]) is int and len(data) == 4
