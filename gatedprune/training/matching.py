"""Matching batch norms of the gated model to the dense one: their input's mean and variance, on the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from ..wrapping import GatedModel, apply_match

__all__ = ["Matching", "following_norms"]

LIMIT = 8.0  # no channel's spread is multiplied or divided by more: it is nearly constant in one of the two models


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
        for path, module in gated.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
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
        self.count = 0
        self.first: Tensor | float = 0.0
        self.second: Tensor | float = 0.0

    def add(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add x (B, C, …); returns its own mean and variance, each (C,)."""
        count = x.numel() // max(x.shape[1], 1)
        found = moments_of(x)
        mean, var = found
        self.count += count
        self.first = self.first + count * mean
        self.second = self.second + count * (var + mean.square())
        return found

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (C,)."""
        mean = torch.as_tensor(self.first) / self.count
        return mean, (torch.as_tensor(self.second) / self.count - mean.square()).clamp_min(0)


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of x (B, C, …), float64."""
    dims = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
    return mean.double(), var.double()


def match(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and shift that give values of mean and variance ``found`` those that are ``wanted``; all (C,)."""
    (mean, var), (target_mean, target_var) = found, wanted
    tiny = 1e-12 * (mean.square() + var)
    alive = (var > tiny) & (target_var > 0)
    scale = torch.where(alive, (target_var / var.clamp_min(1e-300)).sqrt().clamp(1 / LIMIT, LIMIT), 1.0)
    return scale, target_mean - scale * mean


class Matching:
    """While entered, batch norms that follow readers of gated sites are watched, and in gated passes matched.

    Each batch's gated pass is matched to the dense pass on the same batch, so that what comes later in the model sees
    matched values at once; what is summed up over batches gives the match to keep. A dense pass comes first.

    Args:
        gated: A gated model without matches. norms: Paths of the batch norms.

    Attributes:
        dense: Whether the pass that runs is the dense one.
    """

    def __init__(self, gated: GatedModel, norms: Mapping[str, str]) -> None:
        self.gated, self.paths = gated, sorted(set(norms.values()))
        self.dense = True
        self._handles: list[RemovableHandle] = []
        self._last: dict[str, tuple[Tensor, Tensor]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the sums."""
        self._wanted = {path: ChannelSums() for path in self.paths}
        self._found = {path: ChannelSums() for path in self.paths}

    def matches(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Norm path → scale and shift, each (C,), float64, of those that ran."""
        return {path: match(self._found[path].moments(), self._wanted[path].moments())
                for path in self.paths if self._found[path].count}  # fmt: skip

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
            if self.dense:
                self._last[path] = self._wanted[path].add(x)
                return None
            x = apply_match(x, *match(self._found[path].add(x), self._last[path]))
            return ((x, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: x})

        return hook
