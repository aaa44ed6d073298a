"""BerHu: equation 3, its threshold, its mask, and what must hold for every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.adapters.depth import berhu
from gatedprune.errors import DataError

DEPTHS = st.lists(st.tuples(st.floats(0.5, 90), st.floats(0.5, 90)), min_size=1, max_size=30)


def pair(values: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    prediction, target = torch.tensor(values, dtype=torch.float64).T
    return prediction, target


def by_hand(prediction: torch.Tensor, target: torch.Tensor) -> float:
    errors = [abs(float(p) - float(t)) for p, t in zip(prediction, target, strict=True)]
    c = 0.2 * max(errors)
    return sum(e if e <= c else (e * e + c * c) / (2 * c) for e in errors) / len(errors)


@given(DEPTHS)
def test_equals_equation_3(values: list[tuple[float, float]]) -> None:
    prediction, target = pair(values)
    assert berhu(prediction, target).item() == pytest.approx(by_hand(prediction, target), rel=1e-9, abs=1e-12)


@given(DEPTHS)
def test_is_at_least_the_mean_absolute_error_and_symmetric(values: list[tuple[float, float]]) -> None:
    prediction, target = pair(values)
    loss = berhu(prediction, target)
    assert loss >= (prediction - target).abs().mean() * (1 - 1e-9)
    assert berhu(target, prediction).item() == pytest.approx(loss.item())


@given(DEPTHS, st.floats(0.1, 10))
def test_scales_with_depth(values: list[tuple[float, float]], factor: float) -> None:
    prediction, target = pair(values)
    expected = berhu(prediction, target).item() * factor
    assert berhu(prediction * factor, target * factor).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_two_branches_by_hand() -> None:
    # The largest error is 10, so c = 2: an error of 1 costs 1, and 10 costs (100 + 4) / 4 = 26.
    loss = berhu(torch.tensor([11.0, 21.0]), torch.tensor([10.0, 11.0]))
    assert loss.item() == pytest.approx((1 + 26) / 2)


@pytest.mark.parametrize("mask", [None, "explicit"])
def test_pixels_without_ground_truth_count_neither_in_the_mean_nor_in_the_threshold(mask: str | None) -> None:
    target = torch.tensor([10.0, 11.0, 0.0])
    prediction = torch.tensor([11.0, 21.0, 1000.0], requires_grad=True)
    loss = berhu(prediction, target, None if mask is None else target > 0)
    loss.backward()
    assert loss.item() == pytest.approx(13.5)
    assert prediction.grad[2] == 0
    assert (prediction.grad[:2] != 0).all()


def test_the_threshold_carries_no_gradient() -> None:
    prediction = torch.tensor([11.0, 21.0], requires_grad=True)
    berhu(prediction, torch.tensor([10.0, 11.0])).backward()
    # d/de of e is 1, of (e² + c²) / 2c with c fixed at 2 is e / c = 5; both halved by the mean.
    assert prediction.grad.tolist() == pytest.approx([0.5, 2.5])


def test_a_perfect_prediction_costs_nothing_and_has_a_finite_gradient() -> None:
    prediction = torch.full((2, 1, 3, 3), 7.0, requires_grad=True)
    loss = berhu(prediction, torch.full((2, 1, 3, 3), 7.0))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(prediction.grad).all()


def test_an_infinite_prediction_is_not_hidden() -> None:
    assert not torch.isfinite(berhu(torch.tensor([float("inf"), 1.0]), torch.tensor([2.0, 1.0])))


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="without a single valid ground-truth pixel"):
        berhu(torch.ones(2, 2), torch.zeros(2, 2))
    with pytest.raises(DataError, match="maps of one shape"):
        berhu(torch.ones(2, 2), torch.ones(2, 3))
