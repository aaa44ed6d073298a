"""The ratio schedule: where it begins, ends, and that position alone decides."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import gatedprune
from gatedprune.errors import ConfigError, ModelError
from gatedprune.training import RatioSchedule
from gatedprune.training.schedule import KINDS, rise

IMAGES = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def model() -> Callable[..., gatedprune.wrapping.GatedModel]:
    dense = timm.create_model("test_resnet", num_classes=5)
    return lambda **options: gatedprune.wrap(copy.deepcopy(dense), example_inputs=IMAGES, **options)


def counts(gated: gatedprune.wrapping.GatedModel) -> dict[str, int]:
    return {name: gate.active_count for name, gate in gated.gates.items()}


@given(st.sampled_from(KINDS), st.one_of(st.none(), st.integers(1, 20)), st.lists(st.floats(-1, 2), min_size=2))
def test_it_rises_from_nothing_to_the_target(kind: str, levels: int | None, places: list[float]) -> None:
    values = [rise(p, kind, levels) for p in sorted(places)]
    assert values == sorted(values)
    assert all(0 <= v <= 1 for v in values)
    assert rise(1, kind, levels) == rise(3, kind, levels) == 1
    assert rise(0, kind, levels) == (1 if kind == "constant" else 0)


def test_the_shapes() -> None:
    assert [rise(i / 8, "step", 4) for i in range(9)] == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    assert rise(0.5, "cosine") == pytest.approx(0.5)
    assert rise(0.25, "cosine") == pytest.approx((1 - 2**-0.5) / 2)
    assert len({rise(i / 1000, "cosine", 3) for i in range(1001)}) == 4


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.5}, {"macs": 0.6}, {"ratio": {"conv1*": 0.25, "layer*": 0.75}}, {"ratio": 0.6, "round_to": 8}],
    ids=["ratio", "macs", "per site", "round_to"],
)
@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_every_site_goes_from_all_channels_to_its_own_number(model: Callable, options: dict, kind: str) -> None:
    gated = model(**options)
    target = counts(gated)
    schedule = RatioSchedule(gated, 10, kind)
    assert all(gate.active_count == gate.channels for gate in gated.gates.values())
    before = counts(gated)
    for epoch in range(10):
        ratio = schedule.set(epoch)
        assert ratio == pytest.approx(sum(g.ratio for g in gated.gates.values()) / len(gated.gates))
        now = counts(gated)
        assert all(target[name] <= now[name] <= before[name] for name in target)
        before = now
    assert before != target
    schedule.set(10)
    assert counts(gated) == target


def test_budget_of_macs_is_met_at_the_end_and_not_before(model: Callable) -> None:
    gated = model(macs=0.6)
    schedule = RatioSchedule(gated, 4, "step", levels=4)
    report = gated.site_report
    left = []
    for position in range(5):
        schedule.set(position)
        left.append(report.macs_with(counts(gated)) / report.macs)
    assert left == sorted(left, reverse=True) and left[3] > 0.6 >= left[4]


def test_position_alone_decides_and_copies_follow(model: Callable) -> None:
    gated, other = model(ratio=0.5), model(ratio=0.5)
    schedule = RatioSchedule(gated, 7)
    for position in (6, 2, 3.5):
        schedule.set(position)
    RatioSchedule(other, 7).set(3.5)
    assert counts(gated) == counts(other)
    average = copy.deepcopy(gated)
    schedule.set(5, average)
    assert counts(average) == counts(gated) != counts(other)


def test_no_rise_and_no_length(model: Callable) -> None:
    gated = model(ratio=0.5)
    target = counts(gated)
    RatioSchedule(gated, 5, "constant")
    assert counts(gated) == target
    RatioSchedule(gated, 0, "cosine")
    assert counts(gated) == target


def test_what_it_refuses(model: Callable) -> None:
    gated = model(ratio=0.5)
    before = counts(gated)
    for length in (-1, True, "5", float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"`length` of RatioSchedule\(\) must be a number of at least 0. Got"):
            RatioSchedule(gated, length)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"`kind` of RatioSchedule\(\) must be one of constant, step, cosine. Got 'lin'"
    ):
        RatioSchedule(gated, 5, "lin")
    for levels in (0, 1.5, True):
        with pytest.raises(ConfigError, match=r"`levels` of RatioSchedule\(\) must be an integer of at least 1. Got"):
            RatioSchedule(gated, 5, "step", levels)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"RatioSchedule\(\) takes a model that gatedprune.wrap\(\) returned. ResNet"):
        RatioSchedule(timm.create_model("test_resnet"), 5)
    assert counts(gated) == before
