"""What each layer costs, and which part of it each site narrows: read off the flow, no model is run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
from torch import fx

from .flow import Flow
from .labels import Use
from .operators import op_name
from .site import Layer

__all__ = ["layer_costs"]


def layer_costs(flow: Flow, roots: Mapping[str, np.ndarray], path: Callable[[fx.Node], str]) -> tuple[Layer, ...]:
    """Every operator that multiplies and accumulates, in the order of execution.

    Args:
        flow: What flows through the captured graph.
        roots: Site name → representatives of its units.
        path: The module that an operator belongs to.
    """
    names = list(roots)
    every = np.concatenate([roots[n] for n in names]) if names else np.zeros(0, dtype=np.int64)
    owner = np.repeat(np.arange(len(names)), [len(roots[n]) for n in names])
    order = np.argsort(every)
    every, owner = every[order], owner[order]

    def shares(use: Use) -> dict[str, float]:
        found = flow.units.find(use.labels)
        if not every.size or not found.size:
            return {}
        at = np.searchsorted(every, found).clip(max=every.size - 1)
        counts = np.bincount(owner[at[every[at] == found]], minlength=len(names))
        return {names[i]: float(counts[i] / found.size) for i in np.flatnonzero(counts)}

    written: dict[fx.Node, dict[str, float]] = defaultdict(dict)
    read: dict[fx.Node, dict[str, float]] = defaultdict(dict)
    for side, uses in (
        (written, (flow.producers, flow.carriers, flow.mixers, flow.through)),
        (read, (flow.consumers,)),
    ):
        for use in (u for group in uses for u in group if u.node in flow.macs):
            side[use.node].update(shares(use))
    return tuple(
        Layer(path(node), op_name(node.target), macs, written[node], read[node]) for node, macs in flow.macs.items()
    )
