"""Ridge regression from accumulated moments, its shrinkage chosen by cross-validation. Closed form; no data needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .moments import Moments

__all__ = ["SHRINKAGES", "Ridge", "fit", "squared_errors"]

# In units of a standardised feature's variance: half decades; the last leaves nothing but the constant term.
SHRINKAGES = (*(10 ** (e / 2) for e in range(-8, 7)), math.inf)


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted regression y ≈ x·φᵀ + ρ.

    Attributes:
        weight: φ, (C, P). bias: ρ, (C,). center: The features' mean, (P,).
        shrinkage: λ, chosen for all targets together; infinite: the constant term alone.
        r2: 1 − (squared errors on the folds left out) / (those of the constant term), over all targets; at least 0,
            as the constant term is among the candidates. None with fewer than two folds of data.
        without: Fold → the regression of the same shrinkage, fitted to the other folds; empty with fewer than two.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    shrinkage: float
    r2: float | None = None
    without: Mapping[int, Ridge] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The mean of the targets that it was fitted to, (C,)."""
        return self.bias + self.weight @ self.center


class _Path:
    """All the ridge solutions of one set of moments, from one eigendecomposition."""

    def __init__(self, m: Moments) -> None:
        n = m.count[0].clamp_min(1)
        self.mx, self.my = m.x[0] / n, m.y[0] / n
        cov = m.xx[0] / n - self.mx[:, None] * self.mx
        var = cov.diagonal().clamp_min(0)
        # A feature that does not vary (up to rounding) says nothing: leave it out instead of dividing by nearly zero.
        alive = var > 1e-12 * (m.xx[0].diagonal() / n).clamp_min(1e-300)
        self.scale = torch.where(alive, var.clamp_min(1e-300).rsqrt(), 0)
        self.values, self.vectors = torch.linalg.eigh(self.scale[:, None] * cov * self.scale)
        cross = (m.xy[0] / n - self.mx[:, None] * self.my) * self.scale[:, None]
        self.projected = self.vectors.T @ cross

    def solution(self, shrinkage: float) -> Ridge:
        if math.isinf(shrinkage):
            return Ridge(torch.zeros_like(self.projected).T, self.my, self.mx, shrinkage)
        beta = self.vectors @ (self.projected / (self.values.clamp_min(0) + shrinkage)[:, None])
        phi = (beta * self.scale[:, None]).T
        return Ridge(phi, self.my - phi @ self.mx, self.mx, shrinkage)


def squared_errors(m: Moments, weight: Tensor, bias: Tensor) -> Tensor:
    """Σ (y − x·φᵀ − ρ)² over one fold's samples, (C,), from its moments."""
    # Around the means: the raw sums would cancel.
    n = m.count[0].clamp_min(1)
    mx, my = m.x[0] / n, m.y[0] / n
    xx = m.xx[0] - n * mx[:, None] * mx
    xy = m.xy[0] - n * mx[:, None] * my
    yy = m.yy[0] - n * my.square()
    offset = my - weight @ mx - bias
    slope = yy - 2 * (weight * xy.T).sum(1) + ((weight @ xx) * weight).sum(1)
    return (slope + n * offset.square()).clamp_min(0)


def fit(moments: Moments, shrinkages: Sequence[float] = SHRINKAGES) -> Ridge:
    """The ridge regression whose shrinkage has the least squared error on the folds left out.

    Args:
        moments: Of the data. shrinkages: The candidates, ascending; the last is infinite: the constant term alone.
    """
    filled = [f for f in range(moments.folds) if moments.count[f] > 0]
    path = _Path(moments.total())
    if len(filled) < 2:
        return path.solution(math.inf)
    errors, others = torch.zeros(len(shrinkages), dtype=torch.float64), dict[int, _Path]()
    for f in filled:
        out = torch.arange(moments.folds, device=moments.x.device) == f
        others[f], left = _Path(moments.pick(~out)), moments.pick(out)
        for i, shrinkage in enumerate(shrinkages):
            tried = others[f].solution(shrinkage)
            errors[i] += float(squared_errors(left, tried.weight, tried.bias).sum())
    constant = float(errors[-1])
    # Ties go to the greater shrinkage: a site that cannot be predicted is left with its constant term.
    best = len(shrinkages) - 1 - int(errors.flip(0).argmin())
    r2 = 1 - float(errors[best]) / constant if constant > 0 else 0.0
    without = {f: other.solution(shrinkages[best]) for f, other in others.items()}
    return replace(path.solution(shrinkages[best]), r2=r2, without=without)
