"""Predictors' learning rates: what a step then does to a gain, and that nothing else about the optimiser changes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import ConfigError, DataError, ModelError
from gatedprune.functional import subsample
from gatedprune.training import parameter_groups, predictor_rates
from gatedprune.wrapping import GatedModel


class Small(nn.Module):
    """One site; what its gate sees are the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu()).mean((2, 3))


def small(**options: Any) -> GatedModel:
    torch.manual_seed(0)
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    return gatedprune.wrap(Small().double(), 0.5, example_inputs=images, **options)


def test_the_rate_is_one_over_the_mean_square_of_what_the_gate_sees() -> None:
    gated, x = small(), torch.randn(7, 3, 4, 4, dtype=torch.float64)
    training, (name,) = gated.training, gated.gates
    found = predictor_rates(gated, [x[:4], (x[4:], "labels")], reach=3)
    assert found == {name: pytest.approx(3 / float(subsample(x).square().sum(1).mean()))}
    assert gated.training is training
    assert gated.gates[name].last_active is None
    assert predictor_rates(gated, [torch.zeros_like(x)]) == {name: 1.0}  # nothing to see: nothing to divide by
    assert predictor_rates(gated, [x], reach=0) == {name: 0.0}


@pytest.mark.parametrize("unit", [0.01, 1.0, 100.0])
def test_a_step_moves_gains_as_far_whatever_the_unit_of_the_images(unit: float) -> None:
    """The batch norm takes the unit out of everything but the gate."""

    def moved(scale: float) -> Tensor:
        torch.manual_seed(1)
        gated, x = small().train(), torch.rand(16, 3, 4, 4, dtype=torch.float64)
        with torch.no_grad():
            gated.a.weight.div_(scale)  # type: ignore[union-attr, operator]
        x = scale * x
        rates = predictor_rates(gated, [x], reach=1)
        optimizer = torch.optim.SGD(parameter_groups(gated, rates, 0.1), lr=0.1)
        gated(x)[:, 0].sum().backward()
        optimizer.step()
        (gate,) = gated.gates.values()
        return subsample(x) @ gate.weight.detach().T

    before, after = moved(1.0), moved(unit)
    assert float(before.abs().max()) > 1e-3
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-6)  # the batch norm's ε


def test_both_matrices_of_a_product_share_the_rate_of_the_larger_input() -> None:
    gated, x = small(rank=1), torch.randn(7, 3, 4, 4, dtype=torch.float64)
    ((name, gate),) = gated.gates.items()
    for size in (10.0, 0.1):
        with torch.no_grad():
            gate.reduce.fill_(size)
        s = subsample(x)
        sees = max(float(v.square().sum(1).mean()) for v in (s, s @ gate.reduce.detach().T))
        rates = predictor_rates(gated, [x], reach=1)
        assert rates == {name: pytest.approx(1 / sees)}
        own = parameter_groups(gated, rates, lr=1.0)[-1]
        assert [id(p) for p in own["params"]] == [id(gate.weight), id(gate.reduce)]
        assert own["lr"] == rates[name]


@pytest.mark.parametrize("model, rank", [("test_resnet", None), ("test_vit", 4), ("test_efficientnet", None)])
def test_groups_hold_every_parameter_once_and_decay_what_timm_decays(model: str, rank: int | None) -> None:
    size = {"img_size": 64} if "vit" in model else {}
    images = torch.randn(2, 3, 64, 64)
    gated = gatedprune.wrap(timm.create_model(model, **size), 0.5, example_inputs=images, rank=rank)
    rates = predictor_rates(gated, [images])
    groups = parameter_groups(gated, rates, lr=0.5, weight_decay=0.25)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gated.parameters() if p.requires_grad)
    own = {id(p): name for name, gate in gated.gates.items() for p in (gate.weight, gate.reduce)}
    seen = []
    for group in groups:
        names = [own.get(id(p)) for p in group["params"]]
        if any(names):
            (name,) = set(names)
            assert name is not None
            seen.append(name)
            assert group["lr"] == pytest.approx(0.5 * rates[name])
        else:
            assert group["lr"] == 0.5
        decays = {p.dim() > 1 for p in group["params"]}
        if group["weight_decay"]:
            assert decays == {True}
    assert seen == list(gated.gates)
    assert groups[0]["lr"] == 0.5  # what logs show is the layers'
    assert any(group["weight_decay"] == 0.25 for group in groups)
    frozen = copy.deepcopy(gated)
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    assert parameter_groups(frozen, {}, lr=0.5) == []


def test_bad_input() -> None:
    gated, x = small(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for reach in (-1, math.inf, math.nan, True, "1"):
        with pytest.raises(ConfigError, match="reach"):
            predictor_rates(gated, [x], reach=reach)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="empty"):
        predictor_rates(gated, [])
    with pytest.raises(DataError, match="not finite"):
        predictor_rates(gated, [x * math.nan])
    with pytest.raises(ModelError, match="not gated"):
        predictor_rates(Small(), [x])
    with pytest.raises(ModelError, match="not gated"):
        parameter_groups(Small(), {}, 0.1)
    with pytest.raises(ConfigError, match="'nowhere'"):
        parameter_groups(gated, {"nowhere": 1.0}, 0.1)
