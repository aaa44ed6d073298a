"""How products of two activations carry channel labels: attention and its parts (see `rules`)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from .labels import WILD, Use, compress

if TYPE_CHECKING:
    from .flow import Flow

__all__ = ["attention", "einsum", "matmul"]


def _attend(flow: Flow, a: Tensor, b: Tensor) -> Tensor | None:
    """Heads: labels vary along the leading dimensions of a product; everything inside one head goes together.

    Returns the heads' labels with the last two dimensions cut to length 1; None where there are no heads.
    """
    rank = max(a.dim(), b.dim())
    a, b = (t.view((1,) * (rank - t.dim()) + t.shape) for t in (a, b))
    varies = [flow.units.varying(t).shape[:-2] for t in (a, b)]
    if not any(s > 1 for shape in varies for s in shape):
        return None
    for t in (a, b):
        flow.units.unite_within(t, (-2, -1))
    tops = [torch.from_numpy(flow.units.find(compress(t)).max(axis=(-2, -1), keepdims=True)) for t in (a, b)]
    wide = torch.broadcast_shapes(tops[0].shape, tops[1].shape)
    shared = [any(top.shape[d] == 1 and wide[d] > 1 for d in range(rank - 2)) for top in tops]
    for top, is_shared in zip(tops, shared, strict=True):
        if is_shared:
            flow.units.pin(top, "it is shared between attention heads")
    if shared[0] != shared[1]:
        return tops[0 if shared[1] else 1]
    first, second = (t.expand(wide).contiguous() for t in tops)
    flow.units.union(first, second)
    return torch.where(first == WILD, second, first)


def matmul(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    a, b = args[0], args[1]
    if min(len(a.shape), len(b.shape)) < 2:
        return NotImplemented
    shape = flow.shape(node)
    flow.macs[node] = math.prod(shape) * a.shape[-1] // flow.batch
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return _by_constant(flow, node, (a, -1) if isinstance(a, Tensor) else (b, -2), shape)
    heads = _attend(flow, a, b)
    if heads is not None:
        flow.mixers.append(Use(node, heads.numpy().ravel()))
        return heads.expand(shape)
    va, vb = flow.units.varying(a), flow.units.varying(b)
    if va.shape[-1] > 1 or vb.shape[-2] > 1:
        return NotImplemented  # a sum over channels
    if va.shape[-2] > 1 and vb.shape[-1] > 1:
        return NotImplemented
    if vb.shape[-1] > 1:
        flow.through.append(Use(node, np.unique(vb)))
        _forget(flow, va)
        return torch.from_numpy(vb).view((1,) * (len(shape) - vb.ndim) + vb.shape).expand(shape)
    if va.shape[-2] > 1:
        flow.through.append(Use(node, np.unique(va)))
        _forget(flow, vb)
        return torch.from_numpy(va).view((1,) * (len(shape) - va.ndim) + va.shape).expand(shape)
    return NotImplemented


def _by_constant(flow: Flow, node: fx.Node, factor: tuple[Tensor, int], shape: tuple[int, ...]) -> Any:
    """A product with a constant, summed over the factor's dimension: position scores of each attention head."""
    x, over = factor
    rest = -1 if over == -2 else -2
    if flow.units.varying(x).shape[rest] > 1 or not flow.units.settle(x, (over,)):
        return NotImplemented
    roots = flow.units.varying(x)
    flow.through.append(Use(node, np.unique(roots)))
    return torch.from_numpy(roots).expand(shape)


def einsum(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    """A sum of products: what is summed over goes together, what is multiplied does too."""
    terms, arrow, out = args[0].replace(" ", "").partition("->")
    letters, operands = terms.split(","), args[1]
    if not arrow or "." in args[0] or any(len(set(t)) < len(t) for t in (*letters, out)):
        return NotImplemented
    sizes = {c: s for term, x in zip(letters, operands, strict=True) for c, s in zip(term, x.shape, strict=True)}
    flow.macs[node] = math.prod(sizes.values()) // flow.batch
    found: Tensor | None = None
    for term, x in zip(letters, operands, strict=True):
        if not isinstance(x, Tensor):
            continue
        if not flow.units.settle(x, tuple(term.index(c) for c in term if c not in out)):
            return NotImplemented
        roots = torch.from_numpy(flow.units.varying(x))
        kept = roots[tuple(slice(None) if c in out else 0 for c in term)]
        here = "".join(c for c in term if c in out)
        wide = kept.permute([here.index(c) for c in out if c in here])
        wide = wide[tuple(slice(None) if c in here else None for c in out)]
        if found is not None:
            if found.shape != wide.shape:
                return NotImplemented
            flow.units.union(found.numpy(), wide.numpy())
            wide = torch.where(found == WILD, wide, found)
        found = wide
    if found is None:
        return NotImplemented
    products = sum(isinstance(x, Tensor) for x in operands) > 1
    (flow.mixers if products else flow.through).append(Use(node, np.unique(flow.units.find(found))))
    return found.expand(flow.shape(node))


def _forget(flow: Flow, roots: np.ndarray) -> None:
    flow.units.pin(roots, "its product with other channels mixes them")


def attention(flow: Flow, node: fx.Node, args: tuple, kwargs: dict) -> Any:
    q, k, v = args[:3]
    if not all(isinstance(t, Tensor) and t.dim() >= 3 for t in (q, k, v)) or kwargs.get("enable_gqa"):
        return NotImplemented
    shape = flow.shape(node)
    flow.macs[node] = (math.prod(q.shape) + math.prod(shape)) * k.shape[-2] // flow.batch
    scores = _attend(flow, q, k.transpose(-2, -1))
    if scores is None:
        return _single_head(flow, node, q, k, v, shape)
    heads = _attend(flow, scores.expand(*scores.shape[:-2], q.shape[-2], k.shape[-2]), v)
    if heads is None:
        return NotImplemented
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if isinstance(mask, Tensor):
        flow.units.pin(compress(mask), "it is added to attention scores")
    flow.mixers.append(Use(node, heads.numpy().ravel()))
    return heads.expand(shape)


def _single_head(flow: Flow, node: fx.Node, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, ...]) -> Any:
    """Attention with one head: queries and keys are summed over, but the values' channels pass through."""
    _forget(flow, compress(q).numpy())
    _forget(flow, compress(k).numpy())
    values = flow.units.varying(v)
    if values.shape[-2] > 1:
        return NotImplemented
    # Of its two products only the second grows with the values' channels.
    flow.through.append(Use(node, np.append(np.unique(values), np.full(q.shape[-1], WILD))))
    return torch.from_numpy(values).expand(shape)
