"""The mathematics of gating, as pure functions: no modules, no state.

Sources: the monocular-depth paper (doi 10.18280/mmep.090221), equations 4–7, and FBS (arXiv 1810.05331).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError
from .gradients import Gain, Mean, Scale, ScaleNormed, StraightThrough

__all__ = [
    "active_mask",
    "active_set",
    "channel_gain",
    "gain_of",
    "indexed_conv2d",
    "masked_norm",
    "per_row",
    "response_norm",
    "saliency",
    "scale_batch_normed",
    "scale_channels",
    "spread",
    "straight_through",
    "subsample",
    "threshold_set",
    "threshold_winners",
    "where_true",
    "winners",
    "winners_take_all",
]


def subsample(x: Tensor, channel_dim: int = 1, signed: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """s(x), equation 5: the mean of the absolute value over everything but batch and channels.

    Args:
        x: (B, C, H, W), (B, N, C) tokens, (B, C); batch first.
        channel_dim: Which dimension holds the channels.
        signed: The mean of the values as they are.
        dtype: Of the mean; default: x's.

    Returns:
        (B, C).
    """
    dims = [d for d in range(1, x.dim()) if d != channel_dim % x.dim()]
    if dims and x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        mean: Tensor = Mean.apply(x, dims, signed, dtype)
        return mean
    values = x if signed else x.abs()
    if dims:
        return values.mean(dims, dtype=dtype)
    return values if dtype is None else values.to(dtype)


def saliency(s: Tensor, weight: Tensor, bias: Tensor, reduce: Tensor | None = None) -> Tensor:
    """g(x) = relu(s(x)·φ + ρ), equation 6 with FBS's offset.

    Args:
        s: (B, C_in). weight: φ, (C, C_in). bias: ρ, (C,).
        reduce: (r, C_in): φ is the product of ``weight``, then (C, r), and this.

    Returns:
        (B, C), not negative.
    """
    return F.linear(s if reduce is None else F.linear(s, reduce), weight, bias).relu()


def gain_of(g: Tensor, strength: Tensor, start: Tensor, limit: float | None) -> Tensor:
    """The gain 1 + σ·(g − g_start) that each channel has where it wins: not negative, at most ``limit``.

    A σ below 0 counts as 0. Backwards, the upper bound and that of σ block only what would push further beyond them.

    Args:
        g: (B, C). strength: σ, a scalar. start: g_start, (C,). limit: None: unbounded.

    Returns:
        (B, C).
    """
    if torch.is_grad_enabled() and (g.requires_grad or strength.requires_grad):
        gain: Tensor = Gain.apply(g, strength, start, limit)
        return gain
    gain = (1 + strength.clamp(min=0) * (g - start)).relu()
    return gain if limit is None else gain.clamp(max=limit)


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """``value`` forwards; backwards its gradient goes to ``source``, which has the same shape, as if it were that."""
    out: Tensor = StraightThrough.apply(value, source)
    return out


def active_set(g: Tensor, k: int) -> Tensor:
    """Indices of the k largest saliencies of each sample, ascending; ties go to the lower index, so always exactly k.

    Args:
        g: (B, C). k: 1 ≤ k ≤ C.

    Returns:
        (B, k), int64.
    """
    _check_count(g, k)
    if k == g.shape[1]:
        return torch.arange(k, device=g.device).expand(g.shape[0], k)
    return _ranking(g)[:, :k].sort(dim=1).values


def _check_count(g: Tensor, k: int) -> None:
    if not 1 <= k <= g.shape[1]:
        raise ConfigError(f"The number of winners `k` must be in [1, {g.shape[1]}]. Got {k!r}.")


def _ranking(g: Tensor) -> Tensor:
    """(B, C): indices from the largest saliency to the least; topk breaks ties in no stated order, this one does."""
    return torch.sort(g.detach(), dim=1, descending=True, stable=True).indices


def winners(g: Tensor, k: int) -> Tensor:
    """(B, C), bool: True at the k largest saliencies of each sample, `active_set` as a mask."""
    _check_count(g, k)
    if k == g.shape[1]:
        return torch.ones_like(g, dtype=torch.bool)
    return torch.zeros_like(g, dtype=torch.bool).scatter(1, _ranking(g)[:, :k], True)


def threshold_winners(g: Tensor, threshold: Tensor, k: int) -> Tensor:
    """(B, C), bool: `threshold_set` as a mask."""
    places = torch.arange(g.shape[1], device=g.device).expand(g.shape)
    at_least = torch.where(threshold.isinf(), k, 1)
    return (g.detach() > threshold).scatter_reduce(1, _ranking(g), places < at_least, "amax")


def where_true(mask: Tensor) -> Tensor:
    """(B, C), int64: the indices at which a row of the mask (B, C) is True, ascending, and then C."""
    places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.where(mask, places, mask.shape[1]).sort(dim=1).values


def active_mask(active: Tensor, channels: int) -> Tensor:
    """(B, C), bool: True where a channel is in the active set.

    Args:
        active: (B, k); entries that equal C stand for nothing (see `Gate`). channels: C.
    """
    mask = active.new_zeros(active.shape[0], channels + 1, dtype=torch.bool)
    return mask.scatter(1, active, True)[:, :channels]


def threshold_set(g: Tensor, threshold: Tensor, k: int) -> Tensor:
    """Indices of the saliencies above T of each sample, ascending, and then C up to a length of C; equation 4's wta_T.

    Samples have different numbers of winners; C, which is no channel, fills their rows up. The largest saliency always
    wins, the lower index among equals.

    Args:
        g: (B, C). threshold: T, a scalar; infinite: there is none yet, and the k largest win, as in `active_set`.
        k: 1 ≤ k ≤ C.

    Returns:
        (B, C), int64.
    """
    return where_true(threshold_winners(g, threshold, k))


def winners_take_all(g: Tensor, k: int) -> Tensor:
    """wta_k(g), equation 4: the k largest entries stay, the others become zero.

    Args:
        g: (B, C). k: 1 ≤ k ≤ C.

    Returns:
        (B, C).
    """
    return torch.where(winners(g, k), g, 0)


def channel_gain(values: Tensor, active: Tensor, units: Tensor | None, channels: int) -> Tensor:
    """Spread per-winner values over the channels of a tensor; foreign channels get 1.

    Args:
        values: (B, k), one value per winner (the gain, or ones for a plain mask).
        active: (B, k), the active set; values at entries that equal C are passed over.
        units: (n,), the site channel that each of the tensor's n channels belongs to; −1: none of this site's.
            None: channel j is site channel j.
        channels: C of the site.

    Returns:
        (B, n).
    """
    full = values.new_zeros(values.shape[0], channels + 1).scatter(1, active, values)
    if units is None:
        return full[:, :channels]
    full[:, channels] = 1  # index −1, that is the last column, is what foreign channels read
    return full[:, units]


def spread(values: Tensor, units: Tensor | None) -> Tensor:
    """From site channels (B, C) to the n channels of a tensor, (B, n); ``units`` as `channel_gain` takes them."""
    return values if units is None else F.pad(values, (0, 1), value=1)[:, units]


def per_row(values: Tensor, rows: int) -> Tensor:
    """Repeat per-sample rows (B, …) for a tensor whose first dimension holds B·r rows, sample by sample (windows)."""
    return values if values.shape[0] == rows else values.repeat_interleave(rows // values.shape[0], dim=0)


def scale_channels(x: Tensor, gain: Tensor, channel_dim: int, fate: str | None = None) -> Tensor:
    """x · gain along ``channel_dim``, in x's dtype.

    Args:
        x: Its first dimension is B·r: r rows for each sample. gain: (B, n).
        fate: What becomes of the result (`gatedprune.sites.Attach`), and that the gain is not negative: x is not kept
            for the backward pass then.
    """
    view = [1] * x.dim()
    view[0], view[channel_dim] = x.shape[0], gain.shape[1]
    gain = per_row(gain, x.shape[0]).to(x.dtype).view(view)
    if fate is not None and gain.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out: Tensor = Scale.apply(x, gain, fate == "rectified")
        return out
    return x * gain


# Nodes of PyTorch's autograd: each saves the norm's input, its mean and the inverse of its standard deviation.
_BATCH_NORMS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


def scale_batch_normed(y: Tensor, gain: Tensor, bias: Tensor | None, fate: str | None = None) -> Tensor:
    """y · gain for what a batch norm gave in training, without keeping y for the backward pass.

    It follows from the norm's input, which the norm keeps anyway. Where that cannot be had (eval mode, compiled, a y
    that something else has changed, channels last under autocast) `scale_channels` does it.

    Args:
        y: (B, C, …). gain: (B, C). bias: (C,), the norm's; None: it has none.
        fate: As `scale_channels` takes it.

    Returns:
        Of y's shape.
    """
    norm: Any = None if torch.compiler.is_compiling() else y.grad_fn
    if norm is None or norm.name() not in _BATCH_NORMS or not norm._saved_training or gain.shape != y.shape[:2]:
        return scale_channels(y, gain, 1, fate)
    x = norm._saved_input.detach()
    # Products with the types of autocast would have to be written in a wider one, which costs more than it saves.
    if x.dtype != y.dtype or not (x.dtype == gain.dtype or x.dim() == 2 or x.is_contiguous()):
        return scale_channels(y, gain, 1, fate)
    weight = None if norm._saved_weight is None else norm._saved_weight.detach()
    out: Tensor = ScaleNormed.apply(
        y, gain, x, norm._saved_result1, norm._saved_result2, weight,
        None if bias is None else bias.detach(),
    )  # fmt: skip
    return out


def masked_norm(
    x: Tensor,
    mask: Tensor,
    channel_dim: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str = "layer",
) -> Tensor:
    """A norm over channels with the statistics of the active channels only: the others do not exist.

    Args:
        x: (B, …, C, …), the channels along ``channel_dim``. mask: (B, C), one where active.
        weight, bias: (C,) or None.
        kind: "layer" and "rms" take their statistics at each place, "group" over channels and places together (a group
            norm of one group); "response" is `response_norm`.

    Returns:
        Of x's shape; what stands at suppressed channels means nothing.
    """
    view = [1] * x.dim()
    view[channel_dim] = x.shape[channel_dim]
    keep = per_row(mask, x.shape[0]).to(x.dtype).view(x.shape[0], *view[1:])
    if kind == "response":
        return response_norm(x, weight, bias, eps, channel_dim, keep)
    spatial, centred = kind == "group", kind != "rms"
    dims = list(range(1, x.dim())) if spatial else [channel_dim % x.dim()]
    places = x[0].numel() // x.shape[channel_dim] if spatial else 1
    count = keep.sum(dims, keepdim=True) * places
    y = x - (x * keep).sum(dims, keepdim=True) / count if centred else x
    y = y * ((y.square() * keep).sum(dims, keepdim=True) / count + eps).rsqrt()
    y = y if weight is None else y * weight.view(view)
    return y if bias is None else y + bias.view(view)


def response_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, channel_dim: int, keep: Tensor | None = None
) -> Tensor:
    """Global response norm (ConvNeXt V2, arXiv 2301.00808, algorithm 1): x + weight · x · r + bias.

    r is the channel's norm over places, divided by the mean of these norms over channels (+ ε).

    Args:
        x: (B, …, C, …), the channels along ``channel_dim``.
        weight, bias: (C,), of each sample (B, C), or None: one and zero.
        keep: Broadcasts against x: one at the channels that the mean is taken over, zero elsewhere. None: all.

    Returns:
        Of x's shape.
    """
    dim = channel_dim % x.dim()
    size = torch.linalg.vector_norm(x, 2, [d for d in range(1, x.dim()) if d != dim], keepdim=True)
    if keep is None:
        mean = size.mean(dim, keepdim=True)
    else:
        mean = (size * keep).sum(dim, keepdim=True) / keep.sum(dim, keepdim=True)
    y = x * (size / (mean + eps))
    view = [1] * x.dim()
    view[dim] = x.shape[dim]
    if weight is not None:
        y = y * weight.view([*weight.shape[:-1], *view[1:]] if weight.dim() > 1 else view)
    if bias is not None:
        y = y + bias.view([*bias.shape[:-1], *view[1:]] if bias.dim() > 1 else view)
    return x + y


def indexed_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_active: Tensor | None, out_active: Tensor | None,
    gain: Tensor | None = None, stride: tuple[int, int] = (1, 1), padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:  # fmt: skip
    """The readable reference of a convolution over active sets: gather each sample's weights, then convolve.

    Args:
        x: (B, k_in, H, W), only the active input channels. weight: (C_out, C_in, kh, kw). bias: (C_out,) or None.
        in_active: (B, k_in) or None for all. out_active: (B, k_out) or None for all.
        gain: (B, k_out) or None, multiplied on the output.

    Returns:
        (B, k_out, H', W'): row r of sample b is output channel ``out_active[b, r]`` of the full convolution.
    """
    rows = []
    for b in range(x.shape[0]):
        w, c = weight, bias
        if out_active is not None:
            w, c = w[out_active[b]], None if c is None else c[out_active[b]]
        if in_active is not None:
            w = w[:, in_active[b]]
        y = F.conv2d(x[b : b + 1], w, c, stride, padding, dilation)
        rows.append(y if gain is None else y * gain[b][None, :, None, None])
    if rows:
        return torch.cat(rows)
    one = F.conv2d(x.new_zeros(1, weight.shape[1], *x.shape[2:]), weight, None, stride, padding, dilation)
    return one.new_zeros(0, weight.shape[0] if out_active is None else out_active.shape[1], *one.shape[2:])
