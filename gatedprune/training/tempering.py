"""How far the choice by image may go: one share of all predictors, by outputs for samples that they have not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..gates import Gate
from .oracle import choosing
from .passes import Passes
from .ridge import Ridge

__all__ = ["SHARES", "LeftOut", "temper"]

# What predictors are multiplied by; beside the best static choice, share 0.
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)


@dataclass(frozen=True)
class LeftOut:
    """One gate's saliencies for samples by predictors that their own fold had no part in.

    Attributes:
        phi: (K, C, C_in). start: (K, C), mean saliencies. center: (K, C_in), means of what the gate sees.
    """

    phi: Tensor
    start: Tensor
    center: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, gate: Gate, ridge: Ridge, folds: int, scale: float, offset: float, seen: Tensor | None) -> LeftOut:
        """From a regression that was cross-validated; where it was not, by itself.

        Args:
            scale, offset: From contributions to saliencies. seen: As for `Gate.set_predictor`, which is called for a
                gate with a rank: its predictor is another afterwards.
        """
        phi, start, center = [], [], []
        for fold in range(folds):
            other = ridge.without.get(fold, ridge)
            weight = scale * other.weight
            if gate.rank is not None:
                gate.set_predictor(weight, seen)
                weight = gate.predictor.to(weight)
            phi.append(weight)
            start.append(scale * other.mean + offset)
            center.append(other.center)
        return cls(*(torch.stack(values).to(gate.bias) for values in (phi, start, center)))

    def saliency(self, s: Tensor, fold: Tensor, share: float) -> Tensor:
        """(B, C), from what the gate sees (B, C_in) and each sample's fold (B,)."""
        g = self.start[fold]
        if share:
            for f in fold.unique().tolist():
                mine = fold == f
                g[mine] += share * ((s[mine].to(g) - self.center[f]) @ self.phi[f].T)
        return g


def temper(passes: Passes, dynamic: Mapping[str, LeftOut],
           static: Mapping[str, LeftOut]) -> tuple[float, dict[float, float]]:  # fmt: skip
    """The share of the predictors that brings the outputs nearest to the dense model's, 0 for the static choice.

    Returns:
        The share, and share → mean `divergence` of all samples, each with predictors that its fold had no part in.
    """
    shares = (*SHARES, 0.0)
    choices = [partial(choosing, passes.gated, _scores(dynamic if share else static, share)) for share in shares]
    losses = dict(zip(shares, passes.losses(choices), strict=True))
    return min(losses, key=lambda share: (math.isnan(losses[share]), losses[share])), losses


def _scores(left_out: Mapping[str, LeftOut], share: float) -> Callable[[str, Tensor], Tensor]:
    """What `choosing` takes, for one pass."""
    folds, seen = len(next(iter(left_out.values())).start), dict.fromkeys(left_out, 0)

    def scores(name: str, s: Tensor) -> Tensor:
        fold = torch.arange(seen[name], seen[name] + len(s), device=s.device) % folds
        seen[name] += len(s)
        return left_out[name].saliency(s, fold, share)

    return scores
