"""Gated models that are containers: the gates are a submodule of theirs, but none of their elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["GATES", "hiding"]

GATES = "gatedprune"  # the submodule that holds the gates: their state-dict keys start with it


class _Sized:
    """For containers whose forward pass, or whose user, goes through their submodules one by one."""

    _modules: dict[str, nn.Module]

    def __len__(self) -> int:
        return len(self._elements())

    def _elements(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self._modules.items() if name != GATES}


class _Listing(_Sized):
    def __iter__(self) -> Iterator[Any]:
        return iter(self._elements().values())


class _Dictionary(_Sized):
    def __iter__(self) -> Iterator[str]:
        return iter(self._elements())

    def __contains__(self, key: object) -> bool:
        return key in self._elements()

    def keys(self) -> Any:
        return self._elements().keys()

    def items(self) -> Any:
        return self._elements().items()

    def values(self) -> Any:
        return self._elements().values()


def hiding(base: type) -> tuple[type, ...]:
    """What a gated subclass of ``base`` needs in front of it, so that ``base`` does not come upon the gates.

    timm's ``features_only`` models are `nn.ModuleDict`s that run what they hold, as `nn.Sequential` does.
    """
    if issubclass(base, nn.ModuleDict):
        return (_Dictionary,)
    return (_Listing,) if issubclass(base, (nn.Sequential, nn.ModuleList)) else ()
