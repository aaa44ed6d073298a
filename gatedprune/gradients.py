"""Operators whose gradient is written by hand: with less memory, fewer passes, or another gradient than autograd's.

`gatedprune.functional` says what they compute, and when they are used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["Gain", "Mean", "Scale", "ScaleNormed", "StraightThrough"]


def _rectified(x: Tensor) -> bool:
    """Whether a rectifier wrote x: then |x| is x, and where x is 0 no gradient gets through."""
    return x.grad_fn is not None and x.grad_fn.name() == "ReluBackward0"


class Mean(torch.autograd.Function):
    """The mean of x, or of |x|, whose gradient is not written out for every place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], signed: bool, dtype: torch.dtype | None) -> Tensor:
        ctx.dims, ctx.shape, ctx.dtype = dims, x.shape, x.dtype
        ctx.as_it_is = signed or _rectified(x)
        if not signed:
            # A rectifier's, too: checkpointing runs this again on an x that nothing wrote, and wants the same tensors.
            ctx.save_for_backward(x)
        return (x if ctx.as_it_is else x.abs()).mean(dims, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        each = (gradients[0] / math.prod(ctx.shape[d] for d in ctx.dims)).to(ctx.dtype)
        for d in ctx.dims:
            each = each.unsqueeze(d)
        return each.expand(ctx.shape) if ctx.as_it_is else ctx.saved_tensors[0].sgn() * each, None, None, None


class Gain(torch.autograd.Function):
    """1 + max(σ, 0) · (g − g_start), in [0, limit].

    At the limit, and at σ = 0, the gradient passes but where descent would push further beyond it. Plain clamping
    blocks both directions, and what once went beyond would hear nothing from the loss any more.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, strength: Tensor, start: Tensor, limit: float | None) -> Tensor:
        moved = g - start
        gain = (moved * strength.clamp(min=0)).add_(1).clamp_(0, limit)
        ctx.save_for_backward(moved, strength, gain)
        ctx.limit = limit
        return gain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (moved, strength, gain), (gradient,) = ctx.saved_tensors, gradients  # descent adds −gradient
        if ctx.limit is not None:
            gradient = torch.where(gain < ctx.limit, gradient, gradient.clamp(min=0))
        gradient = torch.ops.aten.threshold_backward(gradient, gain, 0)
        to_strength = (gradient * moved).sum()
        to_strength = torch.where(strength > 0, to_strength, to_strength.clamp(max=0))
        return gradient * strength.clamp(min=0), to_strength, None, None


class StraightThrough(torch.autograd.Function):
    """The first argument; its gradient goes to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def _over_places(gradient: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Σ gradient · (x − mean) · inverse and Σ gradient over all places, (B, C) both; mean and inverse are (C,)."""
    batch, channels = x.shape[:2]
    if x.dim() == 2 or x.is_contiguous():
        # What a batch norm of one sample with B·C channels needs backwards: one pass, and no product is written.
        shape = 1, batch * channels, *x.shape[2:]
        mean, inverse = mean.repeat(batch), inverse.repeat(batch)
        norm = inverse, None, None, mean, inverse, True, 0  # as weight `inverse` stands for any: it tells the type
        _, scaled, total = torch.ops.aten.native_batch_norm_backward(
            gradient.reshape(shape), x.reshape(shape), *norm, [False, True, True]
        )
        return scaled.view(batch, channels), total.view(batch, channels)
    places = list(range(2, x.dim()))
    total = gradient.sum(places)
    return torch.addcmul((gradient * x).sum(places), mean, total, value=-1) * inverse, total


class Scale(torch.autograd.Function):
    """x · gain; gain, which broadcasts, is not negative.

    Backwards it takes Σ gradient · x from the product, which what reads it keeps anyway, so that x is not kept. Where
    the gain is 0 it gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, rectified: bool) -> Tensor:
        product = x * gain
        # A rectifier that writes over it changes only what gets no gradient: not asked whether it was changed.
        ctx.save_for_backward(product.data if rectified else product, gain)
        return product

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (product, gain), (gradient,) = ctx.saved_tensors, gradients
        to_gain = None
        if ctx.needs_input_grad[1]:
            to_gain = (gradient * product).sum_to_size(gain.shape) / gain.masked_fill(gain == 0, 1)
        return gradient * gain, to_gain, None


def _per_channel(gain: Tensor, x: Tensor) -> Tensor:
    return gain.to(x.dtype).view(*gain.shape, *[1] * (x.dim() - 2))


class ScaleNormed(torch.autograd.Function):
    """y · gain, (B, C, …) and (B, C), of a norm's y = (x − mean) · inverse · weight + bias, which is not kept."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, *norm: Tensor | None) -> Tensor:
        ctx.save_for_backward(gain, *norm)
        return y * _per_channel(gain, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gain, x, mean, inverse, weight, bias), (gradient,) = ctx.saved_tensors, gradients
        to_gain = None
        if ctx.needs_input_grad[1]:  # Σ gradient · y
            to_gain, total = _over_places(gradient, x, mean, inverse)
            to_gain = to_gain if weight is None else to_gain * weight
            to_gain = to_gain if bias is None else torch.addcmul(to_gain, bias, total)
            to_gain = to_gain.to(gain.dtype)
        return gradient * _per_channel(gain, gradient), to_gain, None, None, None, None, None
