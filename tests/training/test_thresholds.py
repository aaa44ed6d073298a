"""Thresholds: k winners on average, none harder than asked, the same in every path, and back to exactly k at need."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import ConfigError, DataError, ExportError, ModelError
from gatedprune.training import ThresholdFit, fit_thresholds


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(16, 3, 32, 32, generator=generator) * torch.rand(16, 3, 1, 1, generator=generator)
    return noise + torch.randn(16, 3, 1, 1, generator=generator)


def wrapped(gate: str, images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5, zero_init_last=False)
    return gatedprune.wrap(model, ratio=0.5, example_inputs=images[:2], gate=gate).eval()


@pytest.fixture(scope="module")
def fitted(images: Tensor) -> tuple[nn.Module, ThresholdFit]:
    gated = wrapped("threshold", images)
    gated.calibrate(images.split(8), rounds=1)
    return gated, gated.fit_thresholds(images.split(8))


def run(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def counts(gated: nn.Module) -> dict[str, list[int]]:
    return {name: (gate.last_active < gate.channels).sum(1).tolist() for name, gate in gated.gates.items()}


def test_untouched_it_is_the_static_model(images: Tensor) -> None:
    gated, exact = wrapped("threshold", images), wrapped("topk", images)
    assert torch.equal(run(gated, images), run(exact, images))
    for name, gate in gated.gates.items():
        assert bool(gate.threshold.isinf()) and gate.last_active.shape == (16, gate.channels)
        assert torch.equal(gate.last_active[:, : gate.active_count], exact.gates[name].last_active)
        assert bool((gate.last_active[:, gate.active_count :] == gate.channels).all())


def test_k_win_on_average_over_the_data(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated, found = fitted
    run(gated, images)
    assert found.samples == 16 and list(found.sites) == list(gated.gates)
    for name, wins in counts(gated).items():
        site = found.sites[name]
        assert site.wanted == gated.gates[name].active_count and site.threshold == float(gated.gates[name].threshold)
        assert site.mean == pytest.approx(sum(wins) / 16) and (site.least, site.most) == (min(wins), max(wins))
        assert site.mean == pytest.approx(site.wanted, abs=max(0.02 * site.wanted, 1 / 16)) and min(wins) >= 1
        assert site.least <= site.p20 <= site.p80 <= site.most
    assert sum(site.least < site.most for site in found.sites.values()) >= 4
    assert str(found).splitlines()[0] == "thresholds of 10 gates from 16 samples"


def test_where_saliencies_tie_exactly_k_win(images: Tensor) -> None:
    gated = wrapped("threshold", images)
    with torch.no_grad():
        gated.gates["layer1.0.conv1"].bias.fill_(1)  # and φ is 0: all alike
    found = gated.fit_thresholds([images])
    site = found.sites["layer1.0.conv1"]
    assert site.threshold == float("inf") and site.mean == site.least == site.most == 16


def test_calibrate_sets_them(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated = wrapped("threshold", images)
    gated.calibrate(images.split(8), rounds=1)
    for name, gate in gated.gates.items():
        assert torch.equal(gate.threshold, fitted[0].gates[name].threshold)
    with pytest.raises(DataError, match="iterator"):
        gated.calibrate(iter([images]), rounds=1)


def test_compact_equals_masked_for_any_batch(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated, x = copy.deepcopy(fitted[0]).double(), images.double()
    fast = gatedprune.compact(gated, x[:2], backend="torch")
    wanted = run(gated, x)
    active = {name: gate.last_active for name, gate in gated.gates.items()}
    torch.testing.assert_close(fast(x), wanted, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(chosen, active[name]) for name, chosen in fast.last_active.items())
    torch.testing.assert_close(fast(x[3:4]), wanted[3:4], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(chosen, active[name][3:4]) for name, chosen in fast.last_active.items())
    assert fast(x[:0]).shape == (0, 5)
    together = gatedprune.compact(gated, x[:2], backend="torch", share="batch")  # one set for the batch runs at once
    assert together(x).shape == (16, 5) and all(len(chosen) == 1 for chosen in together.last_active.values())


def test_macs_are_a_mean_with_a_spread(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    pytest.importorskip("thop", reason="needs the extra compare")
    fast = gatedprune.compact(fitted[0], images[:2], backend="torch")
    found = gatedprune.count_macs(fast, images[:4])
    alone = [gatedprune.count_macs(fast, images[i : i + 1]) for i in range(4)]
    assert found.per_sample == tuple(one.total for one in alone) and len(set(found.per_sample)) > 1
    assert found.total == round(sum(found.per_sample) / 4)
    assert found.spread is not None and found.spread["min"] == min(found.per_sample)
    assert found.spread["min"] <= found.spread["p20"] <= found.spread["p80"] <= found.spread["max"]
    assert "; min " in str(found) and alone[0].spread is None and "min" not in str(alone[0])


def test_another_ratio_or_a_reset_forgets_them(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated = copy.deepcopy(fitted[0])
    gated.set_ratio({"layer1.0.conv1": 0.25})
    assert [n for n, g in gated.gates.items() if bool(g.threshold.isinf())] == ["layer1.0.conv1"]
    run(gated, images)
    assert counts(gated)["layer1.0.conv1"] == [24] * 16
    gated.reset_gates()
    assert all(bool(gate.threshold.isinf()) for gate in gated.gates.values())


def test_saved_and_loaded(fitted: tuple[nn.Module, ThresholdFit], images: Tensor, tmp_path: Path) -> None:
    gatedprune.save(fitted[0], tmp_path / "m")
    loaded = gatedprune.load(tmp_path / "m")
    assert loaded.gate_config.gate == "threshold" and torch.equal(run(loaded, images), run(fitted[0], images))
    small = loaded.prune_dead([images])
    torch.testing.assert_close(run(small.model, images), run(loaded, images), rtol=1e-4, atol=1e-5)


def test_winners_get_gradients_losers_none(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated = copy.deepcopy(fitted[0])
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.strength.fill_(0.1)
    gated(images[:1]).square().sum().backward()
    for gate in gated.gates.values():
        wins = gatedprune.functional.active_mask(gate.last_active, gate.channels)[0]
        assert gate.bias.grad is not None and not bool(gate.bias.grad[~wins].any())
    assert any(bool(gate.bias.grad.any()) for gate in gated.gates.values())


def test_losers_learn_straight_through(fitted: tuple[nn.Module, ThresholdFit], images: Tensor) -> None:
    gated = copy.deepcopy(fitted[0])
    wanted = run(gated.train(), images[:4])
    for gate in gated.gates.values():
        gate.straight_through = True
    found = gated(images[:4])
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)
    assert all(gate.last_whole.shape == (4, gate.channels) for gate in gated.gates.values())


def test_refusals(fitted: tuple[nn.Module, ThresholdFit], images: Tensor, tmp_path: Path) -> None:
    gated = copy.deepcopy(fitted[0])
    with pytest.raises(ConfigError, match="The `gate` of wrap"):
        gatedprune.GateConfig(gate="best")
    config = gatedprune.GateConfig(gate="threshold")
    assert gatedprune.GateConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="`rounds` of fit_thresholds"):
        gated.fit_thresholds([images], rounds=0)
    with pytest.raises(ModelError, match="is not gated"):
        fit_thresholds(nn.Identity(), [images])
    with pytest.raises(ModelError, match="wrap the model with gate='threshold'"):
        wrapped("topk", images).fit_thresholds([images])
    with pytest.raises(DataError, match="iterator"):
        gated.fit_thresholds(iter([images]))
    with pytest.raises(ExportError, match="gate='threshold' cannot be exported"):
        gatedprune.export(gated, tmp_path / "m.pt2", "torch-export", example_inputs=images[:2])
    before = {name: gate.threshold.clone() for name, gate in gated.gates.items()}
    for bad, match in (([], "are empty"), ([images * float("nan")], "not finite")):
        with pytest.raises(DataError, match=match):
            gated.fit_thresholds(bad)
        assert all(torch.equal(gate.threshold, before[name]) for name, gate in gated.gates.items())
