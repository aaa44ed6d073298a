"""The saliency predictor and the gate: which channels of a site are computed for each input, and their gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    active_set,
    gain_of,
    saliency,
    straight_through,
    subsample,
    threshold_set,
    threshold_winners,
    where_true,
    winners,
)

__all__ = ["Gate"]

# What a loser is multiplied by while losers learn (`straight_through`): a rectifier passes no gradient at 0, but does
# at 2^-100 of a value, which vanishes in every sum with ordinary numbers.
WHISPER = 2.0**-100


class Gate(nn.Module):
    """A winner-takes-all gate in front of one site of C channels (equations 4–6; FBS, arXiv 1810.05331).

    From what enters the site's first producer it predicts one saliency per channel, ``g = relu(s(x)·φ + ρ)``, and
    selects the k largest. A winner's gain is ``relu(1 + σ·(g − g_start))`` with g_start the saliency before training:
    exactly 1 at first, whatever the ranking, and moving with g from there. (FBS starts ρ at 1 and multiplies by g,
    which is the same thing where every channel ranks equal.)

    The strength σ is 1 before calibration, where g is g_start for every input. Calibration lets g vary with the input
    and sets σ to 0, so that the gain is still exactly 1; training may raise σ, which gets a gradient at 0 too. A σ
    below 0 counts as 0: it would turn a layer's best channels off, and an optimiser that wants smaller activations
    gets there within a few steps and does not come back.

    The gain is at most ``max_gain``: gains multiply from layer to layer, and a network whose gains feed each other's
    saliencies ends in NaN. At the bound, gradients that lead back still pass.

    With ``kind="threshold"`` a channel wins where its saliency exceeds T, the buffer ``threshold``, and samples have
    different numbers of winners, k on average once `gatedprune.training.fit_thresholds` has set T. Before that T is
    infinite, and the k largest win. Active sets are then (B, C): a sample's winners, ascending, and C, which is no
    channel, in the places that are left.

    Args:
        channels: C, the channels (units) of the site.
        in_channels: C_in, the channels of the tensor that the gate looks at.
        active_count: k.
        importance: (C,), positive; the ranking before training: becomes ρ. Default: ones.
        channel_dim: The channel dimension of the input.
        boost: Multiply winners by the gain; False gates with 0/1.
        signed: s(x) is the mean of the values as they are, not of their absolute values.
        max_gain: No gain is larger, at least 1; None: unbounded.
        straight_through: In training, losers' saliencies get the gradient that they would have as winners. What the
            model computes stays the same.
        kind: "topk": the k largest win; "threshold": those above T.
        rank: r; None: φ is one matrix.

    φ is the parameter ``weight``, (C, C_in), or with a rank the product of ``weight``, (C, r), and ``reduce``,
    (r, C_in): a squeeze between what the gate sees and the channels, which takes a fraction of the numbers.
    ``weight`` starts at zero either way, and ``reduce`` with r directions at right angles, the same in every gate.
    """

    weight: Tensor
    reduce: Tensor | None
    bias: Tensor
    start: Tensor
    strength: Tensor
    threshold: Tensor | None

    def __init__(self, channels: int, in_channels: int, active_count: int, *, importance: Tensor | None = None,
                 channel_dim: int = 1, boost: bool = True, signed: bool = False, max_gain: float | None = None,
                 straight_through: bool = False, kind: str = "topk", rank: int | None = None, device=None,
                 dtype=None) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.in_channels = channels, in_channels
        self._active_count, self.channel_dim, self.boost, self.signed = active_count, channel_dim, boost, signed
        self.max_gain, self.straight_through, self.kind = max_gain, straight_through, kind
        self.rank = rank
        self.weight = nn.Parameter(torch.zeros(channels, rank or in_channels, device=device, dtype=dtype))
        self.register_parameter("reduce", None)
        if rank is not None:
            self.reduce = nn.Parameter(_directions(rank, in_channels).to(device, self.weight.dtype))
        rho = torch.ones(channels, device=device, dtype=dtype)
        if importance is not None:
            rho.copy_(importance)
        self.bias = nn.Parameter(rho)
        self.register_buffer("start", rho.clone())
        self.strength = nn.Parameter(torch.ones((), device=device, dtype=dtype), requires_grad=boost)
        has_threshold = kind == "threshold"
        self.register_buffer("threshold", rho.new_full((), float("inf")) if has_threshold else None)
        self.clear()

    def clear(self) -> None:
        """Forget what the last forward pass selected."""
        self.last_wins: Tensor | None = None
        self.last_gains: Tensor | None = None
        self.last_saliency: Tensor | None = None
        self.last_whole: Tensor | None = None

    @property
    def last_active(self) -> Tensor | None:
        """The active set that the last forward pass chose, (B, k)."""
        if self.last_wins is None:
            return None
        active = where_true(self.last_wins)
        return active if self.varies or not len(active) else active[:, : int(self.last_wins[0].sum())]

    @property
    def last_gain(self) -> Tensor | None:
        """The gain of each of `last_active`, (B, k)."""
        if self.last_gains is None or (active := self.last_active) is None:
            return None
        return self.last_gains.gather(1, active.clamp_max(self.channels - 1))

    @property
    def active_count(self) -> int:
        """k; on average, with a threshold. Setting another k forgets T, which belonged to the old one."""
        return self._active_count

    @active_count.setter
    def active_count(self, count: int) -> None:
        if count != self._active_count:
            self.forget_threshold()
        self._active_count = count

    @property
    def predictor(self) -> Tensor:
        """φ, (C, C_in), as one matrix; without a gradient."""
        weight = self.weight.detach()
        return weight if self.reduce is None else weight @ self.reduce.detach()

    @torch.no_grad()
    def reset_predictor(self) -> None:
        """Back to the start: φ = 0."""
        self.weight.zero_()
        if self.reduce is not None:  # not zero as well: training could not begin
            self.reduce.copy_(_directions(*self.reduce.shape))

    @torch.no_grad()
    def set_predictor(self, phi: Tensor, seen: Tensor | None = None) -> None:
        """Predict by φ (C, C_in); with a rank, by the matrix of that rank that is nearest to it.

        Args:
            phi: φ. seen: (C_in, n): nearest is the one whose saliencies for these columns are, in least squares, such
                as the root of the covariance of what the gate sees. Default: the nearest in its entries.
        """
        if self.reduce is None:
            self.weight.copy_(phi)
        elif not phi.any():
            self.reset_predictor()
        else:
            phi = phi.double()
            basis = torch.linalg.svd(phi if seen is None else phi @ seen.to(phi), full_matrices=False).U
            basis = F.pad(basis, (0, max(0, self.weight.shape[1] - basis.shape[1])))[:, : self.weight.shape[1]]
            self.weight.copy_(basis)
            self.reduce.copy_(basis.T @ phi)

    @property
    def ratio(self) -> float:
        """Share of the channels that is suppressed; on average, with a threshold."""
        return 1 - self.active_count / self.channels

    @property
    def varies(self) -> bool:
        """Whether samples may have different numbers of winners."""
        return self.kind == "threshold"

    def forget_threshold(self) -> None:
        """Back to the k largest: T was fitted for other saliencies, or another k."""
        if self.threshold is not None:
            self.threshold.fill_(float("inf"))

    def select(self, s: Tensor, choose: Callable[[Tensor, int], Tensor] = active_set) -> tuple[Tensor, Tensor, Tensor]:
        """From the subsampled input s (B, C_in): active set (B, k), gain of the winners (B, k), saliency (B, C).

        With a threshold active set and gain are (B, C), see the class.

        Args:
            choose: Computes what `active_set` does, by other operators; not used with a threshold.
        """
        g = self._saliency(s)
        if self.varies:
            assert self.threshold is not None
            active = threshold_set(g, self.threshold, self.active_count)
        else:
            active = choose(g, self.active_count)
        if self.boost:
            at = active.clamp_max(self.channels - 1) if self.varies else active
            gain = self._gains(g).gather(1, at)
        else:
            gain = torch.ones_like(active, dtype=g.dtype)
        return active, gain, g

    def forward(self, x: Tensor) -> Tensor:
        """Select channels for x, (B, C_in, H, W) or tokens; remember the choice; return who wins, (B, C), bool."""
        # Under autocast x has few bits, and rounded saliencies tie: the lower indices would win.
        s = subsample(x, self.channel_dim, self.signed, None if x.dtype == self.weight.dtype else self.weight.dtype)
        g = self._saliency(s)
        if self.threshold is not None:
            wins = threshold_winners(g, self.threshold, self.active_count)
        else:
            wins = winners(g, self.active_count)
        self.last_saliency, self.last_wins = g, wins
        self.last_gains = self._gains(g) if self.boost else torch.ones_like(g)
        learning = self.straight_through and self.training and torch.is_grad_enabled()
        self.last_whole = self._whole(wins, self.last_gains, g) if learning else None
        return wins

    def _saliency(self, s: Tensor) -> Tensor:
        if torch.is_autocast_enabled(s.device.type):
            with torch.autocast(s.device.type, enabled=False):
                return saliency(s, self.weight, self.bias, self.reduce)
        return saliency(s, self.weight, self.bias, self.reduce)

    def _gains(self, g: Tensor) -> Tensor:
        """(B, C): the gain that each channel has where it wins."""
        return gain_of(g, self.strength, self.start, self.max_gain)

    def _whole(self, wins: Tensor, gains: Tensor, g: Tensor) -> Tensor:
        """(B, C): winners' gains, and next to nothing for losers; the gradient reaches both alike."""
        return straight_through(torch.where(wins, gains.detach(), WHISPER), gains if self.boost else g)

    def __getstate__(self) -> dict:
        # What a forward pass left behind is no part of the model, and non-leaf tensors cannot be copied.
        state = self.__dict__.copy()
        state.update(last_wins=None, last_gains=None, last_saliency=None, last_whole=None)
        return state

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, in_channels={self.in_channels}, active={self.active_count}, boost={self.boost}"
            + (", kind=threshold" if self.varies else "")
            + (f", rank={self.rank}" if self.rank else "")
        )


def _directions(rank: int, channels: int) -> Tensor:
    """(r, C_in): rows at right angles, which keep the size of a vector on average; float64, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=generator, dtype=torch.float64)).Q
    return basis.T * (channels / rank) ** 0.5
