"""Multiply-accumulates (MACs) that a forward pass really executes, per sample.

thop visits the layers; PyTorch's own flop counter watches the operators. Either misses something: thop looks
layers up by exact type and sees no functional operator (a matrix product in attention, `F.conv2d` in a custom
forward), the flop counter knows no layers. So layers are counted by thop with rules of our own, what runs
outside of them by the flop counter, and wherever the two saw the same layer and disagree, the result says so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from ..config import predictor_size
from ..engine import CompactModel, NarrowConv2d, NarrowLinear, Selector
from ..gates import Gate
from .inputs import as_arguments, first_tensor

__all__ = ["MacCount", "count_macs", "count_parameters", "flop_counter_macs"]

MAX_NOTES = 5  # layers named in the notes before "… and n more"


@dataclass(frozen=True)
class MacCount:
    """MACs of one forward pass, per sample: convolutions, linear layers, matrix products and gates'
    predictors.

    Norms, activations, pooling, additions and up-sampling count zero, biases too.

    Args:
        total: Everything below together: layers + predictors + functional.
        layers: Module path → MACs of each convolution and linear layer, predictors left out.
        predictors: MACs of the gates' saliency predictors.
        functional: MACs of convolutions and matrix products that ran outside of any such layer, attention for
            one; thop alone would miss them.
        operators: The same forward pass as `torch.utils.flop_counter` sees it, operator by operator: the
            cross-check.
        per_sample: Total of each sample, where the gates have thresholds and samples cost differently (`spread`); else
            empty. Everything else is the mean then.
        notes: Where the layer rules and the flop counter disagree, and what else to know; empty when all is
            plain.
    """

    total: int
    layers: dict[str, int]
    predictors: int
    functional: int
    operators: int
    notes: tuple[str, ...] = field(default=())
    per_sample: tuple[int, ...] = ()

    @property
    def spread(self) -> dict[str, int] | None:
        """ "min", "p20", "p80" and "max" of the samples' MACs; None where all cost the same."""
        if not self.per_sample:
            return None
        p20, p80 = np.percentile(self.per_sample, [20, 80])
        return {"min": min(self.per_sample), "p20": round(p20), "p80": round(p80), "max": max(self.per_sample)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        text = f"{format_macs(self.total)} per sample, {format_macs(self.predictors)} of them in predictors"
        if (spread := self.spread) is not None:
            text += "; " + ", ".join(f"{name} {format_macs(macs)}" for name, macs in spread.items())
        return text


def format_macs(macs: float) -> str:
    """MACs with a unit: ``4.09 GMACs``."""
    for unit, size in (("GMACs", 1e9), ("MMACs", 1e6), ("kMACs", 1e3)):
        if macs >= size:
            return f"{macs / size:.3g} {unit}" if macs < 1e3 * size else f"{macs / size:.0f} {unit}"
    return f"{macs:.0f} MACs"


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters, each shared tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> MacCount:
    """Count what ``model(*inputs)`` executes in eval mode, per sample.

    The masked model that `wrap` returns computes every channel and then throws some away, so it counts as the
    dense model plus its predictors. `compact` it first to see what gating saves. Where gates have thresholds samples
    cost differently: the numbers are means over the batch, and `MacCount.spread` tells how far they lie apart.

    Args:
        model: Any module; works on a copy, and leaves the model and its state dict as they are.
        inputs: A tensor (B, …), or a tuple of the model's arguments.

    Raises:
        DataError: The inputs hold no tensor with a batch dimension.
        ImportError: thop is not installed (`pip install gatedprune[compare]`).
    """
    thop = _thop()
    arguments = as_arguments(inputs, "count_macs()")
    batch = first_tensor(arguments).shape[0]
    # thop leaves buffers in what it profiles; the flop counter breaks on a parameter as a layer's argument.
    model = copy.deepcopy(model).requires_grad_(False)
    if isinstance(model, CompactModel):
        model.prepare(*arguments)  # makes the layers for this image size, if it has none yet
        if batch > 1 and any(gate.varies for gate in model.gates.values()) and model.share == "sample":
            return _mean([_count(copy.deepcopy(model), one, thop) for one in _samples(arguments, batch)])
    return _count(model, arguments, thop)


def _samples(arguments: tuple[Any, ...], batch: int) -> Iterator[tuple[Any, ...]]:
    for b in range(batch):
        yield tuple(a[b : b + 1] if isinstance(a, Tensor) and a.dim() and a.shape[0] == batch else a for a in arguments)


def _mean(counts: list[MacCount]) -> MacCount:
    """One count for samples that were counted one by one."""

    def each(values: Iterable[int]) -> int:
        return round(sum(values) / len(counts))

    return MacCount(
        total=each(c.total for c in counts),
        layers={path: each(c.layers[path] for c in counts) for path in counts[0].layers},
        predictors=each(c.predictors for c in counts),
        functional=each(c.functional for c in counts),
        operators=each(c.operators for c in counts),
        notes=counts[0].notes,
        per_sample=tuple(c.total for c in counts),
    )


def _count(model: nn.Module, arguments: tuple[Any, ...], thop: ModuleType) -> MacCount:
    """`count_macs` of a copy that may be spoilt."""
    batch = first_tensor(arguments).shape[0]
    with _flop_counter() as operators:
        ledger = _Ledger(model, operators)
        thop.profile(model, arguments, custom_ops=ledger.custom_ops(), verbose=False)
    everything = operators.get_total_flops() // 2
    functional = everything - ledger.inside
    predictors = sum(ledger.by_rule[path] for path in ledger.predictors)
    layers = {path: macs for path, macs in ledger.by_rule.items() if path not in ledger.predictors}
    return MacCount(
        total=_each(sum(layers.values()) + predictors + functional, batch),
        layers={path: _each(macs, batch) for path, macs in layers.items()},
        predictors=_each(predictors, batch),
        functional=_each(functional, batch),
        operators=_each(everything, batch),
        notes=_notes(ledger, functional, batch),
    )


def flop_counter_macs(model: nn.Module, inputs: Tensor | tuple[Any, ...]) -> int:
    """MACs per sample by `torch.utils.flop_counter` alone (its FLOPs / 2), in eval mode.

    Raises:
        DataError: The inputs hold no tensor with a batch dimension.
    """
    arguments = as_arguments(inputs, "flop_counter_macs()")
    model = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad(), _flop_counter() as operators:
        model(*arguments)
    return _each(operators.get_total_flops() // 2, first_tensor(arguments).shape[0])


def _attention_flop(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    flop: int = sdpa_flop_count(query, key, value)
    return flop


def _flop_counter() -> FlopCounterMode:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # torch 2.6 does not count attention on CPUs.
    missing = {} if attention in flop_registry else {attention: _attention_flop}
    return FlopCounterMode(display=False, custom_mapping=missing)


class _Ledger:
    """What each layer costs by its rule, and what the flop counter saw while it ran.

    Keeps its own books, not thop's: thop hooks a module twice that hangs in two places of a model.
    """

    def __init__(self, model: nn.Module, operators: FlopCounterMode) -> None:
        self.operators = operators
        self.paths: dict[nn.Module, str] = {}
        self.by_rule: dict[str, int] = {}
        self.by_operators: dict[str, int] = {}
        self.predictors: set[str] = set()
        self.inside = 0  # MACs the flop counter saw inside any counted layer
        self._entered: dict[nn.Module, int] = {}
        self._rules: dict[type, Rule | None] = {type(module): _rule_for(module) for module in model.modules()}
        for path, module in model.named_modules():
            if self._rules[type(module)] is not None:
                self.paths[module] = path
                if isinstance(module, PREDICTORS):
                    self.predictors.add(path)
                self.by_rule[path] = self.by_operators[path] = 0
                module.register_forward_pre_hook(self._enter)

    def custom_ops(self) -> dict[type, Callable[..., None]]:
        """A rule for each type in the model: none of thop's own, which count norms and pooling too."""
        return {kind: _count_nothing if rule is None else self._leave for kind, rule in self._rules.items()}

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._entered[module] = self.operators.get_total_flops()

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        before = self._entered.pop(module, None)
        rule = self._rules[type(module)]
        if before is None or rule is None:  # the second of thop's two hooks on one module
            return
        path = self.paths[module]
        macs = rule(module, inputs, output)
        module.get_buffer("total_ops").add_(macs)
        self.by_rule[path] += macs
        seen = (self.operators.get_total_flops() - before) // 2
        self.by_operators[path] += seen
        if not self._entered:  # a layer inside a counted layer is part of that one
            self.inside += seen


Rule = Callable[[Any, Any, Any], int]


def _count_nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    pass


def _convolution(module: _ConvNd, inputs: tuple[Tensor], output: Tensor) -> int:
    if isinstance(module, _ConvTransposeNd):  # every input value meets each weight of its group once
        return inputs[0].numel() * math.prod(module.weight.shape[1:])
    return output.numel() * math.prod(module.weight.shape[1:])


def _linear(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> int:
    return output.numel() * module.in_features


def _gate(module: Gate, inputs: tuple[Tensor], output: Any) -> int:
    return inputs[0].shape[0] * predictor_size(module.channels, module.in_channels, module.rank)


def _selector(module: Selector, inputs: tuple[Tensor], output: Any) -> int:
    return _gate(module.gate, inputs, output)  # a narrow input is spread to all channels first


def _narrow_convolution(module: NarrowConv2d, inputs: tuple[Tensor], output: Any) -> int:
    output = output[0] if module.subsample else output
    # The tensors are really narrow: their shapes tell what each sample's own channels cost.
    read = module.weight.shape[1] if module.whole_groups else inputs[0].shape[1] // module.groups
    return output.numel() * read * math.prod(module.kernel_size)


def _narrow_linear(module: NarrowLinear, inputs: tuple[Tensor], output: Tensor) -> int:
    return output.numel() * inputs[0].shape[1 if module.x_columns else -1]


RULES: tuple[tuple[type, Rule], ...] = (
    (Gate, _gate),
    (Selector, _selector),
    (NarrowConv2d, _narrow_convolution),
    (NarrowLinear, _narrow_linear),
    (_ConvNd, _convolution),
    (nn.Linear, _linear),
)
PREDICTORS = (Gate, Selector)


def _rule_for(module: nn.Module) -> Rule | None:
    return next((rule for kind, rule in RULES if isinstance(module, kind)), None)


def _notes(ledger: _Ledger, functional: int, batch: int) -> tuple[str, ...]:
    notes = []
    if functional:
        notes.append(
            f"{format_macs(functional / batch)} per sample run outside of convolution and linear layers "
            "(attention, functional operators): counted by torch.utils.flop_counter, thop alone misses them."
        )
    differing = [path for path, macs in ledger.by_rule.items() if macs != ledger.by_operators[path]]
    for path in differing[:MAX_NOTES]:
        notes.append(
            f"{path}: {ledger.by_rule[path] // batch} MACs by the layer's rule, "
            f"{ledger.by_operators[path] // batch} by torch.utils.flop_counter."
        )
    if len(differing) > MAX_NOTES:
        notes.append(f"… and {len(differing) - MAX_NOTES} more layers on which the two disagree.")
    return tuple(notes)


def _each(total: int, batch: int) -> int:
    return round(total / batch)


def _thop() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # thop imports distutils
            import thop
    except ImportError as error:
        raise ImportError(
            "count_macs() needs thop, which is not installed: pip install 'gatedprune[compare]'"
        ) from error
    return thop
