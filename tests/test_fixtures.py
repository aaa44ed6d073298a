"""The shared fixtures do what they say."""

from __future__ import annotations

import random

import numpy as np
import torch


def test_unwritten_memory_is_poisoned(poisoned_memory: None) -> None:
    assert torch.empty(1000).isnan().all()


def test_memory_is_not_poisoned_elsewhere() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_test_starts_from_the_same_seed() -> None:
    drawn = (random.random(), float(np.random.rand()), float(torch.rand(())))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert drawn == (random.random(), float(np.random.rand()), float(torch.rand(())))
