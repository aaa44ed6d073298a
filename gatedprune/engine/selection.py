"""What is active, sample by sample: a gate's choice, and the channels and gains of a tensor that follow from it.

Indices are (B, n), ascending, as everywhere in the engine (see `narrow`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import active_set, channel_gain, subsample
from ..gates import Gate

__all__ = ["ChannelGain", "ChannelIndex", "Selector", "fits"]


def fits(x: Tensor) -> bool:
    """Whether the native backend computes on such a tensor."""
    return x.dtype is torch.float32 and x.device.type == "cpu"


class Selector(nn.Module):
    """The predictor and winner-takes-all of one site: (B, C_in, …) → active set (B, k) and gain (B, k).

    The input may be narrow: then ``index`` (B, n) says which of the C_in channels it holds, and the others count as
    zero, as they are in the masked model.
    ``subsampled``: the input is s(x) already, (B, C_in) or (B, n), which the layer before has computed by the way.
    ``shared``: one active set and gain (1, k) for the batch, from the mean saliency, that is (up to the rectifier,
    which is applied last) from the mean of s.
    """

    def __init__(self, gate: Gate, native: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.gate, self.native, self.shared = gate, native, shared
        self.subsampled = False
        self.last_active: Tensor | None = None

    def forward(self, x: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        active, gain = self.choose(x, index)
        self.last_active = active
        return active, gain

    def choose(self, x: Tensor, index: Tensor | None = None, winners: Any = active_set) -> tuple[Tensor, Tensor]:
        """`forward` without a memory of what it chose; ``winners`` as in `Gate.select`."""
        gate = self.gate
        native = self.native and fits(x) and gate.weight.dtype is torch.float32
        dim: int | None = None
        if self.subsampled:
            s = x
        elif native and x.dim() > 2 and gate.channel_dim % x.dim() in (1, x.dim() - 1):
            dim = gate.channel_dim % x.dim()
            if self.shared or gate.varies or gate.signed:
                s, dim = torch.ops.gatedprune.subsample(x, dim, gate.signed), None
            else:
                s = x  # all in one operator
        else:
            s = subsample(x, gate.channel_dim, gate.signed)
        if self.shared:
            s = s.mean(0, keepdim=True)
        if native and not gate.varies:
            active, gain = torch.ops.gatedprune.gate(
                s,
                gate.weight,
                gate.bias,
                gate.start,
                gate.strength,
                index,
                gate.active_count,
                gate.boost,
                gate.max_gain,
                dim,
                gate.reduce,
            )
        else:
            if index is not None:
                s = s.new_zeros(s.shape[0], gate.in_channels).scatter(1, index, s)
            active, gain, _ = gate.select(s, winners)
            if gate.varies:
                # Of one sample, or one for the batch: what fills its row up is cut off.
                assert len(active) == 1, "samples with active sets of their own lengths go through one by one"
                count = int((active < gate.channels).sum(1).max())
                active, gain = active[:, :count], gain[:, :count]
        return active, gain


class ChannelIndex(nn.Module):
    """From active sets of sites to the active channels of one tensor whose channels belong to them.

    Args:
        tables: One (C, m) per site: the m channels of the tensor that belong to each of the site's C units.
        fixed: Channels that belong to no gated site: always there.
        channels: Of the tensor.
    """

    def __init__(self, tables: list[Tensor], fixed: Tensor, channels: int, native: bool = False) -> None:
        super().__init__()
        self.channels, self.native = channels, native
        for i, table in enumerate(tables):
            self.register_buffer(f"table{i}", table)
        self.register_buffer("fixed", fixed)

    def forward(self, *active: Tensor) -> Tensor:
        if self.native and active[0].device.type == "cpu":
            tables = [getattr(self, f"table{i}") for i in range(len(active))]
            index: Tensor = torch.ops.gatedprune.channel_index(tables, self.fixed, active, self.channels)
            return index
        parts = [getattr(self, f"table{i}")[a].flatten(1) for i, a in enumerate(active)]
        fixed: Tensor = self.fixed  # type: ignore[assignment]
        if fixed.numel():
            parts.append(fixed.expand(active[0].shape[0], -1))
        return torch.cat(parts, 1).sort(dim=1).values


class ChannelGain(nn.Module):
    """Gain per channel of a tensor, (B, n): full, or of the channels that ``index`` names."""

    def __init__(self, units: list[Tensor], channels: list[int], native: bool = False) -> None:
        super().__init__()
        self.channels, self.native = channels, native
        for i, u in enumerate(units):
            self.register_buffer(f"units{i}", u)

    def forward(self, index: Tensor | None, *selections: Tensor) -> Tensor:
        """``selections``: active set and gain of each site in turn."""
        if self.native and all(fits(gain) for gain in selections[1::2]):
            units = [getattr(self, f"units{i}") for i in range(len(self.channels))]
            found: Tensor = torch.ops.gatedprune.channel_gain(
                units, selections[::2], selections[1::2], self.channels, index
            )
            return found
        out = None
        for i, channels in enumerate(self.channels):
            active, gain = selections[2 * i], selections[2 * i + 1]
            one = channel_gain(gain, active, getattr(self, f"units{i}"), channels)
            out = one if out is None else out * one
        assert out is not None
        return out if index is None else out.gather(1, index)
