"""Moments: what is accumulated in one pass is what the whole data gives, by fold, whatever the batch size."""

from __future__ import annotations

import pytest
import torch

from gatedprune.errors import DataError
from gatedprune.training.moments import Moments

X, Y = torch.rand(23, 4, dtype=torch.float64), torch.rand(23, 3, dtype=torch.float64)


def filled(batch: int, folds: int) -> Moments:
    m = Moments(4, 3, folds)
    for start in range(0, len(X), batch):
        m.add(X[start : start + batch], Y[start : start + batch])
    return m


@pytest.mark.parametrize("batch", [1, 4, 23])
def test_sums_by_fold(batch: int) -> None:
    m = filled(batch, 3)
    assert m.seen == 23
    for f in range(3):
        x, y = X[f::3], Y[f::3]
        assert m.count[f] == len(x)
        for found, wanted in (
            (m.x, x.sum(0)),
            (m.y, y.sum(0)),
            (m.xx, x.T @ x),
            (m.xy, x.T @ y),
            (m.yy, (y * y).sum(0)),
        ):
            torch.testing.assert_close(found[f], wanted, rtol=1e-12, atol=0)


def test_pick_and_total_add_folds() -> None:
    m = filled(5, 4)
    torch.testing.assert_close(m.total().xy[0], X.T @ Y, rtol=1e-12, atol=0)
    some = m.pick(torch.tensor([True, False, True, False]))
    rows = torch.arange(23) % 4
    kept = (rows == 0) | (rows == 2)
    assert some.seen == int(kept.sum())
    torch.testing.assert_close(some.xx[0], X[kept].T @ X[kept], rtol=1e-12, atol=0)


def test_scaled_targets() -> None:
    m, other = filled(23, 2).scaled(3.0), Moments(4, 3, 2)
    other.add(X, 3 * Y)
    for name in ("count", "x", "y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(m, name), getattr(other, name), rtol=1e-12, atol=0)


def test_what_is_not_finite_is_an_error() -> None:
    bad = X.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        Moments(4, 3, 2).add(bad, Y)
