"""Operators over active sets: any device, any batch, every sample with its own channels.

Indices are (B, n): which channels of the full tensor the n channels of a narrow one are, ascending. In plain PyTorch
the weights of the winners are gathered per sample and an ordinary convolution or linear layer runs on the narrow
tensors; the native backend reads them where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import per_row, subsample
from .selection import fits

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": lambda x, inplace=False: F.gelu(x),
}

__all__ = [
    "ACTIVATIONS",
    "AddInto",
    "MaxPool2d",
    "UpsampleBilinear2d",
    "global_pool",
    "NarrowAffine",
    "NarrowConv2d",
    "NarrowLinear",
    "Take",
    "Widen",
]


def _per_sample(x: Tensor, samples: int, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Run sample by sample, since each has its own weights; one sample is not copied. x is (B·r, …)."""
    if samples == 1:
        return run(x, 0)
    rows = x.shape[0] // samples
    return torch.cat([run(x[b * rows : (b + 1) * rows], b) for b in range(samples)])


def _samples(*indices: Tensor | None) -> int:
    for index in indices:
        if index is not None:
            return index.shape[0]
    return 1


class NarrowConv2d(nn.Module):
    """A convolution over active sets, its batch norm folded in, and what follows it: residual, activation, subsample.

    Args:
        weight: (C_out, C_in/groups, kh, kw), full; bfloat16: the native backend multiplies in it and adds in float32.
        bias: (C_out,) or None.
        whole_groups: Active groups are complete and others absent; False: every group has the same active channels.
        native: Use the native backend where it can (float32 on the CPU).
        winograd: Let the native backend compute it by F(2×2, 3×3), in float32: see `winograd`.

    Attributes:
        activation: "" or a key of `ACTIVATIONS`, applied last.
        subsample: Return s(y), (B, n_out), beside y.
        inplace: The result takes the place of the residual, which nobody reads again.

    Forward:
        x: (B, n_in, H, W). in_index: (B, n_in/groups) of the weight's columns; None for all, and for whole groups.
        out_index: (B, n_out) or None. gain: (B, n_out) or None, multiplied on the output.
        residual: (B, n_out, H', W') or None, added after the gain.
        Returns (B, n_out, H', W').
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...] | str,
                 dilation: tuple[int, ...], groups: int, whole_groups: bool = True,
                 native: bool = False, winograd: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.winograd = winograd
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.whole_groups = whole_groups and groups != 1
        self.kernel_size = tuple(weight.shape[2:])
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, self.kernel_size, strict=True)]
            padding = padding if any(t % 2 for t in total) else tuple(t // 2 for t in total)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.native = native and not isinstance(padding, str)
        self.activation, self.subsample, self.inplace = "", False, False

    def forward(self, x: Tensor, in_index: Tensor | None = None, out_index: Tensor | None = None,
                gain: Tensor | None = None, residual: Tensor | None = None) -> Any:  # fmt: skip
        if self.native and fits(x) and self.weight.dtype in (torch.float32, torch.bfloat16):
            rest = (
                self.stride, self.padding, self.dilation, self.groups, self.whole_groups, self.activation,
                self.subsample, self.winograd,
            )  # fmt: skip
            if self.inplace and residual is not None:
                y, s = residual, torch.ops.gatedprune.conv2d_into(
                    x, self.weight, self.bias, in_index, out_index, gain, residual, *rest)  # fmt: skip
            else:
                y, s = torch.ops.gatedprune.conv2d(
                    x, self.weight, self.bias, in_index, out_index, gain, residual, *rest)  # fmt: skip
            return (y, s) if self.subsample else y
        groups = x.shape[1] // self.weight.shape[1] if self.whole_groups else self.groups
        weight = self.weight.to(x.dtype)

        def run(one: Tensor, b: int) -> Tensor:
            w, c = gather_rows(weight, self.bias, in_index, out_index, gain, b, grouped=self.whole_groups)
            return F.conv2d(one, w, c, self.stride, self.padding, self.dilation, groups)

        y = _follow(_per_sample(x, _samples(in_index, out_index), run), residual, self.activation)
        return (y, subsample(y)) if self.subsample else y

    def extra_repr(self) -> str:
        channels = f"{self.in_channels}, {self.out_channels}"
        what = f"{channels}, kernel_size={self.kernel_size}, stride={self.stride}, groups={self.groups}"
        return what + (f", activation={self.activation}" if self.activation else "")


class NarrowLinear(nn.Module):
    """A linear layer over active sets; x is (B, …, n_in), the rest as in `NarrowConv2d`.

    Attributes:
        scale: (1, n_out) or None: a layer scale, multiplied on the output where all of it is there and has no gain.
        x_columns, y_columns: Between two such layers: x is (B, n_in, …), the result (B, n_out, …), as the native
            kernels compute it.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, native: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", None)
        self.native, self.activation = native, ""
        self.x_columns = self.y_columns = False

    def forward(self, x: Tensor, in_index: Tensor | None = None, out_index: Tensor | None = None,
                gain: Tensor | None = None, residual: Tensor | None = None) -> Tensor:  # fmt: skip
        if self.native and fits(x) and self.weight.dtype in (torch.float32, torch.bfloat16):
            factors = gain if self.scale is None else self.scale.expand(_samples(in_index, out_index), -1)
            y: Tensor = torch.ops.gatedprune.linear(
                x, self.weight, self.bias, in_index, out_index, factors, residual, self.activation,
                self.x_columns, self.y_columns,
            )  # fmt: skip
            return y

        def run(one: Tensor, b: int) -> Tensor:
            return F.linear(one, *gather_rows(self.weight.to(x.dtype), self.bias, in_index, out_index, gain, b))

        x = x.movedim(1, -1) if self.x_columns else x
        y = _per_sample(x, _samples(in_index, out_index), run)
        y = _follow(y if self.scale is None else y * self.scale, residual, self.activation)
        return y.movedim(-1, 1) if self.y_columns else y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def _follow(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What a layer takes in: the residual addition and the activation. y may be overwritten."""
    if residual is not None:
        y = y.add_(residual)
    return ACTIVATIONS[activation](y, inplace=True) if activation else y


def gather_rows(
    weight: Tensor,
    bias: Tensor | None,
    in_index: Tensor | None,
    out_index: Tensor | None,
    gain: Tensor | None,
    b: int,
    *,
    grouped: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of sample ``b``: the winners' rows, the active columns, the gain multiplied in."""
    if out_index is not None:
        weight = weight.index_select(0, out_index[b])
        bias = None if bias is None else bias.index_select(0, out_index[b])
    if in_index is not None and not grouped:
        weight = weight.index_select(1, in_index[b])
    if gain is not None:
        g = gain[b].to(weight.dtype)
        weight = weight * g.view(-1, *[1] * (weight.dim() - 1))
        bias = None if bias is None else bias * g
    return weight, bias


class MaxPool2d(nn.Module):
    """Max pooling without dilation; (B, C, H, W) → (B, C, H', W')."""

    def __init__(self, kernel_size: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> None:
        super().__init__()
        self.options = (kernel_size, stride, padding)
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        if fits(x) and x.dim() == 4:
            y: Tensor = torch.ops.gatedprune.max_pool2d(x, *self.options, self.ceil_mode)
            return y
        return F.max_pool2d(x, *self.options, 1, self.ceil_mode)


def global_pool(x: Tensor) -> Tensor:
    """The mean over the pixels; (B, C, H, W) → (B, C)."""
    if fits(x):
        mean: Tensor = torch.ops.gatedprune.subsample(x, 1, True)
        return mean
    return x.mean((2, 3))


class UpsampleBilinear2d(nn.Module):
    """Bilinear interpolation; (B, C, H, W) → (B, C, *size).

    Args:
        size: (H', W').
        factors: (H, W): what the size was multiplied by, if that decides where pixels lie, as in PyTorch.
    """

    def __init__(self, size: list[int], align_corners: bool, factors: list[float] | None) -> None:
        super().__init__()
        self.size, self.align_corners, self.factors = size, align_corners, factors

    def forward(self, x: Tensor) -> Tensor:
        if fits(x):
            y: Tensor = torch.ops.gatedprune.upsample_bilinear2d(x, self.size, self.align_corners, self.factors)
            return y
        scales: Any = self.factors or [None, None]
        z: Tensor = torch.ops.aten.upsample_bilinear2d(x, self.size, self.align_corners, *scales)
        return z


class NarrowAffine(nn.Module):
    """A batch norm in eval mode, x · scale + shift, of the active channels that ``index`` names, and the activation.

    ``activation`` and ``subsample`` as in `NarrowConv2d`.
    """

    def __init__(self, scale: Tensor, shift: Tensor, native: bool = False) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.native, self.activation, self.subsample = native, "", False

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        scale: Tensor = self.scale  # type: ignore[assignment]
        shift: Tensor = self.shift  # type: ignore[assignment]
        if self.native and fits(x) and scale.dtype is torch.float32:
            y, s = torch.ops.gatedprune.affine(x, scale, shift, index, self.activation, self.subsample)
            return (y, s) if self.subsample else y
        if index is None:
            index = torch.arange(len(scale), device=x.device)[None]
        scale, shift = (per_row(v[index], x.shape[0]) for v in (scale, shift))
        view = (*scale.shape, *[1] * (x.dim() - 2))
        y = _follow(torch.addcmul(shift.view(view), x, scale.view(view)), None, self.activation)
        return (y, subsample(y)) if self.subsample else y


class Widen(nn.Module):
    """Back to all channels: suppressed ones are zero. ``dim`` 0: channels that are folded into the batch."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.dim, self.channels = dim, channels

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        if self.dim == 0:
            return self._widen(x.unflatten(0, (-1, index.shape[1])), index, 1).flatten(0, 1)
        return self._widen(x, index, self.dim)

    def _widen(self, x: Tensor, index: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = self.channels
        out, index = x.new_zeros(shape), per_row(index, x.shape[0])
        for b in range(x.shape[0]):
            out[b].index_copy_(dim - 1, index[b], x[b])
        return out


class Take(nn.Module):
    """The active channels of a full tensor, or of a constant that is the same for every sample.

    Args:
        dim: Channel dimension of the result. rank: its number of dimensions; missing leading ones are put in.
    """

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.dim, self.rank = dim, rank

    def forward(self, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """rows: a tensor whose first dimension the result's is to match."""
        x = x[(None,) * (self.rank - x.dim())]
        index = per_row(index, rows.shape[0])
        view, shape = [1] * self.rank, list(x.shape)
        view[0], view[self.dim] = index.shape
        shape[0], shape[self.dim] = index.shape
        return x.expand(index.shape[0], *x.shape[1:]).gather(self.dim, index.view(view).expand(shape))


class AddInto(nn.Module):
    """The residual addition of a narrow branch to the full stream: only the winners' channels are touched.

    ``inplace`` where nobody else needs the stream as it was before.
    """

    def __init__(self, dim: int, inplace: bool) -> None:
        super().__init__()
        self.dim, self.inplace = dim, inplace

    def forward(self, full: Tensor, x: Tensor, index: Tensor) -> Tensor:
        out = full if self.inplace else full.clone()
        index = per_row(index, x.shape[0])
        for b in range(x.shape[0]):
            out[b].index_add_(self.dim - 1, index[b], x[b])
        return out
