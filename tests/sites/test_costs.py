"""MACs left, by arithmetic: what the compact model is then seen to execute."""

from __future__ import annotations

import pytest
import timm
import torch

import gatedprune
from gatedprune.sites import Layer, SiteReport

from ..tiny import SIZE, create

# One of each kind: plain chains and squeeze-excite, depthwise, grouped, weight-standardised, heads and hidden
# units.
MODELS = ["test_byobnet", "test_convnext", "test_efficientnet", "test_nfnet", "test_resnet", "test_vit"]


@pytest.mark.parametrize(("name", "stream"), [*((name, False) for name in MODELS), ("test_resnet", True)])
def test_macs_left_are_those_that_the_compact_model_executes(name: str, stream: bool) -> None:
    model, images = create(name), torch.randn(2, 3, SIZE, SIZE)
    report = gatedprune.find_sites(model, images, stream=stream)
    assert report.macs == gatedprune.count_macs(model, images).total == sum(layer.macs for layer in report.layers)
    fast = gatedprune.compact(gatedprune.wrap(model, 0.3, example_inputs=images, stream=stream), images)
    assert report.macs_left(0.3) == gatedprune.count_macs(fast, images).total


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"macs": 0.7}], ids=str)
def test_predictors_of_low_rank_cost_less(options: dict[str, float]) -> None:
    model, images = timm.create_model("test_resnet", num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    report = gatedprune.find_sites(model, images)
    gated = gatedprune.wrap(model, example_inputs=images, rank=4, **options)  # type: ignore[arg-type]
    ratio = gated.gate_config.ratio
    assert ratio is not None
    left = report.macs_left(ratio, rank=4)
    assert left < report.macs_left(ratio)
    compact = gatedprune.count_macs(gatedprune.compact(gated, images), images)
    assert left == compact.total == compact.operators  # by formula, by the layers' rules, by the flop counter
    assert compact.predictors == gatedprune.count_macs(gated, images).predictors
    assert "macs" not in options or 0.65 * report.macs < left <= 0.7 * report.macs


def test_a_layer_between_two_sites_costs_the_product() -> None:
    layer = Layer("fc", "linear", 1000, writes={"a": 0.5}, reads={"b": 1.0})
    assert layer.macs_with({}) == 1000
    assert layer.macs_with({"a": 0.5}) == 750
    assert layer.macs_with({"a": 0.5, "b": 0.1}) == 75


def test_sites_that_no_pattern_fits_stay_whole(report: SiteReport) -> None:
    first, *_ = report
    alone = report.macs_left({first.name: 0.5})
    predictor = first.in_channels * first.channels
    assert report.macs - first.macs <= alone < report.macs
    assert report.macs_left({first.name: 0.0}) == report.macs + predictor
    assert report.macs_with({}) == report.macs


def test_layers_name_the_sites_that_narrow_them(report: SiteReport) -> None:
    touched = sum(layer.macs for layer in report.layers if layer.writes or layer.reads)
    assert touched == report.macs_in_sites == report.macs  # of this model no layer is whole
    for layer in report.layers:
        for shares in (layer.writes, layer.reads):
            assert all(0 < share <= 1 for share in shares.values())
            assert sum(shares.values()) <= 1 + 1e-9


@pytest.fixture(scope="module")
def report() -> SiteReport:
    return gatedprune.find_sites(timm.create_model("test_resnet"), torch.zeros(1, 3, 64, 64))
