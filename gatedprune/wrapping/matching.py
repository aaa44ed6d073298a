"""Batch norms of a gated model: what reaches them is matched to what reaches them in the dense one.

Without its suppressed channels a layer's output is smaller, and its mean is another; the batch norm behind it, and all
that come later, were made for the dense layer's. A scale and a shift for each channel of the norm's input put that
right. They live with the gates: the norm's own statistics stay, so a checkpoint of the backbone loads, and `unwrap`
restores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .hooks import GatingState, _value

__all__ = ["GateModules", "apply_match", "attach_matches", "bake", "baked", "is_match"]

PARTS = ("scale", "shift")


def is_match(key: str) -> bool:
    """Whether a key of the gates' state dict is a match's, not a gate's."""
    return key.rpartition(":")[2] in PARTS and ":" in key


class GateModules(nn.Module):
    """The submodule that holds a model's gates, and as buffers the matches of its batch norms."""

    def match(self, path: str) -> tuple[Tensor, Tensor] | None:
        """Scale and shift, each (C,), of the input of the batch norm ``path``; None: it stays as it is."""
        key = path.replace(".", "/")
        found = [self._buffers.get(f"{key}:{part}") for part in PARTS]
        return None if found[0] is None or found[1] is None else (found[0], found[1])

    @property
    def matched(self) -> tuple[str, ...]:
        """Paths of the batch norms whose input is matched."""
        return tuple(k.rpartition(":")[0].replace("/", ".") for k in self._buffers if k.endswith(":scale"))

    def set_match(self, path: str, scale: Tensor, shift: Tensor) -> None:
        """Match the input of the batch norm ``path``: x · scale + shift, each (C,)."""
        for part, value in zip(PARTS, (scale, shift), strict=True):
            self.register_buffer(f"{path.replace('.', '/')}:{part}", value)

    def clear_matches(self) -> None:
        """All batch norms see their input as it is."""
        self._buffers.clear()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Which norms are matched is part of what is loaded: take it over. A backbone's checkpoint says nothing of it.
        given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        if given:
            like = next(self.parameters())
            self.clear_matches()
            for key, value in given.items():
                if is_match(key):
                    self.register_buffer(key, torch.empty_like(value, device=like.device))
            super()._load_from_state_dict(state_dict, prefix, *args)


def apply_match(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift along dimension 1 of x (B, C, …), in x's dtype."""
    view = (1, -1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.to(x.dtype).view(view), x, scale.to(x.dtype).view(view))  # one pass over x


class _Match:
    """Forward pre-hook of a batch norm."""

    def __init__(self, state: GatingState, gates: GateModules, path: str) -> None:
        self.state, self.gates, self.path = state, gates, path

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        found = None if self.state.suspended else self.gates.match(self.path)
        if found is None:
            return None
        x, key = _value(args, kwargs)
        x = apply_match(x, *found)
        return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})


def attach_matches(model: nn.Module, gates: GateModules, state: GatingState) -> None:
    """Register the hooks of all batch norms that have statistics; they do nothing until a match is set."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            state.handles.append(module.register_forward_pre_hook(_Match(state, gates, path), with_kwargs=True))


@contextmanager
def baked(model: nn.Module, gates: GateModules) -> Iterator[None]:
    """While entered, the matches are in the statistics of the batch norms themselves: for a graph to be captured."""
    before: dict[Any, tuple[Tensor, Tensor]] = {}
    try:
        for norm, statistics in _with_matches(model, gates):
            before[norm] = norm.running_mean, norm.running_var
            norm.running_mean, norm.running_var = statistics
        yield
    finally:
        for norm, (mean, var) in before.items():
            norm.running_mean, norm.running_var = mean, var


@torch.no_grad()
def bake(model: nn.Module, gates: GateModules) -> None:
    """Put the matches into the statistics of the batch norms for good."""
    for norm, (mean, var) in _with_matches(model, gates):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    gates.clear_matches()


def _with_matches(model: nn.Module, gates: GateModules) -> Iterator[tuple[Any, tuple[Tensor, Tensor]]]:
    """Each batch norm that is matched, and the mean and variance with which it does by itself what it does now."""
    for path in gates.matched:
        found, norm = gates.match(path), model.get_submodule(path)
        assert found is not None and isinstance(norm, _BatchNorm)
        scale, shift = (v.double() for v in found)
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        # γ·(x·a + c − μ)/√(v + ε) + β is γ·(x − (μ − c)/a)/√((v + ε)/a² − ε + ε) + β.
        own = (mean.double() - shift) / scale, (var.double() + norm.eps) / scale.square() - norm.eps
        yield norm, (own[0].to(mean.dtype), own[1].to(var.dtype))
