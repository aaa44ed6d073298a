"""Which additions are of branches side by side, so that their channels form a site, and which are residual."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from .flow import Flow, trace_flow
from .labels import WILD, compress
from .operators import MOVEMENT, op_name

__all__ = ["branches_of", "merges", "trace"]


def trace(graph_module: fx.GraphModule) -> Flow:
    """`trace_flow`, with the channels united that additions of branches side by side tie together (see `merges`).

    Where what is united turns out to be pinned, its additions are joins again: then a stream may still be gated.
    """
    flow = trace_flow(graph_module)
    groups = merges(flow)
    while groups:
        flow = trace_flow(graph_module, frozenset(node for group in groups for node in group))
        pinned = flow.units.pinned()
        stuck = {m.node for m in flow.merged if not pinned.keys().isdisjoint(flow.units.find(m.labels).tolist())}
        free = [group for group in groups if stuck.isdisjoint(group)]
        if len(free) == len(groups):
            break
        groups = free
        if not groups:
            flow = trace_flow(graph_module)
    return flow


def merges(flow: Flow) -> list[set[fx.Node]]:
    """The additions of `flow` that merge branches, in groups that share channels.

    An addition is *residual*, x + f(x), where one operand is computed from the other, or from what has been added up
    in it. Where none of the additions that a channel goes through is, they *merge* branches that lie side by side: the
    sum has no channel that could be carried past a layer, and all that write it can be narrowed alike.
    """
    if not flow.joins:
        return []
    strands = _Strands(flow)
    together = _Groups(len(strands.reads))
    for left, right, out in strands.sides:
        together.unite([*left, *right, *out])
    groups: dict[int, set[fx.Node]] = defaultdict(set)
    residual: set[int] = set()
    for join, (left, right, _) in zip(flow.joins, strands.sides, strict=True):
        group = together.find(left[0]) if left else -1
        groups[group].add(join.node)
        adds = left and right and op_name(join.node.target) in ("add", "sub", "rsub")
        if not adds or strands.computed_from(left, right) or strands.computed_from(right, left):
            residual.add(group)
    return [nodes for group, nodes in groups.items() if group not in residual]


def branches_of(flow: Flow) -> dict[int, list[fx.Node]]:
    """Representative of a unit → the first layers of the branches that are added up in it, in order of execution."""
    owner: dict[int, int] = {}
    for i, use in enumerate(flow.producers):
        for label in use.labels.tolist():
            owner.setdefault(label, i)
    found: dict[int, set[int]] = defaultdict(set)
    for merge in flow.merged:
        labels = merge.labels  # representatives before they were united: the first layer's label is the smallest
        for label, root in zip(labels.tolist(), flow.units.find(labels).tolist(), strict=True):
            found[root].add(owner[label])
    return {root: [flow.producers[i].node for i in sorted(numbers)] for root, numbers in found.items()}


class _Strands:
    """Units that the same layers write and that go through the same additions, as one: a *strand*.

    Sets of strands are bits of a number. ``sides``: of each join the strands of its operands and of its sum. ``reads``:
    of each strand what the layers that write it are computed from. ``closure``: it, and what has been added up in it.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        known: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for i, join in enumerate(flow.joins):
            for side, labels in enumerate((join.left, join.right, join.out)):
                for root in np.unique(flow.units.find(labels)).tolist():
                    known[root].append((i, side))
        for i, use in enumerate(flow.producers):
            for root in np.unique(flow.units.find(use.labels)).tolist():
                known[root].append((i, -1))
        known.pop(WILD, None)
        numbers: dict[tuple, int] = {(): 0}  # 0: what an operator without a rule gives, and the model's inputs
        self._of = np.zeros(max(known, default=0) + 1, dtype=np.int64)
        self._of[list(known)] = [numbers.setdefault(tuple(where), len(numbers)) for where in known.values()]
        self.sides = [tuple(self._in(labels) for labels in (j.left, j.right, j.out)) for j in flow.joins]
        self.reads = self._reads(len(numbers))
        self.closure = [1 << s for s in range(len(numbers))]
        for left, right, out in self.sides:
            parts = _union(self.closure[s] for s in (*left, *right))
            for s in out:
                self.closure[s] |= parts

    def _in(self, labels: Tensor | np.ndarray) -> list[int]:
        roots = np.unique(self.flow.units.find(labels))
        roots = roots[roots != WILD]
        return np.unique(np.where(roots < len(self._of), self._of[roots.clip(max=len(self._of) - 1)], 0)).tolist()

    def _reads(self, count: int) -> list[int]:
        """Every operator depends on all that its inputs depend on; but of a split, each part on its own only."""
        writers = {use.node: self._in(use.labels) for use in self.flow.producers}
        written = {s for strands in writers.values() for s in strands}
        reads, origin, depends = [0] * count, [0] * count, dict[fx.Node, int]()
        for node in self.flow.graph_module.graph.nodes:
            above = _union(depends[a] for a in node.all_input_nodes)
            values = [v for v in tree_flatten(self.flow.values.get(node))[0] if isinstance(v, Tensor)]
            held = sorted({s for labels in values for s in self._in(compress(labels))})
            for s in writers.get(node, ()):
                reads[s] |= above
                origin[s] |= above
            name = op_name(node.target)
            if name in MOVEMENT or name == "getitem":
                above = _union(origin[s] for s in held)
            for s in set(held) - written:  # sums, and what no layer writes
                origin[s] |= above
            depends[node] = above | _union(1 << s for s in held)
        return reads

    def computed_from(self, one: list[int], other: list[int]) -> bool:
        """Whether a layer that writes ``one``, or part of that sum, reads what comes from ``other``'s channels."""
        own = _union(self.closure[s] for s in one)
        sources = _union(self.reads[s] for s in range(len(self.reads)) if own >> s & 1)
        return bool(sources & _union(self.closure[s] for s in other))


class _Groups:
    """Union-find over a few hundred numbers."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, x: int) -> int:
        while self.parent[x] != x:
            x = self.parent[x]
        return x

    def unite(self, numbers: list[int]) -> None:
        for x in numbers[1:]:
            self.parent[self.find(x)] = self.find(numbers[0])


def _union(sets: Iterable[int]) -> int:
    out = 0
    for one in sets:
        out |= one
    return out
