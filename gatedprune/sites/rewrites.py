"""What a model spells out, put into the captured graph as the one operator that it is: norms, assignments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..functional import response_norm
from .operators import MOVEMENT, op_name

__all__ = ["join_response_norms", "join_rms_norms", "replace_overwritten"]

_aten = torch.ops.aten
_TO_LAST, _BACK = [0, 2, 3, 1], [0, 3, 1, 2]


def join_rms_norms(captured: fx.GraphModule) -> int:
    """Replace x · rsqrt(mean(x², channels) + ε) · weight of (B, C, H, W) maps by an RMS norm; returns how many.

    A mean over channels mixes them; an RMS norm can be taken over the active ones only (see `norms`).
    """
    count = 0
    for mean in list(captured.graph.nodes):
        found = _match(mean)
        if found is None:
            continue
        x, scaled, weight, eps = found
        with captured.graph.inserting_before(scaled):
            last = _call(captured, scaled, _aten.permute.default, (x, _TO_LAST))
            norm = _call(captured, scaled, _aten.rms_norm.default, (last, [x.meta["val"].shape[1]], weight, eps))
            scaled.replace_all_uses_with(_call(captured, scaled, _aten.permute.default, (norm, _BACK)))
        count += 1
    if count:
        captured.graph.eliminate_dead_code()
        captured.recompile()
    return count


def join_response_norms(captured: fx.GraphModule) -> int:
    """Replace x + bias + weight · x · s / (mean(s, channels) + ε), s = ‖x‖ over places, by one call; returns how many.

    A mean over channels mixes them; a response norm can be taken over the active ones only (see `norms`).
    """
    count = 0
    for size in list(captured.graph.nodes):
        found = _match_response(size)
        if found is None:
            continue
        result, args = found
        with captured.graph.inserting_before(result):
            result.replace_all_uses_with(_call(captured, result, response_norm, args))
        count += 1
    if count:
        captured.graph.eliminate_dead_code()
        captured.recompile()
    return count


def _match_response(size: fx.Node) -> tuple[fx.Node, tuple] | None:
    """(the last addition, arguments of `response_norm`) where ``size`` is the norm over places that it begins with."""
    if not (_is(size, "linalg_vector_norm") or _is(size, "norm")) or len(size.args) != 4 or size.kwargs:
        return None
    chain: list[Any] = [next((user for user in size.users if _is(user, "mean")), None)]
    for name in ("add", "div", "mul", "addcmul", "add"):
        chain.append(_only_user(chain[-1], name))
    if any(node is None or node.kwargs for node in chain):
        return None
    mean, shifted, ratio, product, affine, result = chain
    given: Any = size.args
    x, order, places, kept = given
    rank = _rank(x)
    if order != 2 or kept is not True or mean.args[2:] != (True,) or len(mean.args[1]) != 1:
        return None
    dim = mean.args[1][0] % rank
    if sorted(d % rank for d in places) != [d for d in range(1, rank) if d != dim]:
        return None
    if set(size.users) != {mean, ratio} or ratio.args != (size, shifted) or set(product.args) != {x, ratio}:
        return None
    bias, weight = (_per_channel(a, x.meta["val"].shape[dim], dim, rank) for a in affine.args[:2])
    if bias is None or weight is None or affine.args[2] is not product or set(result.args) != {x, affine}:
        return None
    eps = shifted.args[1]
    return (result, (x, weight, bias, eps, dim)) if isinstance(eps, float) else None


def _per_channel(view: Any, channels: int, dim: int, rank: int) -> fx.Node | None:
    """The parameter of one value per channel that ``view`` shows along ``dim`` of ``rank`` dimensions."""
    if not (_is(view, "view") or _is(view, "reshape")):
        return None
    parameter: fx.Node = view.args[0]
    shape = [channels if d == dim else 1 for d in range(rank)]
    flat = parameter.op == "get_attr" and _rank(parameter) == 1
    return parameter if flat and list(view.meta["val"].shape) == shape else None


_LOOKS = MOVEMENT | frozenset(["alias", "contiguous", "to", "type_as", "detach", "dropout", "getitem"])


def replace_overwritten(captured: fx.GraphModule) -> int:
    """Where all of a value is overwritten, ``x[:, :] = y``, its later readers read the new one; returns how many.

    Only where nothing else looks at the memory afterwards.
    """
    count = 0
    for node in list(captured.graph.nodes):
        found = _whole_target(node) if _is(node, "copy") and len(node.args) == 2 and not node.kwargs else None
        if found is None:
            continue
        with captured.graph.inserting_before(node):
            new = _call(captured, node, _aten.clone.default, (node.args[1],))
        for old in (node, *found):
            old.replace_all_uses_with(new, delete_user_cb=lambda user, at=node: at < user)
        captured.graph.erase_node(node)
        count += 1
    if count:
        captured.graph.eliminate_dead_code()
        captured.recompile()
    return count


def _whole_target(copied: fx.Node) -> list[fx.Node] | None:
    """The value that is overwritten and the whole slices of it that lead to where; None where others look at it."""
    given: Any = copied.args
    target, source = given
    chain = [target]
    while _is(chain[-1], "alias") or _is(chain[-1], "slice"):
        chain.append(chain[-1].args[0])
    owner = chain[-1]
    if owner.op != "call_function" or op_name(owner.target) in _LOOKS or owner.target._schema.is_mutable:
        return None
    values = [n.meta["val"] for n in (*chain, source)]
    if any(v.shape != values[0].shape or v.dtype != values[0].dtype for v in values):
        return None
    looking, todo = set(chain), list(chain)
    while todo:
        for user in todo.pop().users:
            if user is not copied and op_name(user.target) in _LOOKS and not copied < user and user not in looking:
                looking.add(user)
                todo.append(user)
    return chain if not any(copied < user for n in looking - set(chain) for user in n.users) else None


def _match(mean: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, float] | None:
    """(x, the scaled result, weight, ε) where ``mean`` is the mean square of an RMS norm over dimension 1."""
    if (
        not _is(mean, "mean")
        or list(mean.args[1:2]) != [[1]]
        or (*mean.args[2:3], mean.kwargs.get("keepdim"))[0] is not True
    ):
        return None
    square = mean.args[0]
    if not (_is(square, "pow") and square.args[1] == 2 or _is(square, "square")):  # type: ignore[union-attr]
        return None
    x = square.args[0]  # type: ignore[union-attr]
    shifted = _only_user(mean, "add")
    root = _only_user(shifted, "rsqrt")
    result = _only_user(root, "mul")
    if result is None or shifted is None or not isinstance(shifted.args[1], float) or _rank(x) != 4:
        return None
    if root not in result.args or x not in result.args or shifted.kwargs:
        return None
    scaled = _only_user(result, "mul")
    view = next((a for a in scaled.args if a is not result), None) if scaled is not None else None
    if _is(view, "view") or _is(view, "reshape"):
        weight = view.args[0]  # type: ignore[union-attr]
        if weight.op == "get_attr" and list(view.args[1]) in ([1, -1, 1, 1], [1, x.meta["val"].shape[1], 1, 1]):  # type: ignore
            return x, scaled, weight, shifted.args[1]  # type: ignore[return-value]
    return x, result, None, shifted.args[1]  # type: ignore[return-value]


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) == name


def _only_user(node: fx.Node | None, name: str) -> fx.Node | None:
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and _is(users[0], name) else None


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _call(captured: fx.GraphModule, like: fx.Node, target: Any, args: tuple) -> fx.Node:
    """A new node in the module that ``like`` ran in, with the value that it has for the example inputs."""
    node = captured.graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    node.meta["val"] = target(*fx.map_arg(args, lambda a: a.meta["val"]))
    return node
