"""`freeze`: ordinary narrow layers that compute what the masked model computes for that choice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.engine import FrozenModel, freeze, narrow, selection
from gatedprune.errors import ConfigError, ModelError
from gatedprune.testing.case import enliven
from gatedprune.wrapping import GatedModel

from ..tiny import SIZE, create

MODELS = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "test_nfnet",
    pytest.param("test_mambaout", marks=pytest.mark.slow),
    "test_byobnet",
]


def gate_up(name: str) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    return gatedprune.wrap(enliven(create(name)).double(), example_inputs=x), x


def choose(gated: GatedModel) -> dict[str, Tensor]:
    """Any channels but those that the gates start with."""
    return {n: torch.randperm(g.channels)[: g.active_count].sort().values for n, g in gated.gates.items()}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_masked_model_with_the_same_channels(name: str) -> None:
    gated, x = gate_up(name)
    active = choose(gated)
    frozen = freeze(gated, active, (x[:1],))
    for site, gate in gated.gates.items():
        gate.boost = False
        rank = torch.zeros(gate.channels, dtype=torch.float64)
        rank[active[site]] = 1
        with torch.no_grad():
            gate.weight.zero_()
            gate.bias.copy_(rank)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), gated(x), rtol=1e-9, atol=1e-9)
        if "vit" not in name:
            other = x.repeat(1, 1, 2, 1)[:, :, :-16]
            torch.testing.assert_close(frozen(other), gated(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_nothing_dynamic_is_left(name: str) -> None:
    gated, x = gate_up(name)
    frozen = freeze(gated, choose(gated), (x,))
    dynamic = (selection.Selector, narrow.NarrowConv2d, narrow.NarrowLinear, selection.ChannelIndex)
    assert not [m for m in frozen.modules() if isinstance(m, dynamic)]
    full = sum(m.weight.numel() for m in gated.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    cut = sum(m.weight.numel() for m in frozen.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert cut < 0.8 * full


def test_sites_that_are_not_named_stay_whole() -> None:
    gated, x = gate_up("test_resnet")
    name, active = next(iter(choose(gated).items()))
    frozen = freeze(gated, {name: active}, (x,))
    dense = gatedprune.unwrap(copy.deepcopy(gated))
    few, all_ = gatedprune.count_macs(frozen, x).total, gatedprune.count_macs(dense, x).total
    assert 0.7 * all_ < few < all_


def test_prune_static_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    from gatedprune.compare import static

    def fails(*args: object, **options: object) -> None:
        raise ModelError("torch-pruning cannot prune it")

    gated, x = gate_up("test_resnet")
    monkeypatch.setattr(static, "_by_torch_pruning", fails)
    result = gatedprune.prune_static(gated, example_inputs=x)
    assert result.by == "gatedprune" and "cannot prune it" in result.why
    assert isinstance(result.model, FrozenModel)
    assert {n: len(k) for n, k in result.kept.items()} == {n: g.active_count for n, g in gated.gates.items()}
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), gated(x), rtol=1e-9, atol=1e-9)  # fresh gates rank the same way
    with pytest.raises(ModelError, match="cannot prune it"):
        gatedprune.prune_static(gated, example_inputs=x, by="torch-pruning")
    table = str(gatedprune.compare(gated, x[:1], repeats=1, warmup=0))
    assert "cut by gatedprune" in table


def test_dense_models_and_ratios() -> None:
    gated, x = gate_up("test_resnet")
    dense = gatedprune.unwrap(copy.deepcopy(gated))
    result = gatedprune.prune_static(dense, ratio=0.25, example_inputs=x, by="gatedprune")
    for name, kept in result.kept.items():
        assert len(kept) == round(0.75 * gated.gates[name].channels)
    assert not gatedprune.is_gated(dense)


def test_bad_requests() -> None:
    gated, x = gate_up("test_resnet")
    with pytest.raises(ConfigError, match="`by` must be"):
        gatedprune.prune_static(gated, example_inputs=x, by="hand")
    with pytest.raises(ConfigError, match="belongs to torch-pruning"):
        gatedprune.prune_static(gated, example_inputs=x, by="gatedprune", importance=lambda group: None)
    with pytest.raises(ModelError, match=r"gatedprune\.wrap"):
        freeze(nn.Linear(2, 2), {}, (x,))
    with pytest.raises(ModelError, match="inference"):
        freeze(gated, choose(gated), (x,)).train()
