"""Matched batch norms: what they do to the masked and the compact model, and that nothing of it stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.sites import suspended
from gatedprune.wrapping import apply_match

NORM = "blocks.3.0.bn3"


@pytest.fixture(scope="module")
def wrapped() -> Any:
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=10).eval().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return gatedprune.wrap(model, 0.5, example_inputs=torch.zeros(1, 3, 48, 48, dtype=torch.float64))


@pytest.fixture
def gated(wrapped: Any) -> Any:
    return copy.deepcopy(wrapped)


def image() -> Tensor:
    return torch.randn(2, 3, 48, 48, dtype=torch.float64)


def matched(model: Any) -> Any:
    channels = model.get_submodule(NORM).num_features
    scale, shift = torch.rand(channels, dtype=torch.float64) + 0.5, torch.randn(channels, dtype=torch.float64)
    model.gate_modules.set_match(NORM, scale, shift)
    return model


def run(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_the_norm_sees_a_scaled_and_shifted_input(gated: Any) -> None:
    model, x, seen = matched(gated), image(), []
    module = model.get_submodule(NORM)
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    module.register_forward_pre_hook(lambda m, args: seen.append(args[0]), prepend=True)
    run(model, x)
    before, after = seen
    assert torch.equal(after, apply_match(before, *model.gate_modules.match(NORM)))
    assert not torch.equal(before, after)


def test_compact_equals_masked(gated: Any) -> None:
    model, x = matched(gated), image()
    fast = gatedprune.compact(model, x, backend="torch")
    torch.testing.assert_close(fast(x), run(model, x), rtol=1e-10, atol=1e-10)
    assert model.gate_modules.matched == (NORM,), "compact() changed the model that it was made from"


def test_suspended_and_unwrapped_it_is_the_dense_model(gated: Any) -> None:
    x = image()
    with suspended(gated):
        dense = run(gated, x)
    before = {k: v.clone() for k, v in gated.backbone_state_dict().items()}
    matched(gated)
    with suspended(gated):
        assert torch.equal(run(gated, x), dense)
    assert gated.backbone_state_dict().keys() == before.keys()
    model = gatedprune.unwrap(gated)
    assert torch.equal(run(model, x), dense)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_ratio_takes_them_out(gated: Any) -> None:
    x = image()
    plain = run(gated, x)
    matched(gated)
    gated.set_ratio(0.5)  # the same as before
    assert gated.gate_modules.matched
    assert not torch.equal(run(gated, x), plain)
    gated.set_ratio(0.25)
    assert not gated.gate_modules.matched
    gated.set_ratio(0.5)
    assert torch.equal(run(gated, x), plain)
    matched(gated).reset_gates()
    assert not gated.gate_modules.matched


def test_state_dicts_carry_them(gated: Any) -> None:
    x = image()
    with torch.no_grad():  # untouched gates would be ranked anew by the weights of a backbone's checkpoint
        next(iter(gated.gates.values())).weight.fill_(1e-3)
    other = copy.deepcopy(gated)
    plain = {k: v.clone() for k, v in gated.state_dict().items()}
    wanted = run(matched(gated), x)
    other.load_state_dict(gated.state_dict(), strict=True)
    assert torch.equal(run(other, x), wanted)
    assert torch.equal(run(copy.deepcopy(other), x), wanted)
    other.load_state_dict(gated.backbone_state_dict(), strict=True)  # says nothing of gates
    assert torch.equal(run(other, x), wanted)
    other.load_state_dict(plain, strict=True)  # gates without matches
    assert not other.gate_modules.matched


def test_a_saved_model_has_them(gated: Any, tmp_path: Any) -> None:
    model, x = matched(gated).float(), image().float()
    gatedprune.save(model, tmp_path / "saved")
    assert torch.equal(run(gatedprune.load(tmp_path / "saved"), x), run(model, x))
