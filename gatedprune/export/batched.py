"""The engine's operators for an exported graph: no loop over samples, so that the batch may vary; nothing in place.

Each computes what its namesake in `gatedprune.engine.narrow` computes in plain PyTorch. The weights of each sample's
winners are gathered as (B, k, n, …); then

- one sample (or active sets shared by the batch): an ordinary convolution with those weights;
- a fixed number of samples: one grouped convolution, a group for each sample;
- any number: a batched matrix product on the unfolded input, since an ONNX convolution has a fixed number of groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine import narrow, narrow_norms, selection
from ..functional import active_set, per_row, subsample

__all__ = ["batched"]


class _Weights(nn.Module):
    """Gathers (B, k, n, T) weights of each sample: k rows of C_out, n columns of C_in/groups, T taps."""

    table: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: bool, columns: bool) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        w = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
        self.shape = tuple(w.shape)
        if columns and not rows:
            w = w.transpose(0, 1)  # what an index names lies in one piece
        table = w.flatten(0, 1) if rows and columns else w.flatten(1)
        self.register_buffer("table", table.contiguous() if rows or columns else weight)
        self.register_buffer("bias", bias)

    def forward(self, in_index: Tensor | None, out_index: Tensor | None, gain: Tensor | None) -> tuple[Tensor, Any]:
        bias = self.bias
        if self.rows and self.columns:
            assert out_index is not None and in_index is not None
            w = F.embedding(out_index[:, :, None] * self.shape[1] + in_index[:, None, :], self.table)
        elif self.rows:
            assert out_index is not None
            w = F.embedding(out_index, self.table).unflatten(2, self.shape[1:])
        else:
            assert in_index is not None
            w = F.embedding(in_index, self.table).unflatten(2, (self.shape[0], self.shape[2])).transpose(1, 2)
        if bias is not None:
            bias = bias[out_index] if self.rows else bias[None]
        if gain is not None:
            w, bias = w * gain[:, :, None, None].to(w.dtype), None if bias is None else bias * gain.to(w.dtype)
        return w, bias


class _Follow(nn.Module):
    """Residual addition, activation, and the next gate's subsample, as the layer before it takes them in."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.activation, self.subsample = layer.activation, getattr(layer, "subsample", False)

    def forward(self, y: Tensor, residual: Tensor | None) -> Any:
        y = y if residual is None else y + residual
        y = narrow.ACTIVATIONS[self.activation](y) if self.activation else y
        return (y, subsample(y)) if self.subsample else y


class _Layer(nn.Module):
    """A layer's weights, gathered for each sample where it has active rows or columns, and what follows it."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: narrow.NarrowConv2d | narrow.NarrowLinear, rows: bool, columns: bool) -> None:
        super().__init__()
        self.plain = not (rows or columns)
        if self.plain:
            self.register_buffer("weight", layer.weight)
            self.register_buffer("bias", layer.bias)
        else:
            self.weights = _Weights(layer.weight, layer.bias, rows, columns)
        self.follow = _Follow(layer)


class Conv2d(_Layer):
    """`narrow.NarrowConv2d`; ``batch``: how many samples, None where that varies."""

    def __init__(self, layer: narrow.NarrowConv2d, rows: bool, columns: bool, batch: int | None) -> None:
        super().__init__(layer, rows, columns)
        self.batch, self.kernel_size, self.dilation = batch, layer.kernel_size, layer.dilation
        self.stride, self.groups, self.whole_groups = layer.stride, layer.groups, layer.whole_groups
        self.group_width = layer.weight.shape[1]
        # (left, right, top, bottom): "same" may need more on one side
        if isinstance(layer.padding, str):
            total = [
                d * (k - 1) if layer.padding == "same" else 0
                for d, k in zip(self.dilation, self.kernel_size, strict=True)
            ]
            self.around: tuple[int, ...] = tuple(p for t in reversed(total) for p in (t // 2, t - t // 2))
        else:
            self.around = tuple(p for t in reversed(layer.padding) for p in (t, t))
        even = self.around[::2] == self.around[1::2]
        self.padding: tuple[int, ...] = self.around[::2][::-1] if even else (0, 0)
        self.before = () if even else self.around

    def forward(self, x: Tensor, in_index: Tensor | None = None, out_index: Tensor | None = None,
                gain: Tensor | None = None, residual: Tensor | None = None) -> Any:  # fmt: skip
        groups = x.shape[1] // self.group_width if self.whole_groups else self.groups
        if self.plain:
            padded = F.pad(x, self.before) if self.before else x
            y = F.conv2d(padded, self.weight, self.bias, self.stride, self.padding, self.dilation, groups)
            return self.follow(y, residual)
        w, bias = self.weights(None if self.whole_groups else in_index, out_index, gain)
        if w.shape[0] == 1 or isinstance(self.batch, int):
            return self.follow(self._grouped(x, w, bias, groups), residual)
        bias = bias if bias is None or bias.shape[0] == 1 else per_row(bias, x.shape[0])
        return self.follow(self._unfolded(x, per_row(w, x.shape[0]), bias, groups), residual)

    def _grouped(self, x: Tensor, w: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """One convolution: with the weights as they are for one sample, else with each sample's as groups."""
        x = F.pad(x, self.before) if self.before else x
        if w.shape[0] > 1:
            w, bias = per_row(w, x.shape[0]), None if bias is None else per_row(bias.expand(w.shape[0], -1), x.shape[0])
        samples, rows = w.shape[0], x.shape[0]
        c = None if bias is None else bias.reshape(-1)
        w = w.flatten(0, 1).unflatten(2, self.kernel_size)
        x = x if samples == 1 else x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(x, w, c, self.stride, self.padding, self.dilation, groups * samples)
        return y if samples == 1 else y.reshape(rows, -1, *y.shape[2:])

    def _unfolded(self, x: Tensor, w: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """The sum over taps, as one matrix product for each sample and group; depthwise, as products of maps."""
        x = F.pad(x, self.around) if any(self.around) else x
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1

        def tap(i: int, j: int) -> Tensor:
            top, left = i * dh, j * dw
            return x[:, :, top : top + sh * (height - 1) + 1 : sh, left : left + sw * (width - 1) + 1 : sw]

        taps = [tap(i, j) for i in range(kh) for j in range(kw)]
        channels, out = x.shape[1], w.shape[1]
        if groups == channels == out:
            y = w[:, :, 0, 0, None, None] * taps[0]
            for t in range(1, len(taps)):
                y = y + w[:, :, 0, t, None, None] * taps[t]
        else:
            columns = taps[0][:, :, None] if len(taps) == 1 else torch.stack(taps, 2)
            columns = columns.reshape(-1, groups, channels // groups * len(taps), height * width)
            y = w.reshape(-1, groups, out // groups, w.shape[2] * w.shape[3]) @ columns
            y = y.reshape(-1, out, height, width)
        return y if bias is None else y + bias[:, :, None, None]


class Linear(_Layer):
    """`narrow.NarrowLinear`: a batched matrix product. x: (B·r, …, n), each sample's r rows together."""

    def forward(self, x: Tensor, in_index: Tensor | None = None, out_index: Tensor | None = None,
                gain: Tensor | None = None, residual: Tensor | None = None) -> Any:  # fmt: skip
        if self.plain:
            return self.follow(F.linear(x, self.weight, self.bias), residual)
        w, bias = self.weights(in_index, out_index, gain)
        w = w.squeeze(3)
        if w.shape[0] == 1:
            return self.follow(F.linear(x, w[0], None if bias is None else bias[0]), residual)
        y = x.reshape(w.shape[0], -1, x.shape[-1]) @ w.transpose(1, 2)
        y = y if bias is None else y + bias[:, None]
        return self.follow(y.reshape(*x.shape[:-1], w.shape[1]), residual)


class Affine(nn.Module):
    """`narrow.NarrowAffine`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, layer: narrow.NarrowAffine) -> None:
        super().__init__()
        for name in ("scale", "shift"):
            self.register_buffer(name, layer.get_buffer(name))
        self.follow = _Follow(layer)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        scale, shift = self.scale[None], self.shift[None]
        if index is not None:
            scale, shift = (per_row(v[0, index], x.shape[0]) for v in (scale, shift))
        view = (*scale.shape, *[1] * (x.dim() - 2))
        return self.follow(shift.reshape(view) + x * scale.reshape(view), None)


class Selector(nn.Module):
    """`selection.Selector`, without a memory of what it chose."""

    def __init__(self, layer: selection.Selector) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.layer.choose(x, index, _active_set)


def _active_set(g: Tensor, k: int) -> Tensor:
    """`functional.active_set`, whatever a runtime does with equal values: OpenVINO's TopK has them in any order."""
    channels = g.shape[1]
    if k == channels:
        return active_set(g, k)
    least = g.topk(k, dim=1).values[:, -1:]
    above, level = g > least, g == least
    wins = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    place = torch.arange(channels, dtype=torch.float32)
    return torch.where(wins, channels - place, -place).topk(k, dim=1).indices  # no two are equal


class GroupNorm(nn.Module):
    """`narrow_norms.NarrowGroupNorm`."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: narrow_norms.NarrowGroupNorm) -> None:
        super().__init__()
        self.size, self.eps = layer.size, layer.eps
        weight: Tensor | None = layer.weight
        bias: Tensor | None = layer.bias
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = F.group_norm(x, max(1, x.shape[1] // self.size), eps=self.eps)
        view = (*x.shape[:2], *[1] * (x.dim() - 2))
        if self.weight is not None:
            y = y * per_row(self.weight[index], x.shape[0]).reshape(view)
        if self.bias is not None:
            y = y + per_row(self.bias[index], x.shape[0]).reshape(view)
        return y


class Widen(nn.Module):
    """`narrow.Widen`: back to all channels, suppressed ones are zero."""

    def __init__(self, layer: narrow.Widen) -> None:
        super().__init__()
        self.dim, self.channels = layer.dim, layer.channels

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        if self.dim == 0:
            return self._widen(x.unflatten(0, (-1, index.shape[1])), index, 1).flatten(0, 1)
        return self._widen(x, index, self.dim)

    def _widen(self, x: Tensor, index: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = self.channels
        return x.new_zeros(shape).scatter(dim, _spread(index, x, dim), x)


class AddInto(nn.Module):
    """`narrow.AddInto`: the residual addition of a narrow branch to the full stream."""

    def __init__(self, layer: narrow.AddInto) -> None:
        super().__init__()
        self.dim = layer.dim

    def forward(self, full: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return full.scatter_add(self.dim, _spread(index, x, self.dim), x)


def _spread(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """An index (B, n) along ``dim`` of x as one of x's shape, which scatter and gather take."""
    index = per_row(index, x.shape[0])
    view = [1] * x.dim()
    view[0], view[dim] = index.shape
    return index.reshape(view).expand(x.shape)


def batched(root: nn.Module, graph: Any, batch: int | None) -> None:
    """Put these operators in the place of the engine's, in a graph lowered for plain PyTorch.

    Args:
        root: Holds the modules that the graph calls.
        graph: An `torch.fx.Graph`; its nodes say which layers are given indices.
        batch: The number of samples, or None.
    """
    simple: dict[type, Callable[[Any], nn.Module]] = {
        narrow.NarrowAffine: Affine,
        selection.Selector: Selector,
        narrow_norms.NarrowGroupNorm: GroupNorm,
        narrow.Widen: Widen,
        narrow.AddInto: AddInto,
    }
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        layer = root.get_submodule(str(node.target))
        arguments = (*node.args, *[None] * 4)
        if isinstance(layer, narrow.NarrowConv2d):
            columns = arguments[1] is not None and not layer.whole_groups
            new: nn.Module = Conv2d(layer, arguments[2] is not None, columns, batch)
        elif isinstance(layer, narrow.NarrowLinear):
            new = Linear(layer, arguments[2] is not None, arguments[1] is not None)
        elif type(layer) in simple:
            new = simple[type(layer)](layer)
        else:
            continue
        root._modules[str(node.target)] = new
