"""How attention and its parts run on narrow tensors (see `handlers`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from . import narrow
from .layout import Layout
from .operands import argument, same, without_channels

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["attention", "einsum", "matmul"]


def attention(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """Scaled dot-product attention over the active heads."""
    layout = low.layouts.of(node)
    states: list[Any] = [low.state.get(a) for a in node.args[:3]]  # type: ignore[arg-type]
    if layout is None:
        return None
    rank = len(low.flow.shape(node))
    if (
        states[:2] == [None, None]
        and isinstance(states[2], Layout)
        and states[2].key == layout.key
        and layout.dim == rank - 1
    ):
        low.state[node] = layout  # one head: only its values are narrow
        return low.graph.node_copy(node, low.env.__getitem__)
    if not all(isinstance(s, Layout) and s.key == layout.key and s.dim == layout.dim for s in states):
        return None
    mask = argument(node, 3, "attn_mask")
    values = {a: low.env[a] for a in node.all_input_nodes}
    if isinstance(mask, fx.Node) and not without_channels(low, mask, layout.dim, rank):
        if not low.constants.unlabelled(mask) or not layout.dim:
            return None
        values[mask] = low.module(
            "take", narrow.Take(layout.dim, rank), (low.env[mask], low.index(layout), low.env[held[0]])
        )
    low.state[node] = layout
    return low.graph.node_copy(node, values.__getitem__)


def matmul(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """A product over active heads: both factors hold the same ones along a leading dimension."""
    layout, rank = low.layouts.of(node), len(low.flow.shape(node))
    if layout is None:
        return None
    factors: Any = node.args[:2]
    left, right = (low.state.get(a) for a in factors)
    constant = next((a for a in factors if low.constants.unlabelled(a)), None)
    if constant is not None:  # scores of positions, say: the same for every channel
        after = same(low, node, held[0])
        if after is None or not without_channels(low, constant, after.dim, rank):
            return None
        low.state[node] = after
        return low.graph.node_copy(node, low.env.__getitem__)
    if layout.dim >= rank - 2:  # no heads: the channels of one factor pass through
        one, other = (right, left) if layout.dim == rank - 1 else (left, right)
        if other is not None or not isinstance(one, Layout) or one.key != layout.key:
            return None
        low.state[node] = layout
        return low.graph.node_copy(node, low.env.__getitem__)
    for operand in node.args[:2]:
        state = low.state.get(operand)  # type: ignore[arg-type]
        shift = rank - len(low.flow.shape(operand))  # type: ignore[arg-type]
        if not isinstance(state, Layout) or state.key != layout.key or state.dim + shift != layout.dim:
            return None
    low.state[node] = layout
    return low.graph.node_copy(node, low.env.__getitem__)


def einsum(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """A sum of products that leaves the channels apart: they bear one letter in all operands that have them."""
    layout, (terms, _, out) = low.layouts.of(node), str(node.args[0]).replace(" ", "").partition("->")
    operands: Any = node.args[1]
    if layout is None:
        return None
    letter = out[layout.dim]
    for term, operand in zip(terms.split(","), operands, strict=True):
        state = low.state.get(operand)
        if state is None and letter not in term:
            continue
        if not isinstance(state, Layout) or state.key != layout.key or term[state.dim] != letter:
            return None
    low.state[node] = layout
    return low.graph.node_copy(node, low.env.__getitem__)
