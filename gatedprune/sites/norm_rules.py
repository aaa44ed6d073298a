"""How norms carry channel labels (see `rules`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, fx

from .labels import Use

if TYPE_CHECKING:
    from .flow import Flow

__all__ = ["batch_norm", "group_norm", "layer_norm", "response_norm"]


def batch_norm(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    labels = flow.units.along(args[0], 1)
    flow.carry(node, labels)
    return flow.spread(labels, 1, flow.shape(node))


def group_norm(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Channels of a group share their statistics: whole groups are suppressed, and the others do not notice."""
    x, groups = args[0], args[1]
    if groups < 2:
        return _norm_over_site(flow, node, x, 1)
    labels = flow.units.along(x, 1).reshape(groups, -1)
    flow.units.union(np.broadcast_to(labels[:, :1], labels.shape), labels)
    labels = flow.units.find(labels.ravel())
    flow.carry(node, labels)
    return flow.spread(labels, 1, flow.shape(node))


def layer_norm(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Normalised over its last dimensions: what is normalised together within a head or a group goes together."""
    x, shape = args[0], args[1]
    if flow.units.settle(x, tuple(range(x.dim() - len(shape), x.dim()))):
        return x
    if len(shape) == 1 and flow.units.varying(x).shape[-1] == x.shape[-1]:
        return _norm_over_site(flow, node, x, -1)
    return NotImplemented


def _norm_over_site(flow: Flow, node: fx.Node, x: Tensor, dim: int) -> Tensor:
    """One set of statistics over all channels: of those that are active, if they all belong to one site."""
    labels = flow.units.along(x, dim)
    flow.carry(node, labels)
    flow.norms.append(Use(node, labels))
    return flow.spread(labels, dim % x.dim(), flow.shape(node))


def response_norm(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """Each channel's size over places, divided by the mean size over all channels: of those that are active."""
    x, dim = args[0], args[4]
    if flow.units.varying(x).shape[dim] != x.shape[dim]:
        return NotImplemented
    return _norm_over_site(flow, node, x, dim)
