"""How much memory a model takes: its weights, and what one call allocates at its worst moment."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..sites import evaluating
from .inputs import as_arguments, first_tensor

__all__ = ["Memory", "measure_memory"]

_CALL = "gatedprune: the call whose memory is measured"


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Args:
        weights: Parameters and buffers; memory that several share counts once.
        working: The largest sum of what is alive at one moment of a call, on top of weights and inputs: activations,
            gathered weights, what operators need meanwhile.
    """

    weights: int
    working: int

    @property
    def peak(self) -> int:
        """Weights and working memory together."""
        return self.weights + self.working

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**dataclasses.asdict(self), "peak": self.peak}


def measure_memory(model: Callable[..., Any], inputs: Tensor | tuple[Any, ...]) -> Memory:
    """The memory of one call in eval and inference mode, as PyTorch's allocator sees it.

    On the CPU PyTorch's profiler records each allocation and release, so the number is the same on every run, which the
    size of a process is not: that moves with what the C library keeps for later. Not seen is what does not come from
    PyTorch's allocator: the scratch memory of matrix products, and the native engine's (up to a few MB a thread). On
    CUDA it is `torch.cuda.max_memory_allocated`.

    Args:
        model: A module, or any function of the inputs (then without weights).
        inputs: A tensor (B, …), or a tuple of the model's arguments.

    Raises:
        DataError: The inputs hold no tensor with a batch dimension.
    """
    arguments = as_arguments(inputs, "measure_memory()")
    device = first_tensor(arguments).device
    with evaluating(model) if isinstance(model, nn.Module) else _nothing(), torch.inference_mode():
        working = (_cuda if device.type == "cuda" else _profiled)(model, arguments, device)
    return Memory(_weights(model) if isinstance(model, nn.Module) else 0, working)


def _cuda(model: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> int:
    model(*arguments)  # what is made once, in the first call, is not part of a call
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(*arguments)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _profiled(model: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> int:
    """Bytes alive at the worst moment of the second of two calls on the CPU, above what was alive before it."""
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        model(*arguments)  # what is made once; recorded, since the next call may release some of it
        with torch.profiler.record_function(_CALL):
            result = model(*arguments)
            del result  # alive until here: part of the peak
    events = sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(e.start_ns() for e in events if e.name() == _CALL)
    alive = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]" and e.start_ns() >= start)
    return max(alive, default=0)


def _weights(model: nn.Module) -> int:
    storages = {}
    for value in itertools.chain(model.parameters(), model.buffers()):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the profiler's own log, which it writes past Python's streams."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
