"""Allocation: the budget is met, the least sensitive sites give most, and a failure changes nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch

import gatedprune
from gatedprune.errors import ConfigError, DataError, ModelError
from gatedprune.testing.case import enliven
from gatedprune.training import allocate
from gatedprune.training.allocation import share_out
from gatedprune.training.divergence import divergence


def cost(counts: Mapping[str, int]) -> int:
    return 10 * counts["a"] + 5 * counts["b"] + 20 * counts["c"]


def test_sharing_out_is_near_the_best_there_is() -> None:
    """Against all combinations; convex curves, where giving up step by step is best but for the last step."""
    curves = {
        name: {k: weight * (8 - k) ** 2 / 8 for k in range(1, 9)}
        for name, weight in (("a", 1.0), ("b", 4.0), ("c", 0.5))
    }
    for budget in (250, 200, 150, 100, 50):
        found = share_out(curves, cost, budget)
        assert cost(found) <= budget
        loss = sum(curves[n][k] for n, k in found.items())
        every = ({"a": a, "b": b, "c": c} for a, b, c in itertools.product(range(1, 9), repeat=3))
        best = min(sum(curves[n][k] for n, k in each.items()) for each in every if cost(each) <= budget)
        assert loss <= 1.25 * best + 0.5
    assert share_out(curves, cost, 1000) == {"a": 8, "b": 8, "c": 8}
    with pytest.raises(ConfigError, match="cannot be met"):
        share_out(curves, cost, 10)


def test_divergence() -> None:
    p = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    assert torch.equal(divergence(p, p + 3), torch.zeros(2).double())
    assert bool((divergence(p, p.flip(1)) > 0).all())
    features = torch.ones(2, 3, 4)
    torch.testing.assert_close(divergence(features, 0 * features), torch.ones(2).double())
    several = divergence((p, {"map": features}), (p.flip(1), {"map": 0 * features}))
    torch.testing.assert_close(several, (divergence(p, p.flip(1)) + 1) / 2)
    with pytest.raises(ConfigError, match="`loss`"):
        divergence(["a", torch.tensor(1.0), torch.ones(2, 3, dtype=torch.long)], ["a", torch.tensor(1.0), 2])


def test_insensitive_sites_give_most() -> None:
    torch.manual_seed(0)
    model = enliven(timm.create_model("test_resnet", num_classes=10), seed=0).eval()
    gated: Any = gatedprune.wrap(model, 0.0, example_inputs=torch.zeros(1, 3, 48, 48))
    first, *others = (site.name for site in gated.gated_sites)
    with torch.no_grad():  # what reads the first site is deaf
        gated.get_submodule(gated.site_report[first].consumers[-1].path).weight.mul_(1e-6)
    x = torch.randn(8, 3, 48, 48)
    found = allocate(gated, x.split(4), macs=0.85, levels=(0.25, 0.75))
    counts = {name: gate.active_count for name, gate in gated.gates.items()}
    assert gated.site_report.macs_with(counts) <= 0.85 * gated.site_report.macs
    assert found.macs == gated.site_report.macs_with(counts) / gated.site_report.macs
    losses = {name: max(loss for _, loss in pairs) for name, pairs in found.sensitivity.items()}
    assert losses.pop(first) < 1e-12 and min(losses.values()) > 1e-10  # 1e-16 is rounding
    assert found.ratios[first] >= max(found.ratios[name] for name in others)
    assert all(abs(gate.ratio - found.ratios[name]) < 1e-9 for name, gate in gated.gates.items())
    assert first in str(found)
    for options, fault in (({"macs": 0.01}, "cannot be met"), ({"macs": 0}, "above 0"),
                           ({"macs": 0.9, "levels": (0.5, 0.2)}, "ascending")):  # fmt: skip
        with pytest.raises(ConfigError, match=fault):
            allocate(gated, [x], **{"levels": (0.25,), **options})
    with pytest.raises(DataError, match="are empty"):
        allocate(gated, [], macs=0.9)
    assert {name: gate.active_count for name, gate in gated.gates.items()} == counts
    with pytest.raises(ModelError, match="not gated"):
        allocate(torch.nn.Linear(2, 2), [x], macs=0.9)
