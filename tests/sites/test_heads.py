"""Heads whose way leads through the batch, shared convolutions, position scores: they stay units, and stay narrow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine.narrow import Widen
from gatedprune.export import batched
from gatedprune.measure import count_macs
from gatedprune.sites import find_sites
from gatedprune.testing import Case, check_model

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CHECKS = ["identity", "static", "compact_float64", "compact_float32", "samples_independent", "macs_fall"]


class Pooled(nn.Module):
    """Attention whose queries, keys and values are pooled by one depthwise convolution for all heads, then normalised.

    Position scores are a sum over each head's queries, written in place; the queries are added to the result.
    """

    def __init__(self, heads: int = 4, size: int = 8) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(16, 3 * heads * size)
        self.pool = nn.ModuleList(nn.Conv2d(size, size, 3, 1, 1, groups=size, bias=False) for _ in range(3))
        self.norm = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))
        self.position = nn.Parameter(torch.randn(5, 5, size))
        self.proj = nn.Linear(heads * size, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        parts = []
        for t, pool, norm in zip((q, k, v), self.pool, self.norm, strict=True):
            maps = t.reshape(-1, 5, 5, self.size).permute(0, 3, 1, 2).contiguous()
            t = pool(maps).reshape(-1, self.heads, self.size, 25).transpose(2, 3)
            parts.append(norm(t))
        q, k, v = parts
        scores = (q * self.size**-0.5) @ k.transpose(-2, -1)
        rows = torch.einsum("byhwc,hkc->byhwk", q.reshape(b, self.heads, 5, 5, self.size), self.position)
        whole = scores.view(b, -1, 5, 5, 5, 5) + rows[..., None]
        scores[:, :, 0:, 0:] = whole.view(b, -1, 25, 25)
        y = scores.softmax(-1) @ v + q
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


class Folded(nn.Module):
    """Attention in overlapping windows, heads folded into the batch; position scores are a product with a constant."""

    def __init__(self, heads: int = 4, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q = nn.Conv2d(16, heads * size, 1)
        self.kv = nn.Conv2d(16, 2 * heads * size, 1)
        self.position = nn.Parameter(torch.randn(25, size))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q = self.q(x).reshape(-1, self.size, 2, 3, 2, 3).permute(0, 1, 3, 5, 2, 4)
        q = q.reshape(b * self.heads, self.size, -1, 4).transpose(1, 3)  # (B·heads, windows, places, size)
        kv = nn.functional.pad(self.kv(x), [1, 1, 1, 1])
        kv = kv.unfold(2, 5, 3).unfold(3, 5, 3).reshape(b * self.heads, 2 * self.size, 4, -1).permute(0, 2, 3, 1)
        k, v = self.split(kv)
        scores = (q @ k.transpose(-1, -2) + q @ self.position.t())[:, 0:4, 0:9]
        y = (scores.softmax(-1) @ v).transpose(1, 3)
        y = y.reshape(-1, 3, 3, 2, 2).permute(0, 3, 1, 4, 2).contiguous()
        return y.view(b, self.heads * self.size, h, w)

    def split(self, kv: Tensor) -> tuple[Tensor, ...]:
        return torch.split(kv, [self.size, self.size], -1)


def pooled() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 16, 4), Pooled(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(x + self.block(x))

    return Net().eval()


def folded(kind: type[Folded] = Folded) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), kind(), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()


@pytest.mark.parametrize("make", [pooled, folded])
def test_heads_obey_the_contract_and_stay_narrow(make: Callable[[], nn.Module]) -> None:
    report = find_sites(make(), IMAGES)
    name, readers = ("block.qkv", ["block.proj"]) if make is pooled else ("2.q", ["5"])
    assert report[name].channels == 4
    assert [edge.path for edge in report[name].consumers] == readers
    check_model(Case(make, IMAGES, oracle="columns"), checks=CHECKS)
    lowered = compact(wrap(make(), 0.5, example_inputs=IMAGES), IMAGES)
    # Attention itself is computed for the active heads only: what arithmetic foretells is what runs.
    assert count_macs(lowered, IMAGES).total == report.macs_left(0.5) < 0.6 * report.macs
    assert not any(isinstance(module, Widen) for module in lowered.modules())


def test_heads_in_the_batch_are_widened_before_what_is_not_understood() -> None:
    class Odd(Folded):
        def split(self, kv: Tensor) -> tuple[Tensor, ...]:
            k, v = super().split(kv)
            return k.cummax(1).values * 1.0, v

    report = find_sites(folded(Odd), IMAGES)
    assert "cummax" in report.skipped["2.kv"]

    class Turned(Folded):
        def split(self, kv: Tensor) -> tuple[Tensor, ...]:
            k, v = super().split(kv)
            return k.transpose(0, 1).contiguous().transpose(0, 1), v  # the samples themselves change places

    def make() -> nn.Module:
        return folded(Turned)

    assert find_sites(make(), IMAGES)["2.q"].channels == 4
    lowered = compact(wrap(make(), 0.5, example_inputs=IMAGES), IMAGES)
    assert any(isinstance(module, Widen) and module.dim == 0 for module in lowered.modules())
    check_model(Case(make, IMAGES, oracle="columns"), checks=["compact_float64", "compact_float32"])


def test_widening_heads_that_are_folded_into_the_batch() -> None:
    x, index = torch.arange(1.0, 9.0).view(4, 2), torch.tensor([[0, 2], [1, 2]])
    wide = Widen(0, 3)(x, index)
    wanted = [[1, 2], [0, 0], [3, 4], [0, 0], [5, 6], [7, 8]]
    assert torch.equal(wide, torch.tensor(wanted, dtype=torch.float32))
    assert torch.equal(batched.Widen(Widen(0, 3))(x, index), wide)


@pytest.mark.parametrize(
    ("equation", "factor", "units"),
    [
        ("bhnc,hc->bhn", (4, 8), 4),
        ("bhnc,ck->bhnk", (8, 8), 4),
        ("bhnc,hk->bknc", (4, 4), 8),
        ("...c,ck->...k", (8, 8), 0),
    ],
)
def test_sums_of_products(equation: str, factor: tuple[int, int], units: int) -> None:
    """What is summed over can only go together; what an ellipsis stands for is not looked into."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 32), nn.LazyLinear(64)
            self.factor = nn.Parameter(torch.randn(factor))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum(equation, self.first(x).unflatten(-1, (4, 8)).transpose(1, 2), self.factor)
            return self.last(y.view(*y.shape[:3], -1).transpose(1, 2).flatten(2))

    model, x = Net().eval(), torch.randn(2, 5, 6)
    model(x)
    report = find_sites(model, x)
    assert [site.channels for site in report] == ([units] if units else [])
    assert units or "einsum" in report.skipped["first"]


def test_padding_is_no_other_branch() -> None:
    """A padded row belongs to the channels that it is added to: no residual addition."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(x + nn.functional.pad(x[:, 1:].sigmoid() * x[:, 1:], (0, 0, 1, 0)))

    report = find_sites(Net().eval(), torch.randn(2, 5, 6))
    assert [(site.name, site.channels) for site in report] == [("first", 32)]
    check_model(
        Case(lambda: Net().eval(), torch.randn(3, 5, 6), oracle="columns"), checks=["static", "compact_float32"]
    )
