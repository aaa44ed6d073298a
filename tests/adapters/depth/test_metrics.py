"""The depth metrics: by hand, in general, and averaged per image."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.adapters.depth import METRICS, MetricAverage, depth_metrics
from gatedprune.errors import DataError

DEPTHS = st.lists(st.tuples(st.floats(0.5, 90), st.floats(0.5, 90)), min_size=1, max_size=30)


def test_by_hand() -> None:
    found = depth_metrics(torch.tensor([10.0, 30.0]), torch.tensor([8.0, 20.0]))
    logs = [math.log(10 / 8), math.log(30 / 20)]
    assert found == pytest.approx(
        {
            "rms": math.sqrt((4 + 100) / 2),
            "rel": (2 / 8 + 10 / 20) / 2,
            "rms_log": math.sqrt((logs[0] ** 2 + logs[1] ** 2) / 2),
            "sq_rel": (4 / 8 + 100 / 20) / 2,
            "silog": 100 * abs(logs[1] - logs[0]) / 2,
            "delta1": 0.0,  # 10 / 8 is exactly 1.25, which is not under it
            "delta2": 1.0,
            "delta3": 1.0,
        }
    )


@given(DEPTHS)
def test_what_holds_for_all(values: list[tuple[float, float]]) -> None:
    prediction, target = torch.tensor(values, dtype=torch.float64).T
    found = depth_metrics(prediction, target)
    assert set(found) == set(METRICS)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["delta1"] <= found["delta2"] <= found["delta3"] <= 1
    assert found["silog"] <= 100 * found["rms_log"] * (1 + 1e-9) + 1e-9  # a deviation is at most the rms
    assert found["rms"] <= float((prediction - target).abs().max()) * (1 + 1e-9)


@given(DEPTHS, st.floats(0.1, 10))
def test_scaling(values: list[tuple[float, float]], factor: float) -> None:
    prediction, target = torch.tensor(values, dtype=torch.float64).T
    found, scaled = depth_metrics(prediction, target), depth_metrics(prediction * factor, target * factor)
    for name in ("rel", "rms_log", "silog"):
        assert scaled[name] == pytest.approx(found[name], rel=1e-6, abs=1e-6)
    for name in ("rms", "sq_rel"):
        assert scaled[name] == pytest.approx(found[name] * factor, rel=1e-6, abs=1e-9)
    # Only the scale-invariant error forgives a prediction that is wrong by a factor.
    assert depth_metrics(prediction * factor, target)["silog"] == pytest.approx(found["silog"], abs=1e-4)


def test_a_perfect_prediction() -> None:
    depth = torch.tensor([[3.0, 0.0], [50.0, 80.0]])
    found = depth_metrics(depth.clamp_min(1), depth)
    assert [found[name] for name in ("delta1", "delta2", "delta3")] == [1, 1, 1]
    assert all(found[name] == 0 for name in ("rms", "rel", "rms_log", "sq_rel", "silog"))


def test_the_mask_decides_which_pixels_count() -> None:
    prediction, target = torch.tensor([10.0, 99.0, 20.0]), torch.tensor([10.0, 1.0, 40.0])
    found = depth_metrics(prediction, target, torch.tensor([True, False, True]))
    assert found["rms"] == pytest.approx(math.sqrt(400 / 2))


def test_images_weigh_the_same_however_many_pixels_they_have() -> None:
    average = MetricAverage()
    average.add(depth_metrics(torch.full((1,), 12.0), torch.full((1,), 10.0)))
    average.add(depth_metrics(torch.full((1000,), 10.0), torch.full((1000,), 10.0)))
    assert average.count == 2
    assert average.result()["rms"] == pytest.approx(1.0)  # over all pixels it would be 0.06


def test_errors() -> None:
    ones = torch.ones(2, 2)
    with pytest.raises(DataError, match="maps of one shape"):
        depth_metrics(ones, torch.ones(3, 2))
    with pytest.raises(DataError, match="without a valid ground-truth pixel"):
        depth_metrics(ones, torch.zeros(2, 2))
    with pytest.raises(DataError, match="prediction of .* positive and finite"):
        depth_metrics(torch.tensor([1.0, float("nan")]), torch.ones(2))
    with pytest.raises(DataError, match="target of .* positive and finite"):
        depth_metrics(torch.ones(2), torch.tensor([1.0, float("inf")]))
    with pytest.raises(DataError, match="no image to average"):
        MetricAverage().result()
