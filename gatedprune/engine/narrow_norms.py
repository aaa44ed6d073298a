"""Norms over active channels (see `narrow`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import masked_norm, per_row, response_norm

__all__ = ["MaskedNorm", "NarrowGroupNorm", "NarrowLayerNorm", "NarrowResponseNorm"]


class NarrowGroupNorm(nn.Module):
    """A group norm over the active groups of ``size`` channels each; weight and bias are (C,) or None."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        # One group of all channels: its statistics are the active ones'.
        y = F.group_norm(x, max(1, x.shape[1] // self.size), eps=self.eps)
        view = (x.shape[0], x.shape[1], *[1] * (x.dim() - 2))
        if self.weight is not None:
            y.mul_(per_row(self.weight[index], x.shape[0]).view(view))
        if self.bias is not None:
            y.add_(per_row(self.bias[index], x.shape[0]).view(view))
        return y


class NarrowLayerNorm(nn.Module):
    """A layer or RMS norm over the last dimension, with the statistics of the active channels; weight, bias: (C,)."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool) -> None:
        super().__init__()
        self.eps, self.centred = eps, centred
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) if self.centred else F.rms_norm(x, x.shape[-1:], eps=self.eps)
        view = (x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])
        if self.weight is not None:
            y = y * per_row(self.weight[index], x.shape[0]).view(view)
        if self.bias is not None:
            y = y + per_row(self.bias[index], x.shape[0]).view(view)
        return y


class NarrowResponseNorm(nn.Module):
    """A global response norm along ``dim``, its mean that of the active channels; weight, bias: (C,) or None."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float, dim: int) -> None:
        super().__init__()
        self.eps, self.dim = eps, dim
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        weight, bias = (None if v is None else per_row(v[index], x.shape[0]) for v in (self.weight, self.bias))
        return response_norm(x, weight, bias, self.eps, self.dim)


class MaskedNorm(nn.Module):
    """The same on a full tensor, where it could not be kept narrow."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, dim: int, eps: float, kind: str) -> None:
        super().__init__()
        self.dim, self.eps, self.kind = dim, eps, kind
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return masked_norm(x, mask, self.dim, self.weight, self.bias, self.eps, self.kind)
