"""What `torch.export` made, remembered: a model built like an earlier one gets that one's program, and its own weights.

Tests wrap and compact the same tiny models over and over, and tracing them takes more than half of their time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from gatedprune.gates import Gate

Export = Callable[[nn.Module, tuple[Any, ...], Any], Any]

WEIGHTS = ("_parameters", "_buffers")
# Numbers of handles, and what is listed by its name anyway.
LEFT_OUT = ("_modules", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class RememberedExports:
    """In the place of `gatedprune.sites.capture._exported`, which has its arguments."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self.programs: dict[Hashable, Any] = {}
        self.kept: list[Any] = []  # what keys name by its id, which nothing else may get meanwhile

    def __call__(self, model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Any:
        key = self.key(model, args, shapes)
        if key in self.programs:
            return _with_tensors(self.programs[key], _tensors(model))
        program = self.export(model, args, shapes)
        self.programs[key] = program
        return program

    def key(self, model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Hashable:
        """Equal for two models whose forward passes cannot differ but by their weights."""
        modules = []
        for name, module in model.named_modules(remove_duplicate=False):
            if name.startswith("gatedprune") or isinstance(module, Gate):  # gates are switched off
                continue
            kind = getattr(module, "_gatedprune_base", type(module))
            held = [
                (k, v) for k, v in sorted(vars(module).items()) if k not in LEFT_OUT and not k.startswith("_gatedprune")
            ]
            state = tuple((k, self.hooks(v) if k.endswith("hooks") else self.mark(v, k in WEIGHTS)) for k, v in held)
            modules.append((name, kind, self.by_id(kind.forward), state))
        first: dict[int, str] = {}
        objects = (*model.named_modules(remove_duplicate=False), *_tensors(model).items())
        same = tuple(first.setdefault(id(o), name) for name, o in objects)  # shared modules, tied weights
        return tuple(modules), same, tuple(self.mark(a, True) for a in args), repr(shapes), torch.get_default_dtype()

    def hooks(self, hooks: dict[int, Any] | None) -> Hashable:
        return tuple(
            self.by_id(h) for h in (hooks or {}).values() if not type(h).__module__.startswith("gatedprune.wrapping.")
        )

    def mark(self, value: Any, weights: bool) -> Hashable:
        """What a value is to a forward pass; ``weights``: of tensors, what a graph knows of its inputs."""
        if isinstance(value, Tensor) and (weights or not value.is_meta):
            shape = (tuple(value.shape), value.stride(), value.dtype, value.device)
            return shape if weights else (shape, repr(value.tolist()))
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return type(value), value
        if isinstance(value, (tuple, list)):
            return type(value), tuple(self.mark(v, weights) for v in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(self.mark(v, weights) for v in value)
        if isinstance(value, dict):
            return type(value), tuple((k, self.mark(v, weights)) for k, v in value.items())
        return self.by_id(value)

    def by_id(self, value: Any) -> Hashable:
        self.kept.append(value)
        return id(value)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for pairs in named for name, tensor in pairs}


def _with_tensors(program: Any, tensors: dict[str, Tensor]) -> Any:
    """The program with other weights; its own constants stay, and gates, which it does not read."""
    new = copy.copy(program)
    new._state_dict = {name: tensors.get(name, value) for name, value in program.state_dict.items()}
    new._constants = {name: tensors.get(name, value) for name, value in program.constants.items()}
    return new
