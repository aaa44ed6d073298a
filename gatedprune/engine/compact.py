"""`compact`: the model that computes only the active channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from ..errors import BackendError, ConfigError, DataError, ModelError
from ..gates import Gate
from ..sites import TURNS, Analysis, analyse, capture, normalise_inputs, two_samples
from ..wrapping import GatedModel, baked
from . import native, pages
from .lowering import lower
from .program import Programs
from .selection import Selector
from .tuning import apply_tuning, tune_layers

__all__ = ["CompactModel", "compact"]


BACKENDS = ("auto", "native", "torch")
_HALF = {torch.bfloat16, torch.float16}


def compact(gated: nn.Module, example_inputs: Any = None, *, backend: str = "auto",
            share: str = "sample", tune: bool | Mapping[str, str] = False) -> CompactModel:  # fmt: skip
    """The inference model of a gated one: it computes only the channels that win, for every input anew.

    Batch norms are folded, weights of the winners gathered, and activations stay narrow between a site's layers. It
    equals the gated model in eval mode up to rounding, takes any batch size and any device, and is a snapshot: training
    the gated model further does not change it.

    A bfloat16 or float16 model on the CPU takes and returns tensors of its type. The native backend computes it in
    float32, which its weights fit in exactly: it then equals ``gated.float()``, which has its choices from unrounded
    saliencies. Where the CPU multiplies bfloat16 numbers (AVX512_BF16), layers of a bfloat16 model do so, and add in
    float32: equal but for the rounding of each layer's input and folded weight.

    Args:
        gated: What `gatedprune.wrap` returned. Left as it is.
        example_inputs: A tensor (B, C, H, W) or a tuple of arguments to lower the model for at once; default: from the
            timm configuration. Other image sizes are lowered when they first come (a second or two each).

        backend: "native": the C++ engine, on the CPU, not for float64, built when first used (half a minute, once);
            "torch": plain PyTorch, anywhere; "auto": native where it can be had and the input fits it.
        share: "sample": every sample has its own active sets; "batch": the batch has one, from the mean over its
            samples of what the gates see, so that its layers run as one; outputs then depend on the batch.
        tune: Time each layer on ``example_inputs`` with the native backend and with plain PyTorch, and keep the faster
            (a few seconds); or the choice of an earlier model, its ``tuning``.

    Raises:
        ModelError: The model is not gated, or cannot be traced.
        BackendError: ``backend="native"`` cannot be had, or is given inputs that it does not compute.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"`backend` must be one of {', '.join(map(repr, BACKENDS))}. Got {backend!r}.")
    if share not in ("sample", "batch"):
        raise ConfigError(f"`share` must be 'sample' or 'batch'. Got {share!r}.")
    if not isinstance(gated, GatedModel):
        raise ModelError(
            f"compact() takes a model that gatedprune.wrap() returned. {type(gated).__name__} is not gated."
        )
    inputs = normalise_inputs(gated, example_inputs)
    model = CompactModel(gated, backend, share)
    if isinstance(tune, Mapping):
        model.tuning = dict(tune)
    graph = model.prepare(*inputs)
    if tune is True and model.backend == "native":
        if share == "sample" and any(gate.varies for gate in model.gates.values()):
            inputs = tuple(
                a[:1] if isinstance(a, Tensor) and a.dim() else a for a in inputs
            )  # it runs sample by sample
        model.tuning = tune_layers(graph, model._as_computed(inputs))
    return model


class CompactModel(nn.Module):
    """Computes only active channels; made by `compact`. Evaluation only: gradients do not flow through it."""

    def __init__(self, gated: GatedModel, backend: str = "auto", share: str = "sample") -> None:
        super().__init__()
        self._asked, self.share = backend, share
        self.tuning: dict[str, str] = {}
        if backend == "native":
            native.load(required=True)
        source = copy.deepcopy(gated).eval().requires_grad_(False)
        self._settle(source)
        # Not a submodule: its parameters live on in the lowered graphs, and it is never called.
        self.__dict__["_source"] = source
        self._half = self._widen()
        self._move()
        self._lowered = nn.ModuleDict()
        self._programs = Programs()
        self._last = ""
        self._chosen: dict[str, Tensor] | None = None  # what a call that went sample by sample chose
        self.train(False)

    def _settle(self, source: GatedModel) -> None:
        """For subclasses: what is to differ in the snapshot."""

    def _widen(self) -> torch.dtype | None:
        """Hold a bfloat16 or float16 model in float32 if the native backend is to compute it; its own type, or None."""
        source: GatedModel = self.__dict__["_source"]
        values = [t for t in (*source.parameters(), *source.buffers()) if t.is_floating_point()]
        kinds = {t.dtype for t in values}
        if self._asked == "torch" or len(kinds) != 1 or not kinds <= _HALF:
            return None
        if any(t.device.type != "cpu" for t in values) or not native.load():
            return None
        source.float()
        return kinds.pop()

    def _move(self) -> None:
        """To large pages. Here and not when first lowered: then other threads may be reading it."""
        if self._fits() and self._native():
            pages.move(self.__dict__["_source"])

    def _as_computed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments in the type that the model is computed in."""
        if self._half is None:
            return args
        return tuple(a.float() if isinstance(a, Tensor) and a.dtype is self._half else a for a in args)

    def source(self) -> GatedModel:
        """The gated model that this one is a snapshot of, in its own type."""
        source: GatedModel = self.__dict__["_source"]
        return source if self._half is None else copy.deepcopy(source).to(self._half)

    def prepare(self, *args: Any) -> fx.GraphModule:
        """Lower the model for arguments of these shapes (any batch size); done once for each image size."""
        args = self._as_computed(args)
        key = self._find(args)
        if key is None:
            with TURNS.tracing():  # which puts other tensors in the place of the source's meanwhile
                key = self._find(args) or self._lower(args)
        self._last = key
        return self._lowered[key]  # type: ignore[return-value]

    @property
    def backend(self) -> str:
        """What computes it where it is now: "native" or "torch"."""
        return "native" if self._native() else "torch"

    def _fits(self) -> bool:
        first = next(self.__dict__["_source"].parameters(), None)
        return first is not None and first.device.type == "cpu" and first.dtype is torch.float32

    def _native(self) -> bool:
        fits = self._fits()
        if self._asked == "native" and not fits:
            raise BackendError(
                "backend='native' computes float32, bfloat16 and float16 models on the CPU, of one type throughout. "
                "Use backend='auto' for anything else."
            )
        return self._asked != "torch" and fits and native.load()

    def forward(self, *args: Any) -> Any:
        """Like the gated model's: any batch size, including 0; every sample has its own active channels."""
        if self._half is None:
            return self._forward(args)
        half, y = self._half, self._forward(self._as_computed(args))
        return tree_map(lambda t: t.to(half) if isinstance(t, Tensor) and t.dtype is torch.float32 else t, y)

    def _forward(self, args: tuple[Any, ...]) -> Any:
        key = self._programs.key(args)
        program = self._programs.find(key)
        if program is not None:
            self._last, self._chosen = program.graph, None
            return program(*args)
        if not args or not any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
            raise DataError(
                "A compact model takes floating-point tensors such as (B, 3, H, W) images as positional arguments."
            )
        with torch.no_grad():
            if any(isinstance(a, Tensor) and a.dim() and not a.shape[0] for a in args):
                # An empty batch has the shape of a full one without its samples.
                one = tuple(a.new_zeros(1, *a.shape[1:]) if isinstance(a, Tensor) and a.dim() else a for a in args)
                return tree_map(lambda y: y[:0] if isinstance(y, Tensor) else y, self._compute(one, None))
            self._chosen = None
            if self.share == "sample" and any(gate.varies for gate in self.gates.values()):
                samples = next(a.shape[0] for a in args if isinstance(a, Tensor) and a.dim())
                if samples > 1:
                    return self._one_by_one(args, samples)
            return self._compute(args, key)

    def _compute(self, args: tuple[Any, ...], key: tuple | None) -> Any:
        """Run the graph of these shapes, and record it where there is a key, so that such a call need not come here."""
        graph = self.prepare(*args)
        if torch.compiler.is_dynamo_compiling():
            return graph(*args)
        with TURNS.running():
            if key is not None and self._native():
                return self._programs.make(key, graph, args, self._last)
            return graph(*args)

    def _one_by_one(self, args: tuple[Any, ...], samples: int) -> Any:
        """Sample by sample, where each has its own number of channels, so that no narrow tensor could hold two."""
        results, chosen = [], []
        for b in range(samples):
            one = tuple(
                a[b : b + 1] if isinstance(a, Tensor) and a.dim() and a.shape[0] == samples else a for a in args
            )
            results.append(self._compute(one, None))
            chosen.append(self.last_active)
        self._chosen = {name: torch.cat([c[name] for c in chosen]) for name in chosen[0]}
        return tree_map(lambda *y: torch.cat(y) if isinstance(y[0], Tensor) else y[0], *results)

    @property
    def last_active(self) -> dict[str, Tensor]:
        """Site name → active set (B, k) of the last call; (B, C) filled up with C, where the gate has a threshold."""
        if self._chosen is not None:
            return self._chosen
        modules = self._lowered[self._last].modules() if self._last else ()
        names = {id(g): name for name, g in self.gates.items()}
        found = {}
        for module in modules:
            if isinstance(module, Selector) and module.last_active is not None:
                active, gate = module.last_active, module.gate
                if gate.varies:
                    active = F.pad(active, (0, gate.channels - active.shape[1]), value=gate.channels)
                found[names[id(gate)]] = active
        return found

    @property
    def gates(self) -> dict[str, Gate]:
        """Site name → gate of the snapshot."""
        return self.__dict__["_source"].gates

    def train(self, mode: bool = True) -> CompactModel:
        """Evaluation only: ``mode`` True raises."""
        if mode:
            raise ModelError(
                "A compact model is for inference. Train the gated model that it was made from, then compact() again."
            )
        return super().train(False)

    def _find(self, args: tuple) -> str | None:
        for key in (_key(args, False), _key(args, True)):
            if key in self._lowered:
                return key
        return None

    def _lower(self, args: tuple) -> str:
        source: GatedModel = self.__dict__["_source"]
        with baked(source, source.gate_modules):  # anew each time, so that .double() is exact
            graph = capture(source, two_samples(args), dynamic_batch=True)
            values = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
            free = all(_varies(v.shape[0]) for v in values if isinstance(v, Tensor) and v.dim())
            if not free:
                graph = capture(source, args)
        analysis = analyse(source._gatedprune_base.__name__, graph, stream=source.gate_config.stream)
        missing = [s for s in source.gates if s not in analysis.sites]
        if missing:
            shapes = [tuple(a.shape) for a in args if isinstance(a, Tensor)]
            raise ModelError(
                f"On inputs of shape {shapes} the sites {missing[:3]} are gone: "
                "the model was wrapped for another kind of input."
            )
        key = _key(args, not free)
        graph = self._graph(analysis).eval()
        if self._native():
            pages.move(graph, besides=source)
        self._lowered[key] = graph
        return key

    def _graph(self, analysis: Analysis) -> fx.GraphModule:
        # Where the CPU has no such products, rounding weights for them would cost accuracy and win nothing.
        bfloat16 = self._half is torch.bfloat16 and torch.ops.gatedprune.multiplies_bfloat16()
        graph = lower(analysis, self.gates, self._native(), self.share == "batch", bfloat16=bfloat16)
        apply_tuning(graph, self.tuning)
        return graph

    def _apply(self, fn: Any, recurse: bool = True) -> CompactModel:
        # .to(), .double(), .cuda(): convert the source, and lower again when next called.
        source: GatedModel = self.__dict__["_source"]
        if self._half is not None:
            source.to(self._half)  # exact, since its values came from there
        source._apply(fn)
        self._half = self._widen()
        self._move()
        self._lowered.clear()
        self._programs.clear()
        self._last, self._chosen = "", None
        return self

    def __deepcopy__(self, memo: dict) -> CompactModel:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new

    def extra_repr(self) -> str:
        return f"{self.__dict__['_source']._gatedprune_base.__name__}, {len(self.gates)} gates, backend={self.backend}"


def _key(args: tuple, with_batch: bool) -> str:
    shapes = [
        "x".join(map(str, a.shape if with_batch else a.shape[1:])) if isinstance(a, Tensor) else repr(a) for a in args
    ]
    return ("batch:" if with_batch else "any:") + ",".join(shapes).replace(".", "_")


def _varies(size: Any) -> bool:
    """Whether a size was left open in tracing: a model that asks for ``len(x)`` fixes it, symbol or not."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None
