"""Weights whose rows lie apart: the same numbers, wherever they are read."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatedprune import compact, wrap
from gatedprune.engine import NarrowConv2d, NarrowLinear, native
from gatedprune.engine.rows import LINE, rows_apart
from gatedprune.engine.tuning import apply_tuning

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")


@pytest.mark.parametrize("shape", [(3, 512), (3, 1024, 1, 1), (2, 512, 3, 3), (2, 2048, 1, 1)])
def test_a_line_between_long_rows(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    apart = rows_apart(weight)
    assert torch.equal(apart, weight)
    assert apart.stride(0) * 4 == weight.stride(0) * 4 + LINE
    assert apart[0].is_contiguous()


@pytest.mark.parametrize("shape", [(3, 500), (3, 256, 1, 1), (4, 64, 3, 3), (4, 0), (0, 512), (1, 512)])
def test_others_are_left(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    assert rows_apart(weight) is weight


@needs_native
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_reads_them(kernel: int, indexed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 512, kernel, kernel) / 50
    active = torch.randperm(512)[:300].sort().values[None] if indexed else None
    rows = torch.randperm(20)[:9].sort().values[None] if indexed else None
    x = torch.randn(1, 300 if indexed else 512, 7, 9)
    options = {"stride": (1, 1), "padding": (kernel // 2,) * 2, "dilation": (1, 1), "groups": 1, "native": True}
    found = NarrowConv2d(rows_apart(weight), None, **options)(x, active, rows)
    full = weight if rows is None else weight[rows[0]]
    wanted = F.conv2d(x, full if active is None else full[:, active[0]], padding=kernel // 2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@needs_native
def test_linear_reads_them() -> None:
    torch.manual_seed(0)
    weight, active = torch.randn(20, 1024) / 50, torch.randperm(1024)[:77].sort().values[None]
    x = torch.randn(1, 5, 77)
    found = NarrowLinear(rows_apart(weight), None, native=True)(x, active)
    torch.testing.assert_close(found, x @ weight[:, active[0]].T, rtol=1e-5, atol=1e-5)


@needs_native
def test_where_they_are_used() -> None:
    """Only in copies that folding a norm makes; copied models keep them, and layers left to PyTorch do not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 512, 1), nn.BatchNorm2d(512), nn.ReLU(), nn.Conv2d(512, 512, 1), nn.BatchNorm2d(512), nn.ReLU(),
        nn.Conv2d(512, 512, 1),
    ).eval()  # fmt: skip
    x = torch.randn(1, 8, 7, 7)
    fast = compact(wrap(model, example_inputs=x), x)
    for graph in (fast.prepare(x), copy.deepcopy(fast).prepare(x)):
        layers = {n: m for n, m in graph.named_modules() if isinstance(m, NarrowConv2d)}
        assert [layer.weight.is_contiguous() for layer in layers.values()] == [True, False, True]
    wanted = fast(x)
    apply_tuning(graph, dict.fromkeys(layers, "torch"))
    assert all(layer.weight.is_contiguous() for layer in layers.values())
    torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)
