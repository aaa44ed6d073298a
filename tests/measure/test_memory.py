"""Memory: a peak that can be worked out by hand, weights that are shared, the same number each time."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import DataError
from gatedprune.measure import Memory, measure_memory

FLOATS = 4  # bytes


class Steps(nn.Module):
    """Alive at once: a and b, 30 kfloats, while the sum makes 10 more; then everything but the result goes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(500))
        self.same = self.weight
        self.view = nn.Parameter(self.weight.detach()[:100])
        self.register_buffer("other", torch.zeros(70))

    def forward(self, x: Tensor) -> Tensor:
        a = x.expand(20_000).clone()
        b = a[:10_000].clone()
        b = b + 1
        del a
        return b[:10].clone()


def test_the_peak_is_the_worst_moment() -> None:
    found = measure_memory(Steps(), torch.zeros(1))
    assert found.weights == (500 + 70) * FLOATS
    assert found.working == pytest.approx((20_000 + 10_000 + 10_000) * FLOATS, rel=0.01)
    assert found.peak == found.weights + found.working == found.to_dict()["peak"]


def test_the_compact_model_needs_less_and_says_so_each_time() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    x = torch.randn(1, 3, 96, 96)
    dense = measure_memory(model, x)
    assert dense.weights == sum(v.numel() * v.element_size() for v in model.state_dict().values())
    fast = gatedprune.compact(gatedprune.wrap(model, 0.75, example_inputs=x), x)
    compact = measure_memory(fast, x)
    assert compact.working < dense.working
    assert compact == measure_memory(fast, x)


def test_functions_and_what_is_refused() -> None:
    assert measure_memory(lambda x: x + x, torch.zeros(1000)) == Memory(0, 1000 * FLOATS)
    with pytest.raises(DataError, match=r"measure_memory\(\)"):
        measure_memory(nn.ReLU(), ())
