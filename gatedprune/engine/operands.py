"""What handlers ask of an operator's operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .layout import Layout

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["argument", "same", "scalar", "without_channels"]


def argument(node: fx.Node, at: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by its place or by its name, or be left out."""
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)


def same(low: Lowering, node: fx.Node, source: fx.Node) -> Layout | None:
    """The layout of ``node`` if it holds the channels of ``source``, in the same order, along some dimension."""
    before, after = low.state[source], low.layouts.of(node)
    return after if isinstance(before, Layout) and after is not None and before.key == after.key else None


def scalar(low: Lowering, node: fx.Node) -> bool:
    """A size or another value without channels."""
    if low.flow.labelled(node) is not None:
        return False
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or (low.constants.holds(node) and low.constants.value(node).numel() == 1)


def without_channels(low: Lowering, operand: fx.Node, dim: int, rank: int) -> bool:
    """Whether an operand has length 1 along the channels of the result, so that it broadcasts over narrow ones too."""
    value = operand.meta.get("val")
    shape = value.shape if isinstance(value, Tensor) else low.constants.value(operand).shape
    at = dim - (rank - len(shape))
    return at < 0 or shape[at] == 1
