"""Norms over the channels of a site: where they can be computed over the active channels only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, fx

from .boundary import Boundaries
from .flow import Flow
from .operators import MOVEMENT, op_name
from .site import Attach, NormAt

__all__ = ["NORMS", "norm_at", "norm_options", "past_movement"]

NORMS = frozenset(["batch_norm", "group_norm", "layer_norm", "rms_norm"])

LayoutOf = Callable[[fx.Node], "tuple[int, Tensor | None]"]


def norm_options(node: fx.Node) -> tuple[Any, Any, float, str]:
    """(weight, bias, eps, kind) of a layer, RMS, group or response norm node (see `NormAt`)."""
    name = op_name(node.target)
    if name == "response_norm":
        given: Any = node.args[1:4]
        return *given, "response"
    values: list[Any] = [*node.args[2:], *[None] * 3]
    if name == "rms_norm":
        weight, bias, eps = values[0], None, values[1]
    else:
        weight, bias, eps = values[:3]
    if eps is None:
        # An RMS norm without ε takes the data type's.
        eps = np.finfo(np.float32).eps if name == "rms_norm" else 1e-5
    return weight, bias, float(eps), name.removesuffix("_norm")


def past_movement(value: fx.Node, boundaries: Boundaries) -> fx.Node:
    """The value itself, or, where only a permutation inside its module reads it, that one's result."""
    while boundaries.reach(value) is None and len(value.users) == 1:
        (user,) = value.users
        if op_name(user.target) not in MOVEMENT:
            break
        value = user
    return value


def norm_at(flow: Flow, boundaries: Boundaries, node: fx.Node, layout: LayoutOf) -> NormAt | str:
    """Where the norm's input is seen and its output replaced; or why that cannot be done."""
    hook = boundaries.input_hook(node)
    out = past_movement(node, boundaries)
    places = boundaries.reach(out)
    if hook is None or places is None:
        return "it passes through a norm that cannot be reached at the border of a module"
    path, source = hook
    if flow.shape(source) != flow.shape(out) or flow.labelled(source) is None:
        return "it passes through a norm whose module re-arranges its channels"
    (dim, units), (out_dim, _) = layout(source), layout(out)
    weight, bias, eps, kind = norm_options(node)
    parameters = [p for p in (weight, bias) if isinstance(p, fx.Node)]
    if dim != out_dim or any(p.op != "get_attr" for p in parameters):
        return "it passes through a norm whose parameters are computed"
    names = [None if p is None else str(p.target) for p in (weight, bias)]
    outputs = tuple(Attach(p, side, dim, units) for p, side in places)
    return NormAt(Attach(path, "input", dim, units), outputs, names[0], names[1], eps, kind)
