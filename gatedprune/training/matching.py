"""Matching batch norms of the gated model to the dense one: their input's mean and variance, on the same samples."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..functional import active_mask
from ..wrapping import GatedModel, apply_match

__all__ = ["Matching", "batch_norms", "following_norms"]

LIMIT = 8.0  # no channel's spread is multiplied or divided by more: it is nearly constant in one of the two models
CONSTANT = 1e-6  # of a channel's squared mean: a variance below may be float32's rounding


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Path → module of the batch norms that have statistics."""
    return {path: module for path, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None}  # fmt: skip


def following_norms(gated: GatedModel, *args: Any) -> dict[str, str]:
    """Path of each layer that reads a gated site → path of the batch norm that reads what it gives.

    Found by running the model: a norm follows a layer if it is called with the very tensor that the layer returned.

    Args:
        gated: A gated model, in eval mode. args: its arguments.
    """
    found: dict[str, str] = {}
    given: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def gives(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            given[path] = output

        return hook

    def takes(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, kwargs: dict) -> None:
            x = inputs[0] if inputs else next(iter(kwargs.values()))
            for reader in [reader for reader, y in given.items() if y is x]:
                found[reader] = path
                del given[reader]

        return hook

    try:
        for path in {edge.path for site in gated.gated_sites for edge in site.consumers}:
            handles.append(gated.get_submodule(path).register_forward_hook(gives(path)))
        for path, module in batch_norms(gated).items():
            # First of its hooks: one of those that match would replace the tensor.
            handles.append(module.register_forward_pre_hook(takes(path), prepend=True, with_kwargs=True))
        gated(*args)
    finally:
        for handle in handles:
            handle.remove()
    return found


class ChannelSums:
    """Count, sum and sum of squares of each channel, in float64."""

    def __init__(self) -> None:
        self.count: Tensor | float = 0.0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    @property
    def empty(self) -> bool:
        return not isinstance(self.count, Tensor)

    def add(self, rows: Rows, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add the rows of a batch; returns its own mean and variance, each (C,).

        Args:
            counted: (R, C), bool, what counts; None: all. Of channels of which nothing counts mean and variance are 0.
        """
        weight = rows.mean.new_full(rows.mean.shape, rows.places) if counted is None else rows.places * counted
        count, first = weight.sum(0), (weight * rows.mean).sum(0)
        second = (weight * rows.square).sum(0)
        self.count, self.first, self.second = self.count + count, self.first + first, self.second + second
        return _moments(count, first, second)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (C,)."""
        return _moments(*(torch.as_tensor(value) for value in (self.count, self.first, self.second)))


def _moments(count: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    mean = first / count.clamp_min(1)
    return mean, (second / count.clamp_min(1) - mean.square()).clamp_min(0)


@dataclass(frozen=True)
class Rows:
    """Mean and mean square of each row and channel of x (R, C, …), (R, C), float64, over ``places`` numbers each."""

    mean: Tensor
    square: Tensor
    places: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        x = x if x.dim() > 2 else x.unsqueeze(2)
        places, dims = math.prod(x.shape[2:]), list(range(2, x.dim()))
        # The norm, squared again, takes a tenth of the time of `torch.var_mean` on a CPU.
        return cls(x.mean(dims).double(), torch.linalg.vector_norm(x, dim=dims).double().square() / places, places)


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of x (B, C, …), float64."""
    return ChannelSums().add(Rows.of(x))


def match(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift that give values of mean and variance ``found`` those that are ``wanted``; all (C,)."""
    (mean, var), (target_mean, target_var) = found, wanted
    alive = (var > CONSTANT * mean.square()) & (target_var > CONSTANT * target_mean.square())
    scale = torch.where(alive, (target_var / var.clamp_min(1e-300)).sqrt().clamp(1 / LIMIT, LIMIT), 1.0)
    return scale, target_mean - scale * mean


class Matching:
    """While entered, batch norms are watched, and in gated passes matched.

    Each batch's gated pass is matched to the dense pass on the same batch, so that what comes later in the model sees
    matched values at once; what is summed up over batches gives the match to keep. A dense pass comes first. For the
    channels of a gated site only the samples count, in both passes, for which they win: elsewhere they are not there.

    Args:
        gated: A gated model without matches. paths: Of the batch norms.

    Attributes:
        dense: Whether the pass that runs is the dense one; set it anew for each.
    """

    def __init__(self, gated: GatedModel, paths: Iterable[str]) -> None:
        self.gated, self.paths = gated, sorted(set(paths))
        self._handles: list[RemovableHandle] = []
        self._last: dict[str, deque[Rows]] = {}  # of the last dense pass, call by call
        self.dense = True
        self._sites = {path: [(site.name, edge.units) for site in gated.gated_sites for edge in site.carriers
                              if edge.path == path] for path in self.paths}  # fmt: skip
        self._wanted = {path: ChannelSums() for path in self.paths}
        self._found = {path: ChannelSums() for path in self.paths}

    @property
    def dense(self) -> bool:
        return self._dense

    @dense.setter
    def dense(self, value: bool) -> None:
        self._dense = value
        if value:
            self._last = {path: deque() for path in self.paths}

    def matches(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Norm path → scale and shift, each (C,), float64, of those whose input is another than in the dense model."""
        found = {path: match(self._found[path].moments(), self._wanted[path].moments()) for path in self.paths}
        return {path: (scale, shift) for path, (scale, shift) in found.items() if (scale != 1).any() or shift.any()}

    def __enter__(self) -> Matching:
        for path in self.paths:
            module = self.gated.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._hook(path), with_kwargs=True))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            key = None if args else next(iter(kwargs))
            x = args[0] if key is None else kwargs[key]
            rows = Rows.of(x)
            calls = self._last[path]
            if self.dense:
                calls.append(rows)
                return None
            counted, dense = self._winners(path, len(x)), calls.popleft()
            calls.append(dense)  # for the next gated pass
            x = apply_match(x, *match(self._found[path].add(rows, counted), self._wanted[path].add(dense, counted)))
            return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})

        return hook

    def _winners(self, path: str, rows: int) -> Tensor | None:
        """(R, C), bool: which rows count for which channel of the norm's input; None: all."""
        counted: Tensor | None = None
        for site, units in self._sites[path]:
            gate = self.gated.gates[site]
            if gate.last_active is None or gate.active_count == gate.channels:
                continue
            wins = F.pad(active_mask(gate.last_active, gate.channels), (0, 1), value=True)[:, units]  # −1: not of it
            counted = wins if counted is None else counted & wins
        # Windows and tokens are folded into the batch, sample by sample.
        return None if counted is None else counted.repeat_interleave(rows // len(counted), 0)
