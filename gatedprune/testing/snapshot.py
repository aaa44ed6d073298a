"""What a model is before it is wrapped, to be compared with what it is after unwrapping."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

__all__ = ["Snapshot"]

_CONTAINERS = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """The modules of a model: their classes, attributes, hooks and tensors, of which a digest says enough."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {path: (type(m), m, _attributes(m)) for path, m in model.named_modules(remove_duplicate=False)}
        self.digests = {key: _digest(value) for key, value in model.state_dict().items()}
        self.gradients = {name: p.requires_grad for name, p in model.named_parameters()}

    def differences(self, model: nn.Module) -> list[str]:
        """What is not as it was, a line each; empty where the model is the same, bit for bit."""
        found = []
        now = dict(model.named_modules(remove_duplicate=False))
        for path in sorted(self.modules.keys() ^ now.keys()):
            found.append(f"module {path!r} " + ("is new" if path in now else "is gone"))
        for path, (kind, module, attributes) in self.modules.items():
            if path in now:
                where = f"module {path!r}" if path else "the model"
                if now[path] is not module:
                    found.append(f"{where} was replaced")
                if type(now[path]) is not kind:
                    found.append(f"{where} is of class {type(now[path]).__name__}, was {kind.__name__}")
                found += [f"{where}: {line}" for line in _compare(attributes, _attributes(now[path]))]
        state = model.state_dict()
        if list(state) != list(self.digests):
            found.append(f"state-dict keys differ: {sorted(state.keys() ^ self.digests.keys())[:5]}")
        found += [
            f"tensor {key} changed" for key in self.digests if key in state and self.digests[key] != _digest(state[key])
        ]
        found += [
            f"requires_grad of {n} changed"
            for n, p in model.named_parameters()
            if self.gradients.get(n, p.requires_grad) != p.requires_grad
        ]
        return found


def _digest(value: Any) -> Any:
    """Type, shape and a hash of a tensor's bits: a copy of a large model's parameters would be large too."""
    if not isinstance(value, Tensor):
        return value
    bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return value.dtype, value.shape, hashlib.blake2b(bits.data).digest()


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attribute → value; dictionaries of hooks as their length, containers as their keys."""
    out: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in _CONTAINERS:
            out[name] = list(value)
        elif "hooks" in name and hasattr(value, "__len__"):
            out[name] = len(value)
        else:
            out[name] = value
    return out


def _compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = [
        f"attribute {name} " + ("is new" if name in after else "is gone")
        for name in sorted(before.keys() ^ after.keys())
    ]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if isinstance(old, int) and "hooks" in name:
            if old != new:
                lines.append(f"{name} holds {new} entries, had {old}")
        elif not _equal(old, new):
            shown = "changed" if _holds_tensor(old) or _holds_tensor(new) else f"is {new!r}, was {old!r}"
            lines.append(f"attribute {name} {shown}")
    return lines


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])


def _equal(old: Any, new: Any) -> bool:
    """By value: torch.export puts equal copies in the place of lists, tuples and dictionaries."""
    if old is new:
        return True
    (before, spec), (after, other) = tree_flatten(old), tree_flatten(new)
    return spec == other and all(
        _same(a, b)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
        for a, b in zip(before, after, strict=True)
    )


def _same(a: Tensor, b: Tensor) -> bool:
    # Bits, not values: a NaN that stays is no change.
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
