"""The hooks that run gates inside a model's own forward pass: the masked reference path, used in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import DataError
from ..functional import masked_norm, scale_batch_normed, scale_channels, spread, straight_through
from ..gates import Gate
from ..sites import Attach, NormAt, Site

__all__ = ["GatingState", "attach"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GatingState:
    """What all hooks of one gated model share: the switch that turns them off, and how to remove them."""

    def __init__(self) -> None:
        self.suspended = False
        self.handles: list[RemovableHandle] = []
        self.masks: dict[tuple[str, str, int], _Scale] = {}

    def remove(self) -> None:
        """Take every hook out of the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.masks.clear()


def _value(args: tuple, kwargs: dict) -> tuple[Tensor, str | None]:
    """The tensor a module was called with, and its keyword (None: the first positional argument)."""
    if args:
        return args[0], None
    key = next(iter(kwargs))
    return kwargs[key], key


class _Select:
    """Forward pre-hook of a site's first producer: the gate looks at its input."""

    def __init__(self, state: GatingState, gate: Gate, site: str) -> None:
        self.state, self.gate, self.site = state, gate, site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.state.suspended:
            return
        x, _ = _value(args, kwargs)
        dim = self.gate.channel_dim
        if x.dim() <= dim or x.shape[dim] != self.gate.in_channels:
            raise DataError(
                f"The gate of site {self.site!r} expects {self.gate.in_channels} channels in dimension {dim} of its "
                f"input. Got shape {tuple(x.shape)}: give the model the kind of input that it was wrapped for."
            )
        self.gate(x)


class _Factor:
    """The gate's gain (``boost``) or its 0/1 mask, for the channels of the value at one place.

    Args:
        gain: The gain, not the mask. silenced: of the site: its gain lets suppressed channels through.
    """

    def __init__(self, gate: Gate, at: Attach, gain: bool, silenced: bool) -> None:
        self.gate, self.at, self.gain, self.silenced = gate, at, gain, silenced

    def values(self) -> Tensor:
        """Of each channel of the site, (B, C); a mask may be bool."""
        wins, gains, whole = self.gate.last_wins, self.gate.last_gains, self.gate.last_whole
        assert wins is not None and gains is not None  # the graph orders the gate before its readers
        # Losers that learn do so where they become next to nothing: at the gain, or where a silenced site is read.
        if whole is not None and self.gain != self.silenced:
            return whole if self.gain else straight_through(wins.to(whole), torch.where(wins, whole.detach(), whole))
        return torch.where(wins, gains, int(self.silenced)) if self.gain else wins


class _Scale:
    """Multiply a value by its factors: one gain, or the masks of all sites that have channels in it.

    Args:
        norm: The batch norm that gives the value, if one does.
    """

    def __init__(self, state: GatingState, factor: _Factor, norm: nn.Module | None) -> None:
        self.state, self.factors = state, [factor]
        self.norm: Any = norm
        self._units: dict[torch.device, Tensor | None] = {}

    def product(self) -> Tensor:
        """Of each channel that the value has, (B, n)."""
        values = [factor.values() for factor in self.factors]
        both = values[0] if len(values) == 1 else torch.cat(values, 1)
        return spread(both.to(self.factors[0].gate.bias.dtype), self.units(both.device))

    def units(self, device: torch.device) -> Tensor | None:
        """Which of the factors' values, in a row, each channel takes: as `spread` has it."""
        if device not in self._units:
            found, offset = self.factors[0].at.units, self.factors[0].gate.channels
            for factor in self.factors[1:]:
                assert found is not None and factor.at.units is not None  # none of them has all of the channels
                found = torch.where(factor.at.units < 0, found, factor.at.units + offset)
                offset += factor.gate.channels
            self._units[device] = None if found is None else found.to(device)
        return self._units[device]

    def scale(self, x: Tensor) -> Tensor:
        at = self.factors[0].at
        # Losers that learn are next to nothing in the product, which can then not stand for what was multiplied.
        fate = at.fate if all(factor.gate.last_whole is None for factor in self.factors) else None
        if self.norm is not None:
            return scale_batch_normed(x, self.product(), self.norm.bias, fate)
        return scale_channels(x, self.product(), at.channel_dim, fate)


class _ScaleInput(_Scale):
    """Forward pre-hook."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.state.suspended:
            return None
        x, key = _value(args, kwargs)
        if key is None:
            return (self.scale(x), *args[1:]), kwargs
        return args, {**kwargs, key: self.scale(x)}


class _ScaleOutput(_Scale):
    """Forward hook."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        return None if self.state.suspended else self.scale(output)


class _Renorm:
    """Compute a layer norm over the active channels: one hook sees its input, another replaces its output."""

    def __init__(self, state: GatingState, gate: Gate, norm: NormAt, model: nn.Module) -> None:
        self.state, self.gate, self.norm = state, gate, norm
        # Modules and names, not parameters: these may be exchanged (load_state_dict(assign=True)).
        self.owners = [
            None if n is None else model.get_submodule(n.rpartition(".")[0]) for n in (norm.weight, norm.bias)
        ]
        self.seen: Tensor | None = None
        self.result: Tensor | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "seen": None, "result": None}

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.seen, self.result = None if self.idle else _value(args, kwargs)[0], None

    @property
    def idle(self) -> bool:
        # With every channel active the norm is what it was, to the last bit.
        return self.state.suspended or self.gate.active_count == self.gate.channels

    def output(self) -> Tensor:
        if self.result is not None:
            return self.result
        gate, norm, x, self.seen = self.gate, self.norm, self.seen, None
        assert x is not None and gate.last_wins is not None
        names = [(n or "").rpartition(".")[2] for n in (norm.weight, norm.bias)]
        found: list[Any] = [None if o is None else getattr(o, n) for o, n in zip(self.owners, names, strict=True)]
        weight, bias = found
        mask = spread(gate.last_wins.to(x.dtype), norm.source.units)
        dim = norm.source.channel_dim
        y = masked_norm(x, mask, dim, weight, bias, norm.eps, norm.kind)
        if len(norm.outputs) > 1:
            self.result = y
        return y


class _RenormInput:
    """Forward pre-hook where a layer norm's output enters the next module."""

    def __init__(self, renorm: _Renorm) -> None:
        self.renorm = renorm

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self.renorm.idle:
            return None
        _, key = _value(args, kwargs)
        if key is None:
            return (self.renorm.output(), *args[1:]), kwargs
        return args, {**kwargs, key: self.renorm.output()}


class _RenormOutput:
    """Forward hook of a layer norm's module."""

    def __init__(self, renorm: _Renorm) -> None:
        self.renorm = renorm

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        return None if self.renorm.idle else self.renorm.output()


def _attach_norm(model: nn.Module, norm: NormAt, gate: Gate, state: GatingState) -> None:
    renorm = _Renorm(state, gate, norm, model)
    source = model.get_submodule(norm.source.path)
    state.handles.append(source.register_forward_pre_hook(renorm, with_kwargs=True))
    for at in norm.outputs:
        module = model.get_submodule(at.path)
        if at.side == "input":
            state.handles.append(module.register_forward_pre_hook(_RenormInput(renorm), with_kwargs=True))
        else:
            state.handles.append(module.register_forward_hook(_RenormOutput(renorm)))


def attach(model: nn.Module, site: Site, gate: Gate, state: GatingState) -> None:
    """Register the hooks of one site; `GatingState.remove` takes them out again."""
    add = state.handles.append
    producer = model.get_submodule(site.gate_at.path)
    add(producer.register_forward_pre_hook(_Select(state, gate, site.name), with_kwargs=True))
    for norm in site.norms:  # before the gain, which is multiplied on what they give
        _attach_norm(model, norm, gate, state)
    for places, gain in ((site.gain_at, True), (site.masks, False)):
        for at in places:
            module = model.get_submodule(at.path)
            # timm's batch norms with an activation: its input is the norm's output.
            giver = module if at.side == "output" else model.get_submodule(at.path.rpartition(".")[0])
            batch_norm = giver if isinstance(giver, BATCH_NORMS) and at.channel_dim == 1 else None
            factor, place = _Factor(gate, at, gain, site.silenced), (at.path, at.side, at.channel_dim)
            if not gain and place in state.masks:
                state.masks[place].factors.append(factor)
                continue
            scale = (_ScaleInput if at.side == "input" else _ScaleOutput)(state, factor, batch_norm)
            if isinstance(scale, _ScaleInput):
                add(module.register_forward_pre_hook(scale, with_kwargs=True))
            else:
                add(module.register_forward_hook(scale))
            if not gain:
                state.masks[place] = scale
