"""Follow channel labels through a captured graph: who writes, carries and reads each removable unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from . import rules
from .capture import concrete
from .labels import Const, Join, Units, Use

__all__ = ["Flow", "trace_flow"]


@dataclass
class Flow:
    """What `trace_flow` found.

    ``values`` maps each tensor node to its labels, to `Const`, or to a plain value. ``macs`` holds the dense MACs per
    sample of layers and of products of two activations; ``mixers`` are those products that work on attention heads;
    ``norms`` take their statistics over all channels of a site. ``through`` are operators with MACs of their own that
    channels pass through: they work on places, in every channel alike, and have no weights for channels. Additions are
    ``joins``, but those at the nodes ``merges`` unite what they add: ``merged``.
    """

    graph_module: fx.GraphModule
    units: Units = field(default_factory=Units)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    producers: list[Use] = field(default_factory=list)
    carriers: list[Use] = field(default_factory=list)
    consumers: list[Use] = field(default_factory=list)
    joins: list[Join] = field(default_factory=list)
    merged: list[Join] = field(default_factory=list)
    macs: dict[fx.Node, int] = field(default_factory=dict)
    mixers: list[Use] = field(default_factory=list)
    norms: list[Use] = field(default_factory=list)
    through: list[Use] = field(default_factory=list)
    merges: frozenset[fx.Node] = frozenset()

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The concrete shape of a tensor node for the example inputs."""
        return tuple(concrete(s) for s in node.meta["val"].shape)

    def labelled(self, node: Any) -> Tensor | None:
        """The labels of a node's value, or None where it carries none."""
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Tensor) else None

    def produce(self, node: fx.Node, count: int, groups: int = 1) -> np.ndarray:
        """Record that ``node`` writes ``count`` new channels (the same in each of its groups); their labels."""
        labels = np.tile(self.units.fresh(count).numpy(), groups)
        self.producers.append(Use(node, labels))
        return labels

    def carry(self, node: fx.Node, labels: np.ndarray) -> None:
        """Record that ``node`` has parameters for channels of these labels, and mixes none."""
        self.carriers.append(Use(node, labels))

    def consume(self, node: fx.Node, labels: np.ndarray) -> None:
        """Record that ``node`` mixes channels of these labels."""
        self.consumers.append(Use(node, labels))

    @property
    def batch(self) -> int:
        """How many samples the graph was captured with."""
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dim():
                return self.shape(node)[0]
        return 1

    def spread(self, labels: np.ndarray, dim: int, shape: tuple[int, ...]) -> Tensor:
        """A label tensor of that shape that varies along ``dim`` only."""
        view = [1] * len(shape)
        view[dim] = len(labels)
        return torch.from_numpy(np.ascontiguousarray(labels)).view(view).expand(shape)


def trace_flow(graph_module: fx.GraphModule, merges: frozenset[fx.Node] = frozenset()) -> Flow:
    """Run every operator of a captured graph on labels instead of data.

    Operators without a rule pin what enters them: nothing is ever gated by guesswork. ``merges``: additions that unite
    the channels they add (`joins` finds them).
    """
    flow = Flow(graph_module, merges=merges)
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            flow.values[node] = _placeholder(flow, node)
        elif node.op == "get_attr":
            value = _attribute(graph_module, str(node.target))
            flow.values[node] = Const(tuple(value.shape)) if isinstance(value, Tensor) else value
        elif node.op == "output":
            for label in _tensors(tree_map(lambda v: flow.values.get(v) if isinstance(v, fx.Node) else v, node.args)):
                flow.units.pin(label, "its channels leave the model as an output")
        else:
            flow.values[node] = _call(flow, node)
    return flow


def _attribute(module: Any, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _placeholder(flow: Flow, node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return value
    label = flow.units.fresh(1)
    flow.units.pin(label, "it is the model's input")
    return label.expand(flow.shape(node)) if value.dim() else label[0]


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)) or value is None


def _call(flow: Flow, node: fx.Node) -> Any:
    out = node.meta.get("val")
    if isinstance(out, (int, torch.SymInt)) and not isinstance(out, bool):
        return concrete(out)
    lookup: Callable[[fx.Node], Any] = flow.values.__getitem__
    args = fx.map_arg(node.args, lookup)
    kwargs = fx.map_arg(node.kwargs, lookup)
    leaves = tree_flatten((args, kwargs))[0]
    if not any(isinstance(v, Tensor) for v in leaves):
        if isinstance(out, Tensor):
            return Const(flow.shape(node))
        if isinstance(out, (tuple, list)):
            return tuple(Const(tuple(concrete(s) for s in o.shape)) if isinstance(o, Tensor) else o for o in out)
        return out
    return rules.apply(flow, node, args, kwargs)
