"""First and second moments of a regression, accumulated in one pass: memory does not grow with the data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError

__all__ = ["Moments"]


class Moments:
    """Sums over samples of what a regression of targets (C,) on features (P,) needs, in float64, by fold.

    The i-th sample belongs to fold i mod ``folds``, whatever the batch size: K·(P² + P·C) numbers in all.

    Attributes:
        count: (K,). x: (K, P), Σx. y: (K, C), Σy. xx: (K, P, P), Σ x·xᵀ. xy: (K, P, C), Σ x·yᵀ. yy: (K, C), Σ y².
    """

    def __init__(self, features: int, targets: int, folds: int = 1, device: torch.device | None = None) -> None:
        zeros = torch.zeros(1, dtype=torch.float64, device=device)
        self.folds, self.seen = folds, 0
        self.count = zeros.new_zeros(folds)
        self.x, self.y = zeros.new_zeros(folds, features), zeros.new_zeros(folds, targets)
        self.xx, self.xy = zeros.new_zeros(folds, features, features), zeros.new_zeros(folds, features, targets)
        self.yy = zeros.new_zeros(folds, targets)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples: x (B, P), y (B, C)."""
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise DataError(
                "An activation is not finite, so nothing can be fitted to it: look for NaN or infinity in the images "
                "or the weights, or calibrate in float32."
            )
        fold = (torch.arange(self.seen, self.seen + len(x), device=x.device)) % self.folds
        self.seen += len(x)
        for f in range(self.folds):
            a, b = x[fold == f].to(self.x), y[fold == f].to(self.y)
            self.count[f] += len(a)
            self.x[f] += a.sum(0)
            self.y[f] += b.sum(0)
            self.xx[f] += a.T @ a
            self.xy[f] += a.T @ b
            self.yy[f] += b.square().sum(0)

    def pick(self, keep: Tensor) -> Moments:
        """The sums of the folds that ``keep`` (K,), bool, names, as one fold."""
        out = Moments(self.x.shape[1], self.y.shape[1], 1, self.x.device)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(out, name, getattr(self, name)[keep].sum(0, keepdim=True))
        out.seen = int(out.count.sum())
        return out

    def total(self) -> Moments:
        """All folds as one."""
        return self.pick(torch.ones(self.folds, dtype=torch.bool, device=self.x.device))

    def scaled(self, factor: float) -> Moments:
        """The moments of targets multiplied by ``factor``."""
        out = self.pick(torch.zeros(self.folds, dtype=torch.bool, device=self.x.device))
        for name, power in (("count", 0), ("x", 0), ("y", 1), ("xx", 0), ("xy", 1), ("yy", 2)):
            setattr(out, name, getattr(self, name) * factor**power)
        out.folds, out.seen = self.folds, self.seen
        return out
