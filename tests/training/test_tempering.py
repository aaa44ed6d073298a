"""Tempering: saliencies by predictors that a sample's own fold had no part in; the share is tested with calibration."""

from __future__ import annotations

import pytest
import torch

from gatedprune.gates import Gate
from gatedprune.training.ridge import Ridge
from gatedprune.training.tempering import LeftOut


def ridge(seed: int, without: dict[int, Ridge] | None = None) -> Ridge:
    g = torch.Generator().manual_seed(seed)
    weight, bias, center = (torch.randn(*shape, generator=g).double() for shape in ((6, 4), (6,), (4,)))
    return Ridge(weight, bias, center, 0.1, without=without or {})


@pytest.mark.parametrize("share", [1.0, 0.35, 0.0])
def test_each_fold_has_its_own_predictor(share: float) -> None:
    """Fold 1 has none of its own, as where nothing was left out: the whole one serves."""
    others = {0: ridge(1), 2: ridge(2)}
    whole, gate = ridge(0, others), Gate(6, 4, 3, dtype=torch.float64)
    left_out = LeftOut.of(gate, whole, 3, 2.0, 0.5, None)
    s, fold = torch.randn(7, 4).double(), torch.arange(7) % 3
    found = left_out.saliency(s, fold, share)
    for i in range(7):
        mine = others.get(int(fold[i]), whole)
        mean = 2 * (mine.bias + mine.weight @ mine.center) + 0.5
        wanted = mean + share * 2 * mine.weight @ (s[i] - mine.center)
        torch.testing.assert_close(found[i], wanted)


def test_a_low_rank_is_that_of_the_gate() -> None:
    gate = Gate(6, 4, 3, rank=2, dtype=torch.float64)
    left_out = LeftOut.of(gate, ridge(0), 2, 1.0, 0.0, torch.eye(4).double())
    assert [int(torch.linalg.matrix_rank(phi)) for phi in left_out.phi] == [2, 2]
