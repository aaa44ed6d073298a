"""Matching: mean and variance of what batch norms see, as in the dense model, and which norms follow a reader."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

import gatedprune
from gatedprune.sites import suspended
from gatedprune.training import match_norms
from gatedprune.training.matching import following_norms, match, moments_of


def gated(name: str = "test_efficientnet", ratio: float = 0.5) -> Any:
    model = timm.create_model(name, num_classes=10).eval().double()
    return gatedprune.wrap(model, ratio, example_inputs=torch.zeros(1, 3, 48, 48, dtype=torch.float64))


def seen_by(model: Any, path: str, x: Tensor) -> Tensor:
    """What the norm computes with: the last of its hooks sees it."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def test_match_gives_the_wanted_moments() -> None:
    x, y = torch.randn(4, 3, 5, 5).double() * 3 + 1, torch.randn(4, 3, 5, 5).double() - 2
    x[:, 2] = 7.0  # constant: nothing to stretch
    scale, shift = match(moments_of(x), moments_of(y))
    mean, var = moments_of(x * scale[:, None, None] + shift[:, None, None])
    torch.testing.assert_close(mean, moments_of(y)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(var[:2], moments_of(y)[1][:2], rtol=1e-9, atol=1e-9)
    assert scale[2] == 1


def test_the_gated_model_s_norms_see_the_dense_moments() -> None:
    """In one batch, where the match that is kept is that of the batch; the later norms behind matched earlier ones."""
    model, x = gated(), torch.randn(6, 3, 48, 48).double() + torch.randn(6, 3, 1, 1).double()
    paths = match_norms(model, [x])
    assert paths == model.gate_modules.matched
    assert len(paths) > 1
    for path in paths:
        with suspended(model):
            wanted = moments_of(seen_by(model, path, x))
        for found, value in zip(moments_of(seen_by(model, path, x)), wanted, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-8)
    # More batches: the same sums.
    batches = gated_like(model)
    match_norms(batches, [x[:3], x[3:]])
    first = model.gate_modules.match(paths[0]), batches.gate_modules.match(paths[0])
    torch.testing.assert_close(first[0], first[1], rtol=1e-9, atol=1e-9)


def gated_like(model: Any) -> Any:
    import copy

    other = copy.deepcopy(model)
    other.gate_modules.clear_matches()
    return other


def test_norms_follow_what_reads_a_site() -> None:
    """The projection's norm, and not that of the depthwise layer, which a suppressed channel reaches alone."""
    model = gated()
    with torch.no_grad(), suspended(model):
        found = following_norms(model, torch.zeros(1, 3, 48, 48).double())
    assert found["blocks.3.0.conv_pwl"] == "blocks.3.0.bn3"
    assert not any(path.endswith("bn2") for path in found.values() if "blocks.3.0" in path)
    assert all(isinstance(model.get_submodule(p), torch.nn.BatchNorm2d) for p in found.values())


def test_without_batch_norms_there_is_nothing_to_match() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=48).eval()
    model = gatedprune.wrap(model, 0.5, example_inputs=torch.zeros(1, 3, 48, 48))
    found = model.calibrate([torch.randn(4, 3, 48, 48)], rounds=2)
    assert found.norms == ()
