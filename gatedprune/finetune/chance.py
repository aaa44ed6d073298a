"""Chance by position: every random draw follows from the seed, the epoch and the place in it, and from nothing else.

So a training that was killed goes on exactly where it was without any random state to be kept, however many processes
load images, and images look the same however many processes train.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["EpochSampler", "SeededDataset", "seed_everything"]

ORDER, IMAGE, STEP = 0, 1, 2  # what is drawn: one stream of numbers each


def seed_everything(*position: int, devices: bool = True) -> None:
    """Seed Python, NumPy and PyTorch by a position: a few non-negative integers.

    Args:
        devices: Also PyTorch's generators on accelerators. Without them it takes a sixth of the time.
    """
    drawn = np.random.SeedSequence(position).generate_state(1, np.uint64)[0]
    seed = int(drawn) & (2**63 - 1)
    random.seed(seed)
    np.random.seed(seed & (2**32 - 1))
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class EpochSampler(Sampler[tuple[int, int]]):
    """The (epoch, index) of each image of an epoch, in an order that follows from seed and epoch.

    Args:
        count: Images that there are. batch: images of a step; what does not fill one is left out, other
            images each epoch.
        seed: Of the order.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.epoch = self.start = 0

    def at(self, epoch: int, step: int = 0) -> None:
        """Begin the next iteration at this step of this epoch."""
        self.epoch, self.start = epoch, step * self.batch

    def __len__(self) -> int:
        return self.count // self.batch * self.batch - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, ORDER, self.epoch)).permutation(self.count)
        for index in order[self.start : self.count // self.batch * self.batch]:
            yield self.epoch, int(index)


class SeededDataset(Dataset):
    """A data set whose augmentation follows from seed, epoch and index; indexed by what `EpochSampler` yields."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = place
        seed_everything(self.seed, IMAGE, epoch, index, devices=False)
        image, label = self.dataset[index]
        return image, int(label)
