"""How each ATen operator carries channel labels. One table; an operator that is not in it pins what enters it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map

from . import attention_rules, norm_rules
from .capture import concrete
from .labels import WILD, Const, Join, Use, compress, distinct, number_pairs, rebroadcast
from .operators import BINARY, ELEMENTWISE, MOVEMENT, OVER_DIM, REDUCTION, SPATIAL, op_name

if TYPE_CHECKING:
    from .flow import Flow

__all__ = ["apply"]

Rule = Callable[["Flow", fx.Node, tuple, dict], Any]


def apply(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """The labels of ``node``'s output, given its arguments' labels."""
    name = op_name(node.target)
    rule = _RULES.get(name)
    if rule is None:
        if name in ELEMENTWISE:
            rule = _unary
        elif name in BINARY:
            rule = _binary
        elif name in MOVEMENT:
            rule = _move
        elif name in SPATIAL:
            rule = _spatial
        elif name in REDUCTION:
            rule = _reduction
        elif name in OVER_DIM:
            rule = _over_dim
    if _overwrites(node):
        return _unknown(flow, node, args, kwargs, f"`{name}` overwrites it while it is still in use")
    if rule is not None:
        out = rule(flow, node, args, kwargs)
        if out is not NotImplemented:
            return out
    return _unknown(flow, node, args, kwargs, f"it passes through `{name}`, which mixes or re-arranges channels")


def _overwrites(node: fx.Node) -> bool:
    """Whether the operator changes its first argument in place although something later still reads that node."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.endswith("_") or schema.name.endswith("__") or not node.args:
        return False
    value = node.args[0]
    return isinstance(value, fx.Node) and any(node < user for user in value.users)


def _shapes(node: fx.Node) -> Any:
    return tree_map(lambda v: tuple(concrete(s) for s in v.shape) if isinstance(v, Tensor) else None, node.meta["val"])


def _unknown(flow: Flow, node: fx.Node, args: tuple, kwargs: dict, reason: str) -> Any:
    """Pin everything that enters; what leaves is pinned too."""
    for leaf in tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, Tensor):
            flow.units.pin(compress(leaf), reason)
    label = flow.units.fresh(1)
    flow.units.pin(label, reason)

    def blank(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [concrete(s) for s in value.shape]
        return label.expand(shape) if shape else label[0]

    return tree_map(blank, node.meta["val"])


def _unary(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x = args[0]
    return x.expand(flow.shape(node)) if isinstance(x, Tensor) else NotImplemented


def _binary(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    name, shape = op_name(node.target), flow.shape(node)
    operands = [a for a in args if isinstance(a, Tensor)]
    out = operands[0]
    for other in operands[1:]:
        out = _pair(flow, node, out, other, joins=name in ("add", "sub", "rsub", "where", "lerp"))
    out = out.expand(shape)
    for arg in args:
        if isinstance(arg, Const):
            _carry_constant(flow, node, out, arg)
    return out


def _carry_constant(flow: Flow, node: fx.Node, labels: Tensor, constant: Const) -> None:
    """A parameter with one value per channel (layer scale, a position embedding) is part of the site."""
    roots = flow.units.varying(labels)
    dims = [d for d, s in enumerate(roots.shape) if s > 1]
    at = dims[0] - (labels.dim() - len(constant.shape)) if len(dims) == 1 else -1
    if at >= 0 and constant.shape[at] == labels.shape[dims[0]] > 1:
        flow.carry(node, roots.reshape(-1))


def _pair(flow: Flow, node: fx.Node, a: Tensor, b: Tensor, joins: bool) -> Tensor:
    """Labels of an element-wise operation on two labelled tensors that broadcast against each other."""
    rank = max(a.dim(), b.dim())
    a, b = (t.view((1,) * (rank - t.dim()) + t.shape) for t in (a, b))
    ca, cb = compress(a), compress(b)
    # A map without a channel dimension (one weight per place) meets every channel: it must stay.
    alone_a = any(a.shape[d] == 1 and cb.shape[d] > 1 for d in range(rank))
    alone_b = any(b.shape[d] == 1 and ca.shape[d] > 1 for d in range(rank))
    shape = torch.broadcast_shapes(a.shape, b.shape)
    if alone_a != alone_b:
        flow.units.pin(ca if alone_a else cb, "it is broadcast over the channels of another tensor")
        return (b if alone_a else a).expand(shape)
    ca, cb = torch.broadcast_tensors(ca, cb)
    ra, rb = flow.units.find(ca), flow.units.find(cb)
    if ((ra == rb) | (ra == WILD) | (rb == WILD)).all():
        return torch.from_numpy(np.where(ra == WILD, rb, ra)).expand(shape)
    permuted = np.array_equal(distinct(ra), distinct(rb))  # x·cos + rotated(x)·sin, not a residual addition
    if not joins or permuted:
        flow.units.union(ra, rb)
        return torch.from_numpy(np.where(ra == WILD, rb, ra)).expand(shape)
    return _join(flow, node, ra, rb).expand(shape)


def _join(flow: Flow, node: fx.Node, ra: np.ndarray, rb: np.ndarray) -> Tensor:
    """An addition of two different sets of units: the sum is a stream of new units that nobody may narrow.

    Where branches are merged it unites them instead.
    """
    if node in flow.merges:
        out = np.where(ra == WILD, rb, ra)
        flow.merged.append(Join(node, ra, rb, out))
        flow.units.union(ra, rb)
        return torch.from_numpy(out)
    count, where = number_pairs(ra, rb)
    fresh = flow.units.fresh(count)
    flow.joins.append(Join(node, ra, rb, fresh.numpy()))
    flow.units.pin(fresh, "its channels are multiplied with those of the residual stream")
    return fresh[torch.from_numpy(where)]


def _move(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    operator_: Any = node.target
    try:
        out = operator_(*args, **kwargs)
    except (RuntimeError, TypeError):
        # A view of a broadcast may need a copy.
        dense = tree_map(lambda v: v.contiguous() if isinstance(v, Tensor) else v, args)
        try:
            out = operator_(*dense, **kwargs)
        except (RuntimeError, TypeError):
            return NotImplemented
    return tree_map(lambda v: rebroadcast(v) if isinstance(v, Tensor) else v, out)


def _cat(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    parts = [p if isinstance(p, Tensor) else torch.full((1,), WILD).expand(p.shape) for p in args[0]]
    parts = [p for p in parts if p.shape != (0,)]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % parts[0].dim()
    small = [compress(p) for p in parts]
    common = [max(s.shape[d] for s in small) for d in range(parts[0].dim())]
    # Only the concatenated dimension and those along which some part varies are written out.
    wide = [
        s.expand([p.shape[d] if d == dim else common[d] for d in range(p.dim())])
        for s, p in zip(small, parts, strict=True)
    ]
    out = torch.cat(wide, dim)
    return out.expand(flow.shape(node))


def _stack(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    parts = [p if isinstance(p, Tensor) else torch.full((1,), WILD).expand(p.shape) for p in args[0]]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return rebroadcast(torch.stack(parts, dim))


def _pad(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x, pad = args[0], args[1]
    if len(pad) <= 2 * (x.dim() - 2) and x.dim() > 2 and compress(x).shape[2:].numel() == 1:
        return compress(x).expand(flow.shape(node))  # the border of a map belongs to the map's channel
    return F.pad(x, pad, value=WILD)


def _spatial(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x, shapes = args[0], _shapes(node)
    shape = shapes if isinstance(shapes, tuple) and all(isinstance(s, int) for s in shapes) else None
    if shape is None or x.dim() < 3 or len(shape) != x.dim():
        return NotImplemented
    return flow.spread(flow.units.along(x, 1), 1, shape)


def _reduced_dims(node: fx.Node, args: tuple, kwargs: dict, rank: int) -> tuple[int, ...]:
    dim = kwargs.get("dim")
    if dim is None:
        position = 2 if op_name(node.target) in ("norm", "linalg_vector_norm") else 1
        dim = args[position] if len(args) > position and not isinstance(args[position], bool) else None
    if dim is None or dim == []:
        return tuple(range(rank))
    return tuple(d % rank for d in ((dim,) if isinstance(dim, int) else dim))


def _reduction(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x, val = args[0], node.meta["val"]
    if not isinstance(val, Tensor):
        return NotImplemented
    dims = _reduced_dims(node, args, kwargs, x.dim())
    if not flow.units.settle(x, dims):
        return NotImplemented
    out, _ = flow.units.reduce(x, dims)
    shape = flow.shape(node)
    if len(shape) != out.dim():
        out = out[tuple(0 if d in dims else slice(None) for d in range(out.dim()))]
    return out.expand(shape)


def _over_dim(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if not isinstance(node.meta["val"], Tensor) or not isinstance(dim, int):
        return NotImplemented
    return x if flow.units.settle(x, (dim,)) else NotImplemented


def _convolution(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    name = op_name(node.target)
    transposed = name.startswith("conv_transpose")
    x, weight = args[0], args[1]
    groups_at = 7 if transposed else 6
    groups = args[groups_at] if len(args) > groups_at else kwargs.get("groups", 1)
    shape = flow.shape(node)
    if isinstance(weight, Tensor) or not isinstance(x, Tensor) or x.dim() != len(weight.shape):
        return NotImplemented
    c_in, c_out = x.shape[1], shape[1]
    taps = math.prod(weight.shape[2:])
    places = x.shape[0] * math.prod(x.shape[2:] if transposed else shape[2:])
    flow.macs[node] = places * taps * c_out * c_in // groups // flow.batch
    shared = _shared_between_heads(flow, node, x) if groups == c_in == c_out else None
    if shared is not None:
        return shared.expand(shape)
    read = flow.units.along(x, 1)
    if groups == 1:
        flow.consume(node, read)
        return flow.spread(flow.produce(node, c_out), 1, shape)
    per_in, per_out = c_in // groups, c_out // groups
    rows = read.reshape(groups, per_in)
    if groups < per_in:
        # A few wide groups: they lose the same channels each, so that they stay equally wide.
        flow.units.union(np.broadcast_to(rows[:1], rows.shape), rows)
        flow.consume(node, flow.units.find(rows[0]))
        return flow.spread(flow.produce(node, per_out, groups), 1, shape)
    if per_in > 1:
        # Many narrow groups: whole groups are suppressed.
        flow.units.union(np.broadcast_to(rows[:, :1], rows.shape), rows)
    labels = np.repeat(flow.units.find(read[::per_in]), per_out)
    flow.carry(node, labels)
    return flow.spread(labels, 1, shape)


def _shared_between_heads(flow: Flow, node: fx.Node, x: Tensor) -> Tensor | None:
    """Labels of a depthwise convolution's result where heads are folded into the batch: each keeps its own channels.

    All of them have the same weights, so that no weight is cut. None where nothing is folded.
    """
    roots = flow.units.varying(x)
    if roots.shape[0] == 1 or any(s > 1 for s in roots.shape[2:]):
        return None
    flow.through.append(Use(node, np.unique(roots)))
    return torch.from_numpy(roots)


def _linear(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    x, weight = args[0], args[1]
    if isinstance(weight, Tensor) or not isinstance(x, Tensor) or len(weight.shape) != 2:
        return NotImplemented
    shape = flow.shape(node)
    flow.macs[node] = math.prod(shape) * weight.shape[1] // flow.batch
    if _over_places(flow, x):
        flow.through.append(Use(node, np.unique(flow.units.varying(x))))
        return rebroadcast(x).narrow(-1, 0, 1).expand(shape)
    flow.consume(node, flow.units.along(x, -1))
    return flow.spread(flow.produce(node, weight.shape[0]), len(shape) - 1, shape)


def _nothing(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """An assertion: it has no result."""
    return None


def _over_places(flow: Flow, x: Tensor) -> bool:
    """Whether a linear layer mixes places (tokens) of channels that a layer has written and nobody has added yet.

    Those channels pass through it. Where it mixes the places of the residual stream, its own hidden units count.
    """
    roots = flow.units.varying(x)
    if roots.shape[-1] > 1 or roots.size == 1:
        return False
    here = set(roots.ravel().tolist())
    return any(not here.isdisjoint(flow.units.find(use.labels).tolist()) for use in flow.producers) and not any(
        not here.isdisjoint(flow.units.find(join.labels).tolist()) for join in flow.joins
    )


def _getitem(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    return operator.getitem(*args)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution
    ),
    "linear": _linear,
    "batch_norm": norm_rules.batch_norm,
    "group_norm": norm_rules.group_norm,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "getitem": _getitem,
    "layer_norm": norm_rules.layer_norm,
    "rms_norm": norm_rules.layer_norm,
    "response_norm": norm_rules.response_norm,
    "matmul": attention_rules.matmul,
    "bmm": attention_rules.matmul,
    "einsum": attention_rules.einsum,
    "scaled_dot_product_attention": attention_rules.attention,
    **dict.fromkeys(
        ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"), _nothing
    ),
}
