"""The saliency predictor and the gate: which channels of a site are computed for each input, and their gain."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import active_set, saliency, subsample

__all__ = ["Gate"]


class Gate(nn.Module):
    """A winner-takes-all gate in front of one site of C channels (equations 4–6; FBS, arXiv 1810.05331).

    From what enters the site's first producer it predicts one saliency per channel, ``g = relu(s(x)·φ + ρ)``, and
    selects the k largest. A winner's gain is ``relu(1 + σ·(g − g_start))`` with g_start the saliency before training:
    exactly 1 at first, whatever the ranking, and moving with g from there. (FBS starts ρ at 1 and multiplies by g,
    which is the same thing where every channel ranks equal.)

    The strength σ is 1 before calibration, where g is g_start for every input. Calibration lets g vary with the input
    and sets σ to 0, so that the gain is still exactly 1; training may raise σ, which gets a gradient at 0 too.

    Args:
        channels: C, the channels (units) of the site.
        in_channels: C_in, the channels of the tensor that the gate looks at.
        active_count: k.
        importance: (C,), positive; the ranking before training: becomes ρ. Default: ones.
        channel_dim: The channel dimension of the input.
        boost: Multiply winners by the gain; False gates with 0/1.
        signed: s(x) is the mean of the values as they are, not of their absolute values.
    """

    weight: Tensor
    bias: Tensor
    start: Tensor
    strength: Tensor

    def __init__(self, channels: int, in_channels: int, active_count: int, *, importance: Tensor | None = None,
                 channel_dim: int = 1, boost: bool = True, signed: bool = False,
                 device=None, dtype=None) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.in_channels = channels, in_channels
        self.active_count, self.channel_dim, self.boost, self.signed = active_count, channel_dim, boost, signed
        self.weight = nn.Parameter(torch.zeros(channels, in_channels, device=device, dtype=dtype))
        rho = torch.ones(channels, device=device, dtype=dtype)
        if importance is not None:
            rho.copy_(importance)
        self.bias = nn.Parameter(rho)
        self.register_buffer("start", rho.clone())
        self.strength = nn.Parameter(torch.ones((), device=device, dtype=dtype))
        self.clear()

    def clear(self) -> None:
        """Forget what the last forward pass selected."""
        self.last_active: Tensor | None = None
        self.last_gain: Tensor | None = None
        self.last_saliency: Tensor | None = None

    @property
    def ratio(self) -> float:
        """Share of the channels that is suppressed."""
        return 1 - self.active_count / self.channels

    def select(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the subsampled input s (B, C_in): active set (B, k), gain of the winners (B, k), saliency (B, C)."""
        g = saliency(s, self.weight, self.bias)
        active = active_set(g, self.active_count)
        if self.boost:
            gain = (1 + self.strength * (g - self.start)).relu().gather(1, active)
        else:
            gain = torch.ones_like(active, dtype=g.dtype)
        return active, gain, g

    def forward(self, x: Tensor) -> Tensor:
        """Select channels for x, (B, C_in, H, W) or tokens; remember the choice; return the active set (B, k)."""
        s = subsample(x, self.channel_dim, self.signed)
        self.last_active, self.last_gain, self.last_saliency = self.select(s)
        return self.last_active

    def __getstate__(self) -> dict:
        # What a forward pass left behind is no part of the model, and non-leaf tensors cannot be copied.
        state = self.__dict__.copy()
        state.update(last_active=None, last_gain=None, last_saliency=None)
        return state

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, in_channels={self.in_channels}, active={self.active_count}, boost={self.boost}"
        )
