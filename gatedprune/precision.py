"""How far the fast path may be off in low precision, and the inputs to judge that on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["MOST_INPUTS", "ROUNDING_FACTOR", "in_float64", "nearby"]

# In the model's own precision the fast path may be off from float64 by as much again as plain PyTorch is.
ROUNDING_FACTOR = 2.0
# One early rounding moves all outputs of a sample together, so that a few samples may be unlucky: what looks wrong is
# judged over this many inputs.
MOST_INPUTS = 8


def in_float64(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, floating-point tensors in float64."""
    return tuple(value.double() if _floating(value) else value for value in inputs)


def nearby(inputs: tuple[Any, ...], count: int = MOST_INPUTS) -> Iterator[tuple[Any, ...]]:
    """The inputs, and then `count` − 1 near them: every value 10 % off at random, alike at every call."""
    yield inputs
    generator = torch.Generator().manual_seed(0)
    for _ in range(count - 1):
        yield tuple(
            value * (1 + 0.1 * torch.randn(value.shape, generator=generator).to(value)) if _floating(value) else value
            for value in inputs
        )


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
