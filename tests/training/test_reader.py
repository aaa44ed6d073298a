"""Costs of suppression against the change of the output's squared error, computed by doing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedprune.sites import Edge
from gatedprune.training.matching import match, moments_of
from gatedprune.training.reader import Reader, squared_weights

B, C, K = 3, 6, 4


def reader(module: nn.Module, units: Tensor | None = None, norm: nn.Module | None = None) -> Reader:
    op = "linear" if isinstance(module, nn.Linear) else "conv2d"
    edge = Edge("reader", op, 1, torch.arange(C) if units is None else units)
    return Reader(module.double(), edge, C, None if norm is None else norm.double().eval())


def mask_of(active: Tensor) -> Tensor:
    return torch.zeros(B, C, dtype=torch.float64).scatter_(1, active, 1.0)


def places(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def by_doing(module: Any, x: Tensor, active: Tensor, norm: Any = None) -> Tensor:
    """Σ over outputs of the mean over places of the squared error, suppressed minus kept, channel by channel."""
    mask = mask_of(active)
    view = (B, C, *[1] * (x.dim() - 2))
    whole, kept = module(x), module(x * mask.view(view))
    scale, shift, counts = torch.ones(1), torch.zeros(1), torch.ones(1)
    if norm is not None:
        scale, shift = match(moments_of(kept), moments_of(whole))
        counts = norm.weight.square() / (norm.running_var + norm.eps)
    wide = (1, -1, *[1] * (x.dim() - 2))

    def error(m: Tensor) -> Tensor:
        e = module(x * m.view(view)) * scale.view(wide) + shift.view(wide) - whole
        e = e.square() * counts.view(wide)
        return (e.mean(places(e)) if places(e) else e).sum(1)

    costs = torch.zeros(B, C, dtype=torch.float64)
    for j in range(C):
        off, on = mask.clone(), mask.clone()
        off[:, j], on[:, j] = 0, 1
        costs[:, j] = error(off) - error(on)
    return costs


def active_sets() -> Tensor:
    return torch.stack([torch.randperm(C)[:K].sort().values for _ in range(B)])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_of_a_convolution(groups: int, normed: bool) -> None:
    """1×1, where what a channel alone gives is known exactly; in groups, and behind it a norm that is matched."""
    module = nn.Conv2d(C, 8, 1, groups=groups)
    norm = nn.BatchNorm2d(8) if normed else None
    if norm is not None:
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
    found = reader(module, norm=norm)
    x, active = torch.rand(B, C, 5, 5, dtype=torch.float64), active_sets()
    torch.testing.assert_close(found.costs(x, active, B), by_doing(module, x, active, norm), rtol=1e-9, atol=1e-12)
    assert bool((found.costs(x, active, B) < 0).any()) or not normed


@torch.no_grad()
def test_of_a_linear_layer_and_a_transposed_convolution() -> None:
    x, active = torch.randn(B, C, dtype=torch.float64), active_sets()
    module: nn.Module = nn.Linear(C, 7)
    torch.testing.assert_close(reader(module).costs(x, active, B), by_doing(module, x, active), rtol=1e-9, atol=1e-12)
    x, module = torch.randn(B, C, 4, 4, dtype=torch.float64), nn.ConvTranspose2d(C, 4, 1, groups=2)
    torch.testing.assert_close(reader(module).costs(x, active, B), by_doing(module, x, active), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_with_all_channels_there_a_cost_is_the_channel_s_own() -> None:
    x, module = torch.randn(B, C, 5, 5, dtype=torch.float64), nn.Conv2d(C, 8, 1)
    found = reader(module)
    wanted = x.square().mean((2, 3)) * module.weight.square().sum((0, 2, 3))
    torch.testing.assert_close(found.costs(x, None, B), wanted, rtol=1e-12, atol=0)
    everything = torch.arange(C).expand(B, C)
    torch.testing.assert_close(found.costs(x, everything, B), wanted, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_channels_of_a_unit_and_windows_are_added_up() -> None:
    """Channels 0 and 3 are unit 1, channel 2 belongs to another site; two windows a sample."""
    units = torch.tensor([1, 0, -1, 1])
    module = nn.Linear(4, 5).double()
    found = Reader(module, Edge("reader", "linear", 1, units), 2, None)
    x = torch.randn(2 * B, 3, 4, dtype=torch.float64)
    single = x.square().mean(1) * module.weight.square().sum(0)
    single = single.view(B, 2, 4).mean(1)
    wanted = torch.stack([single[:, 1], single[:, 0] + single[:, 3]], 1)
    torch.testing.assert_close(found.costs(x, None, B), wanted, rtol=1e-12, atol=0)


def test_weights_that_cannot_be_seen() -> None:
    edge = Edge("reader", "conv2d", 1, torch.arange(C))
    assert squared_weights(nn.ReLU(), edge) is None
    assert squared_weights(nn.Conv2d(C + 1, 2, 1), edge) is None
