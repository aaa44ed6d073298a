"""The one timer: all latencies come from here, and models to be compared are timed together."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..sites import evaluating
from .inputs import as_arguments, first_tensor

__all__ = ["Latency", "measure_latency"]


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward call on the whole batch, in milliseconds.

    Args:
        median_ms: The middle one of the repeats.
        p20_ms: 20 % of the repeats were at most this long.
        p80_ms: 80 % of the repeats were at most this long.
        repeats: How many calls were timed.
        threads: Threads PyTorch used for one operator.
        batch: Samples a call.
        device: Type of the device the inputs lay on.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    threads: int
    batch: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ms ({self.p20_ms:.2f}–{self.p80_ms:.2f})"


def measure_latency(
    models: Mapping[str, Callable[..., Any]],
    inputs: Tensor | tuple[Any, ...],
    *,
    threads: int | None = None,
    warmup: int = 3,
    repeats: int = 20,
) -> dict[str, Latency]:
    """Time models side by side: in one process, alternating, in eval and inference mode.

    One round calls every model once; the order rotates from round to round, so that a machine that slows down
    slows all of them. Train/eval modes and the number of threads are as before when this returns or raises.

    Args:
        models: Name → model (or any function of the inputs).
        inputs: A tensor (B, …), or a tuple of the models' arguments.
        threads: Threads for one operator while timing; default: as they are.
        warmup: Rounds before timing starts (allocation, lazy initialisation, caches).
        repeats: Rounds that are timed.

    Returns:
        Name → `Latency`, in the order given.

    Raises:
        ConfigError: No model, or a number out of its domain.
        DataError: The inputs are no tensors with a batch dimension.
    """
    _check(models, threads, warmup, repeats)
    arguments = as_arguments(inputs, "measure_latency()")
    example = first_tensor(arguments)
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _threads(threads), _eval_mode(models.values()), _no_collection(), torch.inference_mode():
        for turn in range(warmup + repeats):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                elapsed = _time_once(models[name], arguments, example.device)
                if turn >= warmup:
                    times[name].append(elapsed)
        used = torch.get_num_threads()
    found = {}
    for name, values in times.items():
        p20, median, p80 = (float(v) for v in np.percentile(values, [20, 50, 80]))
        found[name] = Latency(median, p20, p80, repeats, used, example.shape[0], example.device.type)
    return found


def _check(models: Mapping[str, Any], threads: int | None, warmup: int, repeats: int) -> None:
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(
            "`models` of measure_latency() must be a non-empty dict of names and models, "
            f"such as {{'dense': model}}. Got {type(models).__name__ if models else models!r}."
        )
    for name, value, least in (("threads", threads, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if name == "threads" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"`{name}` of measure_latency() must be an integer of at least {least}. Got {value!r}.")


def _time_once(model: Callable[..., Any], inputs: tuple[Any, ...], device: torch.device) -> float:
    """Milliseconds of one call, the device's queue drained on both sides."""
    _synchronize(device)
    start = time.perf_counter()
    model(*inputs)
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _eval_mode(models: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for model in models:
            if isinstance(model, nn.Module):
                stack.enter_context(evaluating(model))
        yield


@contextmanager
def _no_collection() -> Iterator[None]:
    # A collection of garbage in the middle of one call would be charged to that call.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
