"""`wrap(macs=…)`: a budget of MACs instead of a ratio."""

from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch
from torch import nn

import gatedprune
from gatedprune.errors import ConfigError

IMAGES = torch.zeros(1, 3, 64, 64)


def resnet() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=10).eval()


@pytest.mark.parametrize("options", [{}, {"round_to": 4}, {"stream": True}, {"exclude": "layer1*"}])
def test_the_smallest_ratio_within_the_budget_is_found(options: dict) -> None:
    gated = gatedprune.wrap(resnet(), macs=0.6, example_inputs=IMAGES, **options)
    ratio, dense = gated.gate_config.ratio, gated.site_report.macs
    assert gated.gate_config.macs is None

    def spent(ratio: float) -> int:
        gated.set_ratio(ratio)
        return gatedprune.count_macs(gatedprune.compact(gated, IMAGES), IMAGES).total

    assert spent(ratio) <= 0.6 * dense < spent(ratio - 1e-4)


def test_a_budget_that_cannot_be_met_names_the_least_and_leaves_the_model_alone() -> None:
    model = resnet()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"`macs` of wrap\(\) cannot be 0.01: .* at best 0\.\d+ of") as caught:
        gatedprune.wrap(model, macs=0.01, example_inputs=IMAGES)
    assert list(model.state_dict()) == keys and not gatedprune.is_gated(model)
    least = float(str(caught.value).split("at best ")[1].split()[0])
    gated = gatedprune.wrap(model, macs=least, example_inputs=IMAGES)
    assert math.isclose(
        gated.site_report.macs_left(gated.gate_config.ratio) / gated.site_report.macs, least, abs_tol=1e-3
    )


def test_ratio_and_macs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="either `ratio` or `macs`"):
        gatedprune.wrap(resnet(), 0.5, macs=0.5, example_inputs=IMAGES)


def test_a_pattern_that_fits_nothing_is_told_once() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        gatedprune.wrap(resnet(), macs=0.6, exclude="layer9", example_inputs=IMAGES)
    assert len([w for w in told if "layer9" in str(w.message)]) == 1
