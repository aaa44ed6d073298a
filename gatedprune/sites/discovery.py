"""`find_sites`: from labels to sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import operators
from .boundary import Boundaries
from .capture import capture, normalise_inputs, two_samples
from .costs import layer_costs
from .fate import fate
from .flow import Flow
from .joins import branches_of, trace
from .labels import Const, Use, compress, distinct
from .norms import NORMS, norm_at, past_movement
from .site import Attach, Edge, NormAt, Site, SiteReport, identity_units

__all__ = ["Analysis", "SiteNodes", "analyse", "find_sites"]


@dataclass(frozen=True, eq=False)
class SiteNodes:
    """A site on the graph: what the engine needs beside `Site` itself.

    Attributes:
        site: The site.
        roots: Its units' representatives, in unit order.
        producer: Node of the first producer. gate_input: The value that the gate sees. gains: The values that the gain
            multiplies, one for each branch. unsafe: Consumers (and joins) whose input holds suppressed channels that
            are not zero.
    """

    site: Site
    roots: np.ndarray
    producer: fx.Node
    gate_input: fx.Node
    gains: tuple[fx.Node, ...]
    unsafe: frozenset[fx.Node]


@dataclass(frozen=True, eq=False)
class Analysis:
    """The flow of a captured graph, the sites found on it and the report."""

    flow: Flow
    sites: dict[str, SiteNodes]
    report: SiteReport


class _Skip(Exception):
    """Why a candidate cannot be a site."""


def find_sites(model: nn.Module, example_inputs: Any = None, *, stream: bool = False) -> SiteReport:
    """Find every channel dimension of a model that can be gated. Changes nothing.

    Args:
        model: Any module that `torch.export` can trace; a gated model is looked at without its gates.
        example_inputs: A tensor (B, C, H, W) or a tuple of the model's arguments; default: zeros of the size that the
            timm configuration names, else (2, 3, 224, 224).
        stream: Also list the producers of the residual stream.

    Returns:
        A `SiteReport`: iterable, printable, with the reason why each other layer is not gated.

    Raises:
        ModelError: The model cannot be traced. ConfigError: ``example_inputs`` is not a tensor of numbers.
    """
    args = two_samples(normalise_inputs(model, example_inputs))
    return analyse(type(model).__name__, capture(model, args), stream=stream).report


def analyse(name: str, graph_module: fx.GraphModule, *, stream: bool = False) -> Analysis:
    """Sites of a captured graph (see `capture`); ``name`` heads the report."""
    with torch.device("cpu"):  # labels are numbers to compute with, whatever the default device
        return _Discovery(trace(graph_module), stream).run(name)


class _Discovery:
    """One pass from flow to sites; holds the look-ups that its steps share."""

    def __init__(self, flow: Flow, stream: bool) -> None:
        self.flow, self.stream = flow, stream
        self.boundaries = Boundaries(flow)
        self.order = {node: i for i, node in enumerate(flow.graph_module.graph.nodes)}
        self.pinned = flow.units.pinned()
        self.joined = {r for join in flow.joins for r in flow.units.find(join.labels).tolist()}
        self.skipped: dict[str, str] = {}
        # What passes channels through comes last: it has no weights for them, and is no part of a unit's signature.
        kinds = (flow.producers, flow.carriers, flow.consumers, flow.mixers, flow.norms, flow.through)
        self.kinds = {id(uses): kind for kind, uses in enumerate(kinds)}
        self.found = [[flow.units.find(use.labels) for use in uses] for uses in kinds]
        self.signatures = self._signatures()
        self.heads = {r for use in flow.mixers for r in distinct(flow.units.find(use.labels)).tolist()}
        self.branches = branches_of(flow)
        self.total = sum(flow.macs.values())

    def run(self, name: str) -> Analysis:
        flow = self.flow
        grouped: dict[tuple, list[int]] = defaultdict(list)
        for i, use in enumerate(flow.producers):
            roots = dict.fromkeys(flow.units.find(use.labels).tolist())
            first = [r for r in roots if self.signatures[r][0][:2] == (0, i)]
            free = [r for r in first if r not in self.pinned]
            for root in free:
                grouped[(i, tuple(self.signatures[root]), root in self.joined)].append(root)
            if first and not free:
                self._skip(use.node, self.pinned[first[0]])
        self.readers: set[int] = {r for use in flow.consumers for r in flow.units.find(use.labels).tolist()}
        sites: dict[str, SiteNodes] = {}
        for (i, _, joined), members in sorted(grouped.items(), key=lambda item: (item[0][0], item[1][0])):
            node = flow.producers[i].node
            try:
                found = self._site(node, np.array(members), joined, sites)
            except _Skip as reason:
                self._skip(node, str(reason))
            else:
                sites[found.site.name] = found
        for site, found in sites.items():
            self.skipped.pop(site, None)
            if found.site.silenced and self._gates_between(found, sites.values()):
                sites[site] = replace(found, site=replace(found.site, silenced=False))
        in_sites = {n for s in sites.values() for n in self._nodes(s.roots)}
        layers = layer_costs(flow, {n: s.roots for n, s in sites.items()}, self._path)
        report = SiteReport(name, tuple(s.site for s in sites.values()), dict(self.skipped), self.total,
                            sum(flow.macs.get(n, 0) for n in in_sites), layers)  # fmt: skip
        return Analysis(flow, sites, report)

    def _signatures(self) -> dict[int, list[tuple[int, int, int]]]:
        """Which layers touch each unit, and with how many of its channels: what one site's units have in common.

        Where a layer's output is split and the parts go different ways, each part is a site of its own, so that every
        tensor keeps the same number of channels for every sample.
        """
        out: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for kind, uses in enumerate(self.found[:-1]):
            for i, labels in enumerate(uses):
                roots, counts = np.unique(labels, return_counts=True)
                entries = {count: (kind, i, count) for count in distinct(counts).tolist()}
                for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                    out[root].append(entries[count])
        return out

    def _skip(self, node: fx.Node, reason: str) -> None:
        self.skipped.setdefault(self.boundaries.innermost(node) or str(node.target), reason)

    def _uses(self, uses: list[Use], roots: np.ndarray) -> list[tuple[Use, np.ndarray]]:
        """The uses that touch the site, each with its channel → unit map."""
        kind = self.kinds[id(uses)]
        if uses is self.flow.through:
            hits = [i for i, labels in enumerate(self.found[kind]) if np.isin(labels, roots).any()]
        else:  # what touches one unit of a site touches all of them (see `_signatures`)
            hits = [i for k, i, _ in self.signatures[int(roots[0])] if k == kind]
        return [(uses[i], self._units(self.found[kind][i], roots)) for i in hits]

    def _units(self, found: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """Position in ``roots`` of each representative; −1 where it is none of them."""
        order = np.argsort(roots)
        ordered = roots[order]
        at = np.searchsorted(ordered, found).clip(max=len(roots) - 1)
        return np.where(ordered[at] == found, order[at], -1)

    def _nodes(self, roots: np.ndarray) -> list[fx.Node]:
        flow = self.flow
        kinds = (flow.producers, flow.carriers, flow.consumers, flow.mixers, flow.through)
        return [u.node for uses in kinds for u, _ in self._uses(uses, roots)]

    def _macs(self, roots: np.ndarray) -> int:
        """Dense MACs of the site's layers, each for the share of its channels that belongs to the site."""
        flow, share = self.flow, dict.fromkeys(self.flow.macs, 0.0)
        for uses in (flow.producers, flow.carriers, flow.consumers, flow.mixers, flow.through):
            for use, units in self._uses(uses, roots):
                if use.node in share:
                    share[use.node] = max(share[use.node], float((units >= 0).mean()))
        return int(sum(flow.macs[node] * part for node, part in share.items()))

    def _edge(self, use: Use, units: np.ndarray, dim: int) -> Edge:
        op = operators.op_name(use.node.target)
        return Edge(self._path(use.node), op, dim, torch.from_numpy(units))

    def _path(self, node: fx.Node) -> str:
        owner = self._owner(node)
        return self.boundaries.innermost(node) if owner is None else owner

    def _owner(self, node: fx.Node) -> str | None:
        """The module that owns the operator's weight, also in functional calls and where the weight is computed."""
        todo = [a for a in node.all_input_nodes if isinstance(self.flow.values.get(a), Const)]
        while todo:
            weight = todo.pop(0)
            if weight.op == "get_attr":
                return str(weight.target).rpartition(".")[0]
            todo += weight.all_input_nodes
        return None

    def _site(self, node: fx.Node, roots: np.ndarray, joined: bool, known: dict) -> SiteNodes:
        flow, channels = self.flow, len(roots)
        if channels < 2:
            raise _Skip("all of its channels can only be removed together")
        if joined and not self.stream:
            raise _Skip("its channels are added to the residual stream (stream=True gates them)")
        if not joined and not any(int(r) in self.readers for r in roots):
            raise _Skip("no layer reads its channels")
        gate_path, gate_input, channel_dim = self._gate(node)
        in_channels = flow.shape(gate_input)[channel_dim]
        consumers = self._uses(flow.consumers, roots)
        carriers = self._uses(flow.carriers, roots)
        macs = self._macs(roots)
        if in_channels * channels >= 0.5 * macs:
            raise _Skip("its gate would cost at least what halving it saves")
        heads = self.heads.issuperset(roots.tolist())
        branches = self._branches(node, roots)
        gains = tuple(dict.fromkeys(self._gain_node(branch, consumers, heads) for branch in branches))
        gain_at = self._gain_at(gains, roots, heads)
        unsafe, masks, silenced = self._masks(gains, roots, joined)
        name = self.boundaries.innermost(node)
        if name in known:
            name = f"{name}:{sum(k.partition(':')[0] == name for k in known)}"
        site = Site(
            name=name,
            kind="stream" if joined else "inner",
            channels=channels,
            in_channels=in_channels,
            producers=tuple(self._edge(u, m, 0) for u, m in self._uses(flow.producers, roots)),
            carriers=tuple(self._edge(u, m, 0) for u, m in carriers),
            consumers=tuple(self._edge(u, m, 1) for u, m in consumers),
            gate_at=Attach(gate_path, "input", channel_dim),
            gain_at=gain_at,
            masks=masks,
            macs=macs,
            share=macs / self.total if self.total else 0.0,
            norms=self._norms(roots),
            branches=tuple(dict.fromkeys(self._path(branch) for branch in branches)),
            silenced=silenced,
        )
        return SiteNodes(site, roots, node, gate_input, gains, unsafe)

    def _branches(self, producer: fx.Node, roots: np.ndarray) -> list[fx.Node]:
        """The first layers of the branches that are added up in the site; just the producer where none are."""
        found = {node for root in roots.tolist() for node in self.branches.get(root, ())}
        return sorted(found | {producer}, key=self.order.__getitem__)

    def _gate(self, producer: fx.Node) -> tuple[str, fx.Node, int]:
        """Module whose only input the gate looks at, that value and its channel dimension.

        The innermost module around the first producer; further out where windows or the like are folded into the
        batch, since the gate decides once for each sample.
        """
        for path in reversed(self.boundaries.paths(producer)):
            entering = self.boundaries.inputs(path) if path and self.boundaries.once(path) else []
            if len(entering) != 1 or not isinstance(entering[0].meta.get("val"), Tensor):
                continue
            (value,) = entering
            shape = self.flow.shape(value)
            if len(shape) < 2 or shape[0] != self.flow.batch:
                continue
            if self._reads(producer, value):
                return path, value, len(shape) - 1 if operators.op_name(producer.target) == "linear" else 1
            labels = self.flow.labelled(value)
            varying = (
                [] if labels is None else [d for d, s in enumerate(self.flow.units.varying(labels).shape) if s > 1]
            )
            if len(varying) == 1 and varying[0] > 0:
                return path, value, varying[0]
        raise _Skip("its input cannot be seen at the border of a module that runs once on one value")

    def _reads(self, producer: fx.Node, value: fx.Node) -> bool:
        """Whether the layer reads the value itself, or what padding and the like make of it: in the same dimension."""
        source: Any = producer.args[0]
        while source is not value and operators.op_name(source.target) in operators.KEEPS_CHANNELS:
            source = source.args[0]
        return source is value

    def _norms(self, roots: np.ndarray) -> tuple[NormAt, ...]:
        """The layer norms over the site's channels; they must be all of the norm's."""
        out = []
        for use, units in self._uses(self.flow.norms, roots):
            if (units < 0).any():
                raise _Skip("it shares the statistics of a norm with other channels")
            place = norm_at(self.flow, self.boundaries, use.node, lambda value: self._layout(value, roots))
            if isinstance(place, str):
                raise _Skip(place)
            out.append(place)
        return tuple(out)

    def _gain_node(self, producer: fx.Node, consumers: list[tuple[Use, np.ndarray]], heads: bool) -> fx.Node:
        """The norm's output where a norm alone reads the producer; attention's output; else the producer's."""
        if heads:
            values = {use.node.args[0] for use, _ in consumers}
            if len(values) != 1:
                raise _Skip("its attention heads are read by several layers")
            (value,) = values
            assert isinstance(value, fx.Node)
            return value
        users = _readers(producer)
        while len(users) == 1 and operators.op_name(users[0].target) in operators.MOVEMENT:
            users = _readers(users[0])
        if len(users) == 1 and operators.op_name(users[0].target) in NORMS:
            return past_movement(users[0], self.boundaries)
        return producer

    def _gain_at(self, gains: tuple[fx.Node, ...], roots: np.ndarray, heads: bool) -> tuple[Attach, ...]:
        """Where modules' borders let the gain be multiplied on all of those values."""
        found: dict[tuple[str, str], Attach] = {}
        for gain in gains:
            places = (self._at_readers(gain, roots) if heads else None) or self._attach(gain, roots)
            if places is None:
                raise _Skip("its output cannot be reached at the border of a module")
            found.update({(at.path, at.side): at for at in places})
        return tuple(found.values())

    def _at_readers(self, value: fx.Node, roots: np.ndarray) -> tuple[Attach, ...] | None:
        """The inputs of the layers that read ``value``, where nothing else does."""
        hooks = [self.boundaries.input_hook(user) for user in value.users]
        if not all(hook is not None and hook[1] is value for hook in hooks):
            return None
        layout = *self._layout(value, roots), fate(value)
        return tuple(Attach(path, "input", *layout) for path in dict.fromkeys(hook[0] for hook in hooks if hook))

    def _attach(self, value: fx.Node, roots: np.ndarray) -> tuple[Attach, ...] | None:
        places = self.boundaries.reach(value)
        if places is None:
            return None
        dim, units = self._layout(value, roots)
        return tuple(Attach(path, side, dim, units, fate(value)) for path, side in places)

    def _layout(self, value: fx.Node, roots: np.ndarray) -> tuple[int, Tensor | None]:
        """Channel dimension of a value and its channel → unit map (None: the identity)."""
        labels = self.flow.labelled(value)
        assert labels is not None
        small = self.flow.units.varying(labels)
        dims = [d for d, s in enumerate(small.shape) if s > 1]
        if len(dims) != 1:
            raise _Skip("its channels are spread over several dimensions of a tensor")
        if dims[0] == 0:
            raise _Skip("its channels are folded into the batch where a gate would have to touch them")
        units = self._units(small.reshape(-1), roots)
        return dims[0], None if identity_units(units, len(roots)) else torch.from_numpy(units)

    @cached_property
    def _held(self) -> tuple[np.ndarray, np.ndarray]:
        """Every pair of a representative and a node (its position in the graph) whose value holds its channels."""
        labels = [(i, self.flow.labelled(node)) for node, i in self.order.items()]
        held = [(i, distinct(self.flow.units.find(compress(x)))) for i, x in labels if x is not None]
        return np.concatenate([x for _, x in held]), np.repeat([i for i, _ in held], [len(x) for _, x in held])

    def _holding(self, roots: np.ndarray) -> set[fx.Node]:
        """The nodes whose values hold channels of these units."""
        held, at = self._held
        member = np.zeros(max(int(held.max()), int(roots.max())) + 2, dtype=bool)
        member[roots] = True
        holding = set(distinct(at[member[held]]).tolist())
        return {node for node, i in self.order.items() if i in holding}

    def _masks(self, gains: tuple[fx.Node, ...], roots: np.ndarray, joined: bool) -> tuple[frozenset, tuple, bool]:
        """Where suppressed channels must be silenced again, because something between has woken them.

        Returns:
            The nodes that read woken channels, the places, and whether these are all that read the site.
        """
        holding, zero = self._holding(roots), set(gains)
        first = min(self.order[gain] for gain in gains)
        reading = {u.node for u, _ in self._uses(self.flow.consumers, roots)}
        adding = {j.node for j in self.flow.joins} if joined else set()
        unsafe: dict[fx.Node, None] = {}
        masks: dict[tuple[str, str], Attach] = {}
        silenced = True
        for node in self.flow.graph_module.graph.nodes:
            if self.order[node] <= first or node.op != "call_function":
                continue
            inputs = [a for a in node.all_input_nodes if a in holding]
            for value in inputs if node in reading or node in adding else ():
                if value in zero:
                    silenced = False
                    continue
                unsafe[node] = None
                for place in self._silence(node, value, roots):
                    masks[place.path, place.side] = place
            if inputs and node in holding and operators.stays_zero(node, inputs, zero):
                zero.add(node)
        return frozenset(unsafe), tuple(masks.values()), silenced and bool(masks)

    def _gates_between(self, found: SiteNodes, sites: Iterable[SiteNodes]) -> bool:
        """Whether a gate looks at the site's channels before they are silenced."""
        holding, first = self._holding(found.roots), min(self.order[gain] for gain in found.gains)
        hooks = ((node, self.boundaries.input_hook(node)) for node in found.unsafe)
        masked = {hook[0] for node, hook in hooks if hook is not None and hook[1] in node.all_input_nodes}
        return any(other.gate_input in holding and self.order[other.gate_input] >= first
                   and other.site.gate_at.path not in masked for other in sites)  # fmt: skip

    def _silence(self, node: fx.Node, value: fx.Node, roots: np.ndarray) -> tuple[Attach, ...]:
        hook = self.boundaries.input_hook(node)
        if operators.op_name(value.target) == "relu" and len(value.users) == 1:
            # Ahead of it: a rectifier keeps what it gives for the backward pass, and the layer what it is given.
            before: Any = value.args[0]
            if len(before.users) == 1 and (found := self._attach(before, roots)) is not None:
                return found
        if hook is not None and hook[1] is value:
            return (Attach(hook[0], "input", *self._layout(value, roots)),)
        places = self._attach(value, roots)
        if places is None:
            raise _Skip("a layer that reads it cannot be reached at the border of a module")
        return places


def _readers(value: fx.Node) -> list[fx.Node]:
    """The operators that read a value's elements, not just its shape (``reshape_as`` and the like)."""
    return [u for u in value.users if not operators.op_name(u.target).endswith("_as") or u.args[0] is value]
