"""Which backend computes each layer of a lowered model: measured, not guessed."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ConfigError
from .narrow import NarrowConv2d, NarrowLinear

__all__ = ["apply_tuning", "tune_layers"]

_LAYERS = (NarrowConv2d, NarrowLinear)
# Plain PyTorch must be faster by this much: below it, the timer's noise decides.
_MARGIN = 0.95


def apply_tuning(graph: fx.GraphModule, tuning: Mapping[str, str]) -> None:
    """Give each layer named in ``tuning`` its backend, "native" or "torch".

    Raises:
        ConfigError: Another backend.
    """
    for path, backend in tuning.items():
        if backend not in ("native", "torch"):
            raise ConfigError(f"`tune` names the backend {backend!r} for {path!r}. It must be 'native' or 'torch'.")
        layer = graph.get_submodule(path) if _has(graph, path) else None
        if isinstance(layer, _LAYERS) and backend == "torch":  # names of another image size's graph are passed over
            _leave_native(layer)


def _leave_native(layer: Any) -> None:
    """Compute with plain PyTorch, which would copy weights whose rows lie apart at each call."""
    layer.weight = layer.weight.contiguous()
    layer.native = False


def tune_layers(graph: fx.GraphModule, inputs: tuple[Any, ...], rounds: int = 5) -> dict[str, str]:
    """Time every layer both ways on what it really receives, alternating; set and return the faster ones.

    Args:
        graph: A graph lowered for the native backend.
        inputs: Example inputs.
        rounds: Calls of each layer that are timed; the fastest counts.

    Returns:
        Path of the layer → "native" or "torch".
    """
    tuner = _Tuner(graph, rounds)
    with torch.inference_mode():
        tuner.run(*inputs)
    apply_tuning(graph, tuner.found)
    return tuner.found


class _Tuner(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, rounds: int) -> None:
        super().__init__(graph)
        self.rounds, self.found = rounds, dict[str, str]()

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        layer = self.module.get_submodule(target)
        if isinstance(layer, _LAYERS) and layer.native:
            plain = copy.deepcopy(layer)
            _leave_native(plain)
            ways, times = {"native": layer, "torch": plain}, {"native": float("inf"), "torch": float("inf")}
            for turn in range(2 * (self.rounds + 1)):
                backend = ("native", "torch")[turn % 2]
                seconds = self._once(ways[backend], args)
                if turn >= 2:  # the first call of each warms up
                    times[backend] = min(times[backend], seconds)
            self.found[str(target)] = "torch" if times["torch"] < _MARGIN * times["native"] else "native"
        return super().call_module(target, args, kwargs)

    def _once(self, layer: Any, args: tuple) -> float:
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args] if getattr(layer, "inplace", False) else args
        start = time.perf_counter()
        layer(*copies)
        return time.perf_counter() - start


def _has(graph: nn.Module, path: str) -> bool:
    return path in dict(graph.named_modules())
