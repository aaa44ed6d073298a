"""Layers of a lowered graph take in what follows: layer scale, residual addition, activation, the next gate's sums.

Each of these would read and write a whole feature map for a few operations per value.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..sites import operators
from . import narrow, selection
from .operands import argument

__all__ = ["fuse", "is_view"]

_aten = torch.ops.aten
# Their results are memory of their own.
_FRESH = (narrow.NarrowConv2d, selection.Selector, narrow.MaxPool2d, narrow.UpsampleBilinear2d)
# They compute the mean of |y| over the pixels beside y.
_WITH_MEANS = (narrow.NarrowConv2d, narrow.NarrowAffine)
_VIEWS = frozenset(["reshape", "view", "unsqueeze", "squeeze"])
_POINTWISE = frozenset(["gelu", "relu", "silu", "hardswish", "hardtanh", "relu6", "leaky_relu", "elu", "mish"]
                       + ["sigmoid", "tanh", "softplus", "hardsigmoid", "square", "dropout", "quick_gelu"])  # fmt: skip


def fuse(root: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, tuple], native: bool) -> None:
    """Fuse in place.

    Args:
        root: Holds the modules that the graph calls.
        shapes: Value → what it holds; two values with equal entries have the same shape and channels.
        native: The native backend computes global pooling that no layer does.
    """
    for node in list(graph.nodes):
        if operators.op_name(node.target) in ("dropout", "feature_dropout", "alpha_dropout") and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        layer = _module(root, node)
        if isinstance(layer, narrow.NarrowLinear):
            _scale(root, graph, node, shapes)
        if isinstance(layer, (narrow.NarrowConv2d, narrow.NarrowLinear)):
            node = _residual(root, graph, node, shapes)
        if isinstance(layer, (narrow.NarrowConv2d, narrow.NarrowLinear, narrow.NarrowAffine)):
            _activation(graph, node, layer)
    for node in list(graph.nodes):
        if isinstance(_module(root, node), selection.Selector):
            _subsample(root, graph, node)
        elif isinstance(_module(root, node), narrow.NarrowLinear):
            _columns(root, node)
        elif node.op == "call_function":
            _pool(root, graph, node, shapes, native)
            _in_place(root, node, shapes)


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _activation(graph: fx.Graph, node: fx.Node, layer: Any) -> None:
    user = _only_user(node)
    name = None if user is None else _activation_name(user)
    if user is None or name is None or user.args[0] is not node:
        return
    layer.activation = name
    user.replace_all_uses_with(node)
    graph.erase_node(user)


def _activation_name(node: fx.Node) -> str | None:
    name = operators.op_name(node.target)
    if node.kwargs:
        return None
    if name == "hardtanh":
        return "relu6" if [float(a) for a in node.args[1:3]] == [0.0, 6.0] else None  # type: ignore[arg-type]
    return name if name in narrow.ACTIVATIONS and len(node.args) == 1 else None


def _turned(node: fx.Node) -> fx.Node | None:
    """The permutation through which alone the value is read."""
    user = _only_user(node)
    return user if user is not None and user.target is _aten.permute.default else None


def _other(user: fx.Node | None, name: str, value: fx.Node) -> fx.Node | None:
    """What else the operator of that name reads beside the value."""
    if user is None or operators.op_name(user.target) != name or user.kwargs or len(user.args) != 2:
        return None
    others = [a for a in user.args if a is not value]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _scale(root: nn.Module, graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, tuple]) -> None:
    """layer(x) · γ, a constant for each channel: the layer multiplies by it. Channels may have moved in between."""
    layer: Any = _module(root, node)
    value = _turned(node) or node
    mul = _only_user(value)
    other = _other(mul, "mul", value)
    if mul is None or other is None or value not in shapes or not layer.native or node.args[2:4] != (None, None):
        return
    factors, dims, count = _constant(root, other), len(shapes[value][0]), len(layer.weight)
    order: Any = range(dims) if value is node else value.args[1]
    place = [d % dims for d in order].index(dims - 1) - dims  # of the channels, from the end
    if factors is None or not -place <= factors.dim() <= dims or not factors.numel() == factors.shape[place] == count:
        return
    layer.scale = factors.reshape(1, count)
    mul.replace_all_uses_with(value)
    graph.erase_node(mul)


def _constant(root: nn.Module, node: fx.Node) -> Tensor | None:
    """What a constant of the graph, or a view of one, holds."""
    if node.op == "get_attr":
        held = getattr(root, str(node.target))
        return held if isinstance(held, Tensor) else None
    if not is_view(node) or node.all_input_nodes != [node.args[0]] or node.kwargs:
        return None
    base, target = _constant(root, node.all_input_nodes[0]), node.target
    return None if base is None else target(base, *node.args[1:])  # type: ignore[operator]


def is_view(node: fx.Node) -> bool:
    """Whether the value is another one in another shape, and nothing else."""
    return node.op == "call_function" and operators.op_name(node.target) in _VIEWS


def _residual(root: nn.Module, graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, tuple]) -> fx.Node:
    """layer(x) + other → layer(x, residual=other), where the sum stands; returns the layer's node.

    The layer's result may have been turned in between: then the other is turned back for the layer, and the sum forth.
    """
    turned = _turned(node) if isinstance(_module(root, node), narrow.NarrowLinear) else None
    value = turned or node
    add = _only_user(value)
    other = _other(add, "add", value)
    if add is None or other is None or add.args[0] is not value and _mutates(root, add):
        return node
    if value not in shapes or shapes.get(other) != shapes[value]:
        return node
    # The layer moves down to the sum: nothing on the way may overwrite what it reads.
    between = node.next
    while between is not add:
        if _mutates(root, between):
            return node
        between = between.next
    with graph.inserting_before(add):
        first = other
        if turned is not None:
            order: Any = turned.args[1]
            first = graph.call_function(_aten.permute.default, (other, [order.index(d) for d in range(len(order))]))
        new = graph.create_node("call_module", node.target, (*node.args, *[None] * (4 - len(node.args)), first), {})
        total = new if turned is None else graph.call_function(_aten.permute.default, (new, turned.args[1]))
    add.replace_all_uses_with(total)
    for gone in (add, turned, node):
        if gone is not None:
            graph.erase_node(gone)
    shapes[total] = shapes[other]
    layer = _module(root, new)
    if isinstance(layer, narrow.NarrowConv2d):
        layer.inplace = _done_with(root, other, new)
    return new


def _done_with(root: nn.Module, value: fx.Node, reader: fx.Node) -> bool:
    """Whether a layer of ours made the value, for this graph alone, and ``reader`` is the last to read it."""
    if not isinstance(_module(root, _written_by(value)), narrow.NarrowConv2d):
        return False
    seen, node = set(), reader.next
    while node.op != "root":
        seen.add(node)
        node = node.next
    return not any(user in seen or _aliases(root, user) for user in value.users if user is not reader)


def _aliases(root: nn.Module, node: fx.Node) -> bool:
    """Whether the node's result may be its argument's memory: anything but our layers and gates."""
    return node.target is not narrow.global_pool and not isinstance(_module(root, node), _FRESH)


def _in_place(root: nn.Module, node: fx.Node, shapes: dict[fx.Node, tuple]) -> None:
    """A product, as squeeze-excite has it, takes the place of the map that a layer of ours made for it."""
    if node.target is not _aten.mul.Tensor or node.kwargs or node not in shapes:
        return
    value, factor = node.args
    if not isinstance(value, fx.Node) or value is factor or shapes.get(_written_by(value)) != shapes[node]:
        return
    if _done_with(root, value, node):
        node.target = _aten.mul_.Tensor


def _columns(root: nn.Module, node: fx.Node) -> None:
    """Between two linear layers with nothing but operators on single values, channels come before tokens."""
    first, last = _module(root, node), node
    user = next(iter(node.users)) if len(node.users) == 1 else None
    while user is not None and user.op == "call_function" and operators.op_name(user.target) in _POINTWISE:
        if user.args[0] is not last or len(user.all_input_nodes) != 1:
            return
        last, user = user, next(iter(user.users)) if len(user.users) == 1 else None
    second = None if user is None else _module(root, user)
    if not isinstance(first, narrow.NarrowLinear) or not isinstance(second, narrow.NarrowLinear):
        return
    assert user is not None
    turned = len(node.args) > 4 and node.args[4] is not None  # a residual would have to be turned, too
    if user.args[0] is last and last not in user.args[1:] and first.native and second.native and not turned:
        first.y_columns = second.x_columns = True


def _mutates(root: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(_module(root, node), narrow.AddInto)
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _subsample(root: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """The layer that writes a gate's input computes s(x) while it has the values in registers."""
    source, selector = node.args[0], _module(root, node)
    assert isinstance(source, fx.Node) and isinstance(selector, selection.Selector)
    if selector.gate.channel_dim != 1 or selector.gate.signed:  # layers compute the mean of the absolute value only
        return
    s = _means(root, graph, source, node)
    if s is not None:
        node.args = (s, *node.args[1:])
        selector.subsampled = True


def _pool(root: nn.Module, graph: fx.Graph, node: fx.Node, shapes: dict[fx.Node, tuple], native: bool) -> None:
    """Global average pooling of what cannot be negative is s(x) too. PyTorch's own takes several operators."""
    if not _is_global_pool(node) or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    layer = _module(root, _written_by(source))
    if isinstance(layer, narrow.NarrowConv2d) and layer.activation in ("relu", "relu6"):
        s = _means(root, graph, source, node)
        assert s is not None
    elif native and source in shapes and len(shapes[source][0]) == 4:
        with graph.inserting_before(node):
            s = graph.call_function(narrow.global_pool, (source,))
    else:
        return
    if operators.op_name(node.target) != "mean" or argument(node, 2, "keepdim"):
        with graph.inserting_before(node):
            s = graph.call_function(_aten.unflatten.int, (s, 1, [-1, 1, 1]))
    node.replace_all_uses_with(s)
    graph.erase_node(node)


def _is_global_pool(node: fx.Node) -> bool:
    """Whether it is the mean over the height and width of (B, C, H, W)."""
    name, over = operators.op_name(node.target), argument(node, 1, "dim")
    if name == "adaptive_avg_pool2d":
        return list(node.args[1]) in ([1], [1, 1])  # type: ignore[arg-type]
    if name != "mean" or not isinstance(over, list | tuple) or argument(node, 3, "dtype") is not None:
        return False
    return all(isinstance(d, int) for d in over) and {d % 4 for d in over} == {2, 3}


def _written_by(value: fx.Node) -> fx.Node:
    """The layer: its first result may have been taken out already."""
    source = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else value
    assert isinstance(source, fx.Node)
    return source


def _means(root: nn.Module, graph: fx.Graph, value: fx.Node, reader: fx.Node) -> fx.Node | None:
    """s of a value, (B, C), from the layer that writes it; None where no such layer does."""
    source = _written_by(value)
    layer = _module(root, source)
    if not isinstance(layer, _WITH_MEANS):
        return None
    if not layer.subsample:
        layer.subsample = True
        with graph.inserting_after(source):
            y = graph.call_function(operator.getitem, (source, 0))
        source.replace_all_uses_with(y, delete_user_cb=lambda user: user is not y)
        y.args = (source, 0)
    with graph.inserting_before(reader):
        return graph.call_function(operator.getitem, (source, 1))
