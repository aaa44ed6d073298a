"""Which operators run on narrow tensors, and how.

One function for each kind of operator; where it returns None the value is widened and the operator runs as captured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..sites import norm_options, operators
from . import attention_handlers, narrow, narrow_norms
from .layout import Layout
from .operands import argument, same, scalar, without_channels

if TYPE_CHECKING:
    from .lowering import Lowering

__all__ = ["RESAMPLING", "handler_of", "resampling"]

# Of each channel by itself; the native backend has its own.
RESAMPLING = ("max_pool2d", "upsample_bilinear2d")

Handler = Callable[["Lowering", fx.Node, list[fx.Node]], "fx.Node | None"]

_aten = torch.ops.aten
_INPLACE = {"relu": _aten.relu_.default, "silu": _aten.silu_.default, "hardswish": _aten.hardswish_.default}
# Their arguments name sizes: the narrow dimension's is replaced.
_SIZED = frozenset(["view", "reshape", "_unsafe_view", "expand", "unflatten"])
_SPLITTING = frozenset(["split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split"])
# Beside the movements: the result may be the argument itself.
_SAME_MEMORY = frozenset(["getitem", "dropout", "feature_dropout", "contiguous", "to", "alias", "detach", "type_as"])
# Their arguments name dimensions only.
_UNSIZED = frozenset(
    ["flatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "swapdims"]
    + ["select", "unbind", "slice", "roll", "flip", "unfold"]
)


def handler_of(name: str) -> Handler | None:
    """The handler of an operator, by its name without overload and trailing underscore."""
    if name in _TABLE:
        return _TABLE[name]
    if name in operators.ELEMENTWISE | operators.SPATIAL | operators.REDUCTION | operators.OVER_DIM:
        return _pointwise
    if name in operators.BINARY:
        return _binary
    return None


def _norm(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """A batch norm in eval mode that could not be folded."""
    affine, layout = low.constants.affine(node), low.state[held[0]]
    if affine is None or held != [node.args[0]]:
        return None
    dtype = node.meta["val"].dtype
    module = narrow.NarrowAffine(affine[0].to(dtype), affine[1].to(dtype), native=low.native)
    low.state[node] = layout
    return low.module(low.name(node), module, (low.env[held[0]], low.index(layout)))


def _group_norm(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """Whole groups are active or not, so that each one's statistics are what they were."""
    layout = same(low, node, held[0])
    rest: list[Any] = [*node.args[1:], *[None] * 4]
    groups, weight, bias, eps = rest[:4]
    eps = 1e-5 if eps is None else eps
    if layout is None or held != [node.args[0]] or not (low.constants.holds(weight) and low.constants.holds(bias)):
        return None
    affine = [None if v is None else low.constants.value(v).clone() for v in (weight, bias)]
    module = narrow_norms.NarrowGroupNorm(layout.channels // groups, affine[0], affine[1], eps)
    low.state[node] = layout
    return low.module(low.name(node), module, (low.env[held[0]], low.index(layout)))


def _pointwise(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """An operator that treats every channel alike, so that it runs on a narrow tensor unchanged."""
    x = node.args[0]
    if held != [x] or not all(scalar(low, a) for a in node.all_input_nodes if a is not x):
        return None
    after = same(low, node, held[0])
    if after is None or not _keeps_dims(node, low.state[held[0]], len(low.flow.shape(held[0]))):
        return None
    low.state[node] = after
    target = _INPLACE.get(operators.op_name(node.target)) if _fresh(low, held[0]) else None
    if target is not None:
        return low.graph.call_function(target, (low.env[held[0]],))
    return low.graph.node_copy(node, low.env.__getitem__)


def resampling(low: Lowering, node: fx.Node) -> nn.Module | None:
    """A max pooling or bilinear interpolation as a module of the native backend; None where it has no such."""
    if not low.native or node.kwargs or len(low.flow.shape(node)) != 4:
        return None
    if operators.op_name(node.target) == "max_pool2d":
        kernel, stride, padding, dilation, ceil = (*node.args[1:], *[None] * 5)[:5]
        if set(dilation or [1]) != {1}:  # type: ignore[arg-type]
            return None
        return narrow.MaxPool2d(_pair(kernel, 1), _pair(stride or kernel, 1), _pair(padding, 0), bool(ceil))
    arguments: tuple[Any, ...] = node.args[1:]
    if node.target is not _aten.upsample_bilinear2d.vec or len(node.all_input_nodes) > 1:
        return None
    factors = None if arguments[2] is None else [float(f) for f in arguments[2]]
    return narrow.UpsampleBilinear2d(list(low.flow.shape(node)[2:]), bool(arguments[1]), factors)


def _resampling(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    module = resampling(low, node)
    if module is None:
        return _pointwise(low, node, held)
    after = same(low, node, held[0])
    if after is None:
        return None
    low.state[node] = after
    return low.module(low.name(node), module, (low.env[held[0]],))


def _pair(value: Any, default: int) -> list[int]:
    value = list(value) if isinstance(value, (list, tuple)) else [default if value is None else value]
    return value * 2 if len(value) == 1 else (value or [default] * 2)


def _keeps_dims(node: fx.Node, layout: Layout, rank: int) -> bool:
    """Whether a softmax or the like does not run over the channels."""
    if operators.op_name(node.target) not in operators.OVER_DIM:
        return True
    dim = argument(node, 1, "dim", -1)
    return isinstance(dim, int) and dim % rank != layout.dim


def _layer_norm(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """A norm over the active channels; or inside each head, where it does not see which heads there are."""
    layout = same(low, node, held[0])
    if layout is not None and held == [node.args[0]] and layout.dim == len(low.flow.shape(node)) - 1:
        weight, bias, eps, kind = norm_options(node)
        if len(node.args[1]) > 1 or not (low.constants.holds(weight) and low.constants.holds(bias)):  # type: ignore[arg-type]
            return None
        affine = [None if v is None else low.constants.value(v).clone() for v in (weight, bias)]
        module = narrow_norms.NarrowLayerNorm(affine[0], affine[1], eps, kind != "rms")
        low.state[node] = layout
        return low.module(low.name(node), module, (low.env[held[0]], low.index(layout)))
    if layout is None or held != [node.args[0]] or layout.dim >= len(low.flow.shape(node)) - len(node.args[1]):  # type: ignore[arg-type]
        return None
    low.state[node] = layout
    return low.graph.node_copy(node, low.env.__getitem__)


def _response_norm(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """A global response norm over the active channels."""
    layout = same(low, node, held[0])
    weight, bias, eps, _ = norm_options(node)
    if layout is None or held != [node.args[0]] or not (low.constants.holds(weight) and low.constants.holds(bias)):
        return None
    affine = [None if v is None else low.constants.value(v).clone() for v in (weight, bias)]
    module = narrow_norms.NarrowResponseNorm(affine[0], affine[1], eps, layout.dim)
    low.state[node] = layout
    return low.module(low.name(node), module, (low.env[held[0]], low.index(layout)))


def _fresh(low: Lowering, node: fx.Node) -> bool:
    """Whether the lowered value was just made by a layer and has this one reader: then it may be overwritten."""
    value = low.env[node]
    if len(node.users) > 1 or value.op != "call_module":
        return False
    return isinstance(
        low.root.get_submodule(str(value.target)), (narrow.NarrowConv2d, narrow.NarrowLinear, narrow.NarrowAffine)
    )


def _binary(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    if any(join.node is node for join in low.flow.joins):
        return _join(low, node)
    layout = same(low, node, held[0])
    if layout is None or node.kwargs:
        return None
    shape = low.flow.shape(node)
    values: dict[fx.Node, fx.Node] = {}
    for operand in node.all_input_nodes:
        own = low.state.get(operand)
        if isinstance(own, Layout):
            if own.key != layout.key or own.dim + len(shape) - len(low.flow.shape(operand)) != layout.dim:
                return None
            values[operand] = low.env[operand]
        elif scalar(low, operand) or without_channels(low, operand, layout.dim, len(shape)):
            values[operand] = low.env[operand]
        elif layout.dim and (low.constants.unlabelled(operand) or _could_be(low, operand, layout, len(shape))):
            module = narrow.Take(layout.dim, len(shape))
            values[operand] = low.module("take", module, (low.env[operand], low.index(layout), low.env[held[0]]))
        else:
            return None
    low.state[node] = layout
    return low.graph.node_copy(node, values.__getitem__)


def _could_be(low: Lowering, operand: fx.Node, layout: Layout, rank: int) -> bool:
    """Whether a full operand has the channels of the layout, so that its active ones can be taken."""
    other = low.layouts.of(operand)
    return (
        other is not None and other.key == layout.key and other.dim + rank - len(low.flow.shape(operand)) == layout.dim
    )


def _join(low: Lowering, node: fx.Node) -> fx.Node | None:
    """A residual addition: the narrow branch is added to its channels of the stream, in place where nobody minds."""
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    held = [a for a in operands if low.state.get(a) is not None]
    if operators.op_name(node.target) != "add" or node.kwargs or len(node.args) != 2 or len(operands) != 2:
        return None
    branch = held[0]
    stream = operands[1] if branch is operands[0] else operands[0]
    layout = low.state[branch]
    if {low.flow.shape(branch), low.flow.shape(stream)} != {low.flow.shape(node)} or low.wakened(node):
        return None
    if not layout.dim:
        return None
    if branch in node.all_input_nodes and low.constants.unlabelled(stream):
        return None
    full = low.full(stream)
    inplace = full is not low.env[stream] or _last_use(low, stream, node)
    low.state[node] = None
    module = narrow.AddInto(layout.dim, inplace)
    return low.module(low.name(node, "add"), module, (full, low.env[branch], low.index(layout)))


def _last_use(low: Lowering, value: fx.Node, user: fx.Node) -> bool:
    """Whether nothing after ``user`` reads the memory of ``value``, and the memory is the graph's own."""
    group, todo = {value}, [value]
    while todo:
        node = todo.pop()
        if node.op != "call_function" or operators.op_name(node.target) in ("expand", "expand_as", "broadcast_to"):
            return False
        related = [a for a in node.all_input_nodes if _aliases(node, a)] + [u for u in node.users if _aliases(u, node)]
        for other in related:
            if other not in group and other is not user:
                group.add(other)
                todo.append(other)
    return all(low.order[u] <= low.order[user] for n in group for u in n.users)


def _aliases(node: fx.Node, arg: fx.Node) -> bool:
    """Whether the operator's result may share memory with that argument."""
    name = operators.op_name(node.target)
    shares = name in operators.MOVEMENT or name in _SAME_MEMORY
    schema = getattr(node.target, "_schema", None)
    return (shares or (schema is not None and schema.name.endswith("_"))) and bool(node.args) and node.args[0] is arg


def _cat(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    layout = low.layouts.of(node)
    dim = argument(node, 1, "dim", 0)
    if layout is None or not low.layouts.regular(layout) or dim % len(low.flow.shape(node)) != layout.dim:
        return None
    for part in parts:  # a full part must have no channel that the sites would suppress
        if low.state.get(part) is None and low.layouts.of(part) is not None:
            return None
    low.state[node] = layout
    return low.graph.create_node("call_function", node.target, ([low.env[p] for p in parts], dim))


def _size(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    layout, dim = low.state[held[0]], node.args[1]
    if dim % len(low.flow.shape(held[0])) == layout.dim:  # type: ignore[operator]
        return None
    return low.graph.node_copy(node, low.env.__getitem__)


def _move(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    """Views, permutations and splits. The narrow tensor holds a row-major subset, so the same view of it is right once
    the narrow dimension's size is its own."""
    if held != [node.args[0]]:
        return None
    name, before = operators.op_name(node.target), low.state[held[0]]
    value = low.flow.values[node]
    after = _element_layouts(low, node, value) if isinstance(value, (tuple, list)) else low.layouts.of(node)
    pieces = after if isinstance(after, tuple) else (after,)
    if any(p is not None and not low.layouts.regular(p) for p in pieces) or all(p is None for p in pieces):
        return None
    if before.dim == 0 and name not in _SIZED and any(p is not None and p.dim for p in pieces):
        return None  # the samples themselves are moved
    args = list(node.args)
    if name in _SIZED:
        if not isinstance(after, Layout):
            return None
        at = 2 if name == "unflatten" else 1
        sizes = list(node.args[at])  # type: ignore[arg-type]
        place = after.dim
        if name == "unflatten":
            split: Any = node.args[1]
            place -= split % len(low.flow.shape(held[0]))
        elif name == "expand":
            place += len(sizes) - len(low.flow.shape(node))
        if not 0 <= place < len(sizes):
            place = -1
        if after.dim == 0 and place == 0:
            open_ = [i for i, size in enumerate(sizes) if i and size == -1 and name != "expand"]
            for i in open_:  # the batch takes the one size that may be left open
                sizes[i] = node.meta["val"].shape[i]
            if not all(isinstance(sizes[i], int) for i in open_):
                return None
            sizes[0] = -1
        elif place >= 0 and sizes[place] != -1:
            count = low.active_channels(after)
            if count is None and -1 in [s for s in sizes if isinstance(s, int)] and name != "expand":
                return None  # one size can be left open
            sizes[place] = -1 if count is None else count
        args[at] = sizes
    elif name in _SPLITTING:
        dim = argument(node, 2, "dim", 0) % len(low.flow.shape(held[0]))
        if dim == before.dim:
            if any(p is None for p in pieces):
                return None
            counts = [low.active_channels(p) for p in pieces if p is not None]
            if None in counts:
                return None
            low.state[node] = after
            return low.graph.call_function(_aten.split_with_sizes.default, (low.env[held[0]], counts, dim))
    elif name in ("select", "unbind", "slice", "roll", "flip", "unfold") and not _beside(low, node, name, before):
        return None
    low.state[node] = after
    new = low.graph.node_copy(node, low.env.__getitem__)
    new.args = tuple(fx.map_arg(args, low.env.__getitem__))
    return new


def _beside(low: Lowering, node: fx.Node, name: str, layout: Layout) -> bool:
    """Whether the dimension that the operator works on is another than the channels'."""
    rank = len(low.flow.shape(node.args[0]))  # type: ignore[arg-type]
    dims: Any = (node.args[2] if len(node.args) > 2 else None) if name == "roll" else argument(node, 1, "dim", 0)
    if dims is None:
        return False
    if name == "slice" and list(node.args[2:]) in ([], [None], [0], [0, sys.maxsize], [None, None]):
        return True  # all of it
    return all(d % rank != layout.dim for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _element_layouts(low: Lowering, node: fx.Node, value: Any) -> tuple[Layout | None, ...]:
    return tuple(low.layouts.of_labels(v) if isinstance(v, Tensor) else None for v in value)


def _getitem(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    elements = low.state[held[0]]
    if not isinstance(elements, tuple):
        return None
    low.state[node] = elements[node.args[1]]  # type: ignore[index]
    return low.graph.node_copy(node, low.env.__getitem__)


def _pad(low: Lowering, node: fx.Node, held: list[fx.Node]) -> fx.Node | None:
    layout, pad = low.state[held[0]], node.args[1]
    if layout.dim >= len(low.flow.shape(held[0])) - len(pad) // 2:  # type: ignore[arg-type]
        return None
    return _pointwise(low, node, held)


_TABLE: dict[str, Handler] = {
    "batch_norm": _norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "response_norm": _response_norm,
    "cat": _cat,
    "concat": _cat,
    "sym_size": _size,
    "getitem": _getitem,
    "scaled_dot_product_attention": attention_handlers.attention,
    "matmul": attention_handlers.matmul,
    "bmm": attention_handlers.matmul,
    "einsum": attention_handlers.einsum,
    **dict.fromkeys(RESAMPLING, _resampling),
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys(_SIZED | _SPLITTING | _UNSIZED, _move),
}
