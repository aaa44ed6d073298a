"""Matching: mean and variance of what batch norms see, as in the dense model, and which norms follow a reader."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import gatedprune
from gatedprune.sites import suspended
from gatedprune.training import bake_norms, match_norms
from gatedprune.training.matching import LIMIT, Matching, Rows, following_norms, match, moments_of


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


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_the_gated_model_s_norms_see_the_dense_moments(name: str) -> None:
    """In one batch, where the match that is kept is that of the batch; the later norms behind matched earlier ones.

    Of a site's channels over the samples for which they win; of all others over all samples.
    """
    model, x = choosy(name), torch.randn(6, 3, 48, 48).double() + torch.randn(6, 3, 1, 1).double()
    paths, partly = match_norms(model, [x]), 0
    assert paths == model.gate_modules.matched
    for path in paths:
        with suspended(model):
            wanted = seen_by(model, path, x)
        found, wins, scale = seen_by(model, path, x), winners(model, path), model.gate_modules.match(path)[0]
        for c in range(found.shape[1]):
            rows = torch.ones(len(x), dtype=torch.bool) if wins is None else wins[:, c]
            if rows.any():
                partly += not rows.all()
                mine, dense = moments_of(found[rows, c : c + 1]), moments_of(wanted[rows, c : c + 1])
                torch.testing.assert_close(mine[0], dense[0], rtol=1e-6, atol=1e-8)
                if scale[c] not in (1.0, LIMIT, 1 / LIMIT):  # nothing to stretch, or by no more
                    torch.testing.assert_close(mine[1], dense[1], rtol=1e-6, atol=1e-8)
            else:
                assert scale[c] == 1
    assert partly > 20, "hardly a channel wins for some samples and loses for others"


def test_all_norms_are_matched_whose_input_is_another() -> None:
    """Not those before the first channel that is suppressed, nor where every channel stays."""
    model, x = choosy("test_resnet"), torch.randn(6, 3, 48, 48).double()
    paths = match_norms(model, [x])
    norms = [p for p, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [p for p in norms if p not in paths] == ["conv1.1"]
    for gate in model.gates.values():
        gate.active_count = gate.channels
        gate.strength.data.zero_()
    assert match_norms(model, [x]) == ()


def choosy(name: str) -> Any:
    """Gates that choose other channels for each image."""
    torch.manual_seed(0)
    model = gated(name)
    for gate in model.gates.values():
        torch.nn.init.normal_(gate.weight, std=2.0)
    return model


def winners(model: Any, path: str) -> Tensor | None:
    """(B, C) of the norm, bool, after a gated pass; None: its channels are those of no site."""
    for site in model.gated_sites:
        for edge in site.carriers:
            if edge.path == path:
                gate = model.gates[site.name]
                return torch.stack([torch.isin(edge.units, active) for active in gate.last_active])
    return None


def test_baked_norms_compute_what_matched_ones_did() -> None:
    """In eval mode, and in training, where the matches do nothing."""
    model, x = choosy("test_resnet"), torch.randn(6, 3, 48, 48).double()
    paths = match_norms(model, [x])
    with torch.no_grad():
        wanted, trained = model(x), copy.deepcopy(model).train()(x)
    before = {path: model.get_submodule(path).running_var.clone() for path in paths}
    assert bake_norms(model) == paths and model.gate_modules.matched == ()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-12)
        # But for ε, in norms of few numbers.
        torch.testing.assert_close(model.train()(x), trained, rtol=1e-2, atol=1e-4)
    assert all(not torch.equal(model.get_submodule(path).running_var, before[path]) for path in paths)
    assert bake_norms(model) == ()


def test_batches_add_up() -> None:
    model, x = choosy("test_resnet"), torch.randn(6, 3, 48, 48).double()
    match_norms(model, [x])
    first = "conv1.4"  # no match before it, which would depend on the batch
    wanted = model.gate_modules.match(first)
    match_norms(model, [x[:2], x[2:]])
    torch.testing.assert_close(model.gate_modules.match(first), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3)])
def test_rows_have_their_own_moments(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).double()
    rows = Rows.of(x)
    for r in range(shape[0]):
        mean, var = moments_of(x[r : r + 1])
        torch.testing.assert_close(rows.mean[r], mean)
        torch.testing.assert_close(rows.square[r], var + mean.square())


def test_each_call_of_a_norm_is_matched_to_the_same_call_in_the_dense_pass() -> None:
    """Of a norm that runs twice in a pass, on numbers of another size; and so in a second gated pass."""
    norm = torch.nn.BatchNorm1d(4).double().eval()
    model = choosy("test_resnet")
    model.add_module("extra", norm)
    with Matching(model, ["extra"]) as matching:
        x, y = torch.randn(6, 4).double(), 3 + torch.randn(6, 4, 5).double()
        for v in (x, y):
            norm(v)
        matching.dense = False
        for _ in range(2):
            for v in (x, y):
                torch.testing.assert_close(norm(2 * v + 1), norm_of(norm, v))
        matching.dense = True
        norm(y)
        matching.dense = False
        torch.testing.assert_close(norm(y - 5), norm_of(norm, y))


def norm_of(norm: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def test_tokens_folded_into_the_batch_count_where_their_sample_does() -> None:
    """Three rows of the norm's input to a sample, as of windows."""
    model = choosy("test_resnet")
    site = model.gated_sites[0]
    with Matching(model, [site.carriers[0].path]) as matching, torch.no_grad():
        model(torch.eye(3)[:2, :, None, None].double() * torch.randn(2, 3, 48, 48).double())  # one red, one green
        found = matching._winners(site.carriers[0].path, 6)
    wins = winners(model, site.carriers[0].path)
    assert found is not None and wins is not None
    assert torch.equal(found, torch.stack([wins[r // 3] for r in range(6)]))
    assert not torch.equal(found[2], found[3])


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
