"""The network that is left when one sample's suppressed channels are removed: an independent reference of
contract 2.

Removal is torch-pruning's, through `gatedprune.prune_static`. Where torch-pruning cannot prune the model, the
dense model runs with the suppressed channels' columns zeroed in every layer that reads them and cut out of
the norms that take statistics over channels: the same as removal as long as nothing else mixes channels.
Either way the gain is put into the norm or layer that writes the site, found by watching tensors pass between
modules, not by the graph that `find_sites` reads.
"""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..compare import prune_static
from ..errors import ModelError
from ..sites import Edge, Site
from ..wrapping import GatedModel, unwrap
from .case import outputs

__all__ = ["removed"]

# Where a norm alone reads a layer, the gain is multiplied on the norm's output.
_NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")
# Statistics over several channels.
_ACROSS = ("group_norm", "layer_norm", "rms_norm", "response_norm")
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_LIMIT_S = 20.0  # torch-pruning never ends on some attention models, the smallest of them take it under 1 s else


def removed(gated: GatedModel, args: tuple[Any, ...], sample: int, oracle: str = "auto") -> tuple[nn.Module, str]:
    """The dense model without the channels that ``sample`` of the last forward pass suppressed, gain
    included.

    Args:
        gated: Has just run on ``args``; left as it is.
        args: The model's arguments.
        sample: Number of the sample.
        oracle: As in `Case`.

    Returns:
        The model, good for this sample only, and how its channels were removed.
    """
    chosen = {s.name: _Choice(s, gated, sample) for s in gated.gated_sites}
    inner = {n: c.active for n, c in chosen.items() if c.site.kind == "inner"}
    norms = _norms(gated, args)
    how = "no inner site"
    if inner and oracle != "columns":
        try:
            with _time_limit(_LIMIT_S):
                pruned = prune_static(gated, keep=inner, example_inputs=args, by="torch-pruning").model.eval()
        except (ModelError, ImportError, TimeoutError) as error:
            if oracle == "torch-pruning":
                raise AssertionError(f"torch-pruning was asked for as the reference and failed: {error}") from error
            how = f"columns zeroed ({str(error).split('.')[0][:120]})"
        else:
            _apply(pruned, chosen, norms, narrowed=set(inner))
            _cut_norms(pruned, {n: c for n, c in chosen.items() if n not in inner})
            return pruned, "torch-pruning"
    elif inner:
        how = "columns zeroed"
    model = unwrap(copy.deepcopy(gated))
    _apply(model, chosen, norms, narrowed=set())
    _cut_norms(model, chosen)
    return model, how


class _Choice:
    """One sample's choice at one site: ``gain``, (C + 1,), 0 where suppressed; the last is 1."""

    def __init__(self, site: Site, gated: GatedModel, sample: int) -> None:
        gate = gated.gates[site.name]
        assert gate.last_active is not None and gate.last_gain is not None
        there = gate.last_active[sample] < site.channels  # with a threshold C fills the row up
        self.site, self.active = site, gate.last_active[sample][there]
        gain = gate.last_gain.detach()
        self.gain = gain.new_zeros(site.channels + 1).index_put_((self.active,), gain[sample][there])
        self.gain[-1] = 1
        self.alive = torch.zeros(site.channels + 1, dtype=torch.bool).index_fill_(0, self.active.cpu(), True)
        self.alive[-1] = True


def _norms(gated: GatedModel, args: tuple[Any, ...]) -> dict[str, str]:
    """Path of a producer → path of the batch norm that reads the very tensor it wrote."""
    producers = {path for s in gated.gated_sites for path in s.branches}
    norms = {e.path for s in gated.gated_sites for e in s.carriers if e.op in _NORMS}
    written: dict[tuple, tuple[str, Tensor]] = {}  # holds the tensors, so that no memory is given out twice
    found: dict[str, str] = {}
    model = unwrap(copy.deepcopy(gated))

    def memory(x: Tensor) -> tuple:  # the same for a permutation, another after an in-place activation
        return x.data_ptr(), x.numel(), x._version

    def wrote(path: str) -> Any:
        return lambda module, x, y: written.__setitem__(memory(y), (path, y))

    def reads(path: str) -> Any:
        def hook(module: nn.Module, x: Any) -> None:
            if x and memory(x[0]) in written:
                found[written[memory(x[0])][0]] = path

        return hook

    for path in producers:
        model.get_submodule(path).register_forward_hook(wrote(path))
    for path in norms:
        model.get_submodule(path).register_forward_pre_hook(reads(path))
    outputs(model, args)
    return found


def _apply(model: nn.Module, chosen: dict[str, _Choice], norms: dict[str, str], narrowed: set[str]) -> None:
    """Put every site's gain where it belongs, and silence what sites that were not narrowed suppress."""
    alive: dict[tuple[str, int], Tensor] = {}
    for name in narrowed:
        for edge in chosen[name].site.edges:
            stays = chosen[name].alive[edge.units.cpu()]
            alive[edge.path, edge.dim] = alive.get((edge.path, edge.dim), torch.ones_like(stays)) & stays

    def scale(edge: Edge, values: Tensor) -> None:
        factor = values[edge.units.to(values.device)]
        if (edge.path, edge.dim) in alive:
            factor = factor[alive[edge.path, edge.dim].to(factor.device)]
        _scale(model.get_submodule(edge.path), edge, factor)

    for name, choice in chosen.items():
        for edge in _gain_edges(choice.site, norms):
            scale(edge, choice.gain)
        if name not in narrowed:
            _silence_constants(model, choice)
            for edge in choice.site.consumers:
                scale(edge, choice.alive.to(choice.gain))


def _gain_edges(site: Site, norms: dict[str, str]) -> list[Edge]:
    """Where the gain belongs: the norm behind each branch's producer, else that producer; for attention heads
    the readers.

    A layer that writes queries, keys and values would put the gain into their product more than once.
    """
    producer = site.producers[0]
    readers = [e for e in site.consumers if any(at.path == e.path and at.side == "input" for at in site.gain_at)]
    if len(readers) == len(site.gain_at):
        return readers
    # A norm may read a tensor that the residual stream takes as it is: there the layer itself is scaled.
    if site.kind == "stream" and any(at.path == producer.path and at.side == "output" for at in site.gain_at):
        return [producer]
    written = {e.path: e for e in site.producers if e.path in site.branches}
    return [next((e for e in site.carriers if e.path == norms.get(path)), edge) for path, edge in written.items()]


def _silence_constants(model: nn.Module, choice: _Choice) -> None:
    """A position embedding that is added to the channels of a stream site is none of a suppressed channel's either.

    Of inner sites nobody else reads what it is added to.
    """
    for edge in choice.site.carriers:
        if edge.op != "add" or choice.site.kind != "stream":
            continue
        for value in model.get_submodule(edge.path).parameters(recurse=False):
            if value.shape[-1] == len(edge.units):
                value.data *= choice.alive[edge.units.cpu()].to(value)


def _cut_norms(model: nn.Module, chosen: dict[str, _Choice]) -> None:
    """Norms that take statistics over several channels are really narrowed: zeros would count as channels."""
    alive: dict[str, Tensor] = {}
    for choice in chosen.values():
        for edge in choice.site.carriers:
            if edge.op in _ACROSS:
                stays = choice.alive[edge.units.cpu()]
                alive[edge.path] = alive.get(edge.path, torch.ones_like(stays)) & stays
    for path, stays in alive.items():
        model.set_submodule(path, _CutNorm(model.get_submodule(path), stays))


class _CutNorm(nn.Module):
    """A norm without the channels that do not stay; in their places it returns zeros."""

    def __init__(self, norm: nn.Module, stays: Tensor) -> None:
        super().__init__()
        self.norm, self.channels, self.kept = norm, len(stays), stays.nonzero()[:, 0]
        for name in ("weight", "bias"):
            value = getattr(norm, name, None)
            if isinstance(value, nn.Parameter):
                setattr(norm, name, nn.Parameter(value.detach()[self.kept.to(value.device)]))
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = max(1, norm.num_groups * len(self.kept) // self.channels)
            norm.num_channels = len(self.kept)
        else:
            norm.normalized_shape = (len(self.kept),)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        first = isinstance(self.norm, nn.GroupNorm) or "2d" in type(self.norm).__name__.lower()
        dim = 1 if first or x.shape[-1] != self.channels else x.dim() - 1
        kept = self.kept.to(x.device)
        y = self.norm(x.index_select(dim, kept))
        return y.new_zeros(x.shape).index_copy(dim, kept, y)


def _scale(module: nn.Module, edge: Edge, factor: Tensor) -> None:
    """Multiply the channels that a layer writes (``edge.dim`` 0) or reads (1), best in its parameters."""
    if type(module) in _PLAIN or edge.op in _NORMS:
        with torch.no_grad():
            for tensor in (module.weight, getattr(module, "bias", None)) if edge.dim == 0 else (module.weight,):
                if isinstance(tensor, Tensor):
                    view = [1] * tensor.dim()
                    view[edge.dim] = len(factor)
                    tensor.mul_(factor.view(view))
        return
    # Its forward may standardise the weight, say: scale what goes in or comes out.
    dim = -1 if edge.op == "linear" else 1

    def times(x: Tensor) -> Tensor:
        view = [1] * x.dim()
        view[dim] = x.shape[dim]  # a convolution of a few wide groups reads the same channels of each
        return x * factor.repeat(x.shape[dim] // len(factor)).view(view)

    if edge.dim == 0:
        module.register_forward_hook(lambda module, args, y: times(y))
    else:
        module.register_forward_pre_hook(lambda module, args: (times(args[0]), *args[1:]))


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after that many seconds; no effect outside the main thread or without signals."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"torch-pruning took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
