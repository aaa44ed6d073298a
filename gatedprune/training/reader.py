"""A layer that reads a site: what the layer's output loses with each of the site's channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import channel_gain, scale_channels
from ..sites import Edge
from .matching import match, moments_of

__all__ = ["Reader", "squared_weights"]


def squared_weights(module: nn.Module, edge: Edge) -> Tensor | None:
    """Squared weights, summed over taps, by group, output and input channel: (G, O, I), float64.

    The inputs of group g are the edge's channels g·I to (g + 1)·I − 1. None where the module has no weights to see.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    w = weight.detach().double()
    w = w.flatten(2).square().sum(2) if w.dim() > 2 else w.square()
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # (C_in, C_out/groups)
        w = w.view(groups, -1, w.shape[1]).transpose(1, 2)
    else:  # (C_out, C_in/groups)
        w = w.view(groups, -1, w.shape[1])
    return w if groups * w.shape[2] == len(edge.units) else None


class Reader:
    """A convolution or linear layer that reads a site.

    Args:
        module: The layer. edge: how it hangs on the site. channels: C of the site.
        norm: The batch norm behind it, whose scale tells what an output channel counts; None: all count the same.
        matched: The norm is matched to what is left of the layer's output.
    """

    def __init__(
        self, module: nn.Module, edge: Edge, channels: int, norm: nn.Module | None, matched: bool = True
    ) -> None:
        squares = squared_weights(module, edge)
        if squares is None:
            raise ValueError(f"{edge.path} has no weights that can be seen")
        self.module, self.channels, self.norm, self.squares = module, channels, norm, squares
        self.matched = matched and norm is not None
        self.dim = 1 if edge.op.startswith("conv") else -1
        self.units = edge.units

    def costs(self, x: Tensor, active: Tensor | None, samples: int) -> Tensor:
        """What it costs to suppress each channel rather than keep it: change of the squared error of the output.

        The error is that of the layer's output, on this input, with the channels of ``active`` alone: its mean over
        places, summed over output channels in units of the norm behind. Where a norm is matched, the output is
        brought to the whole layer's mean and variance first. With all channels active, the cost of the first to go is
        its squared activation times the squared weights that read it.

        Args:
            x: The layer's input in the dense model. active: (B, k), or None for all. samples: B; rows of x may be
                more (windows).

        Returns:
            (B, C), float64; may be negative: the error shrinks with that channel gone.
        """
        counts = self._counts()
        wide = torch.promote_types(x.dtype, torch.float32)
        energy = self._by_channel(x.to(wide).square(), samples, mean=True)
        if active is None:
            return self._by_unit(energy * self._norms(counts))
        mask = channel_gain(x.new_ones(active.shape), active, self.units.to(x.device), self.channels)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone()
            z = scale_channels(x, mask.clone(), self.dim % x.dim()).detach().requires_grad_()
            out = self._run(z)
            error, scale = self._error(out.detach(), self._run(x).detach())
            weighted = error * self._view((counts * scale).to(error), error)
            (back,) = torch.autograd.grad(out, z, weighted.to(out.dtype))
        places = out.numel() // (out.shape[0] * len(counts))
        cross = self._by_channel(back.to(wide) * x.to(wide), samples, mean=False) / places
        alone = energy * self._norms(counts * scale.square())
        return self._by_unit(alone * (2 * mask.double() - 1) - 2 * cross)

    def _run(self, x: Tensor) -> Tensor:
        layer: Any = self.module
        return type(layer).forward(layer, x)  # not through __call__: no hooks

    def _counts(self) -> Tensor:
        """How much the square of each output channel counts, (C_out,)."""
        norm: Any = self.norm
        if norm is None:
            groups, outputs, _ = self.squares.shape
            return self.squares.new_ones(groups * outputs)
        counts = 1 / (norm.running_var.double() + norm.eps)
        return counts if norm.weight is None else counts * norm.weight.detach().double().square()

    def _norms(self, counts: Tensor) -> Tensor:
        """Squared norms of the weights that read each channel, weighted by output, (n,)."""
        squares = self.squares.to(counts.device)
        return torch.einsum("goi,go->gi", squares, counts.view(squares.shape[:2])).flatten()

    def _error(self, out: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """The error of the output, and the scale that matching multiplies each channel by, (C_out,)."""
        if not self.matched:
            return out - whole, self.squares.new_ones(out.shape[self.dim], device=out.device)
        scale, shift = match(moments_of(out), moments_of(whole))
        return out * self._view(scale.to(out), out) + self._view(shift.to(out), out) - whole, scale

    def _view(self, values: Tensor, like: Tensor) -> Tensor:
        view = [1] * like.dim()
        view[self.dim] = -1
        return values.view(view)

    def _by_channel(self, x: Tensor, samples: int, *, mean: bool) -> Tensor:
        """Mean or sum over places of x, and mean over the rows of a sample: (B, n), float64."""
        dims = [d for d in range(1, x.dim()) if d != self.dim % x.dim()]
        if dims:
            x = x.mean(dims) if mean else x.sum(dims)
        return x.double().view(samples, -1, x.shape[1]).mean(1)

    def _by_unit(self, values: Tensor) -> Tensor:
        return sum_by_unit(values, self.units, self.channels)


def sum_by_unit(values: Tensor, units: Tensor | None, channels: int) -> Tensor:
    """Sums over the channels of each unit: (B, n) → (B, C). Channels of other sites have unit −1."""
    if units is None:
        return values
    spread = values.new_zeros(len(values), channels + 1)  # the spare last place takes what is not this site's
    return spread.index_add_(1, units.to(values.device) % (channels + 1), values)[:, :channels]
