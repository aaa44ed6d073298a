"""Heads whose way leads through the batch, shared convolutions, position scores: they stay units, and stay narrow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.sites import find_sites
from gatedprune.testing import Case, check_model

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CHECKS = ["identity", "exactly_k", "static", "compact_float64", "compact_float32", "samples_independent", "macs_fall"]


class Pooled(nn.Module):
    """Attention whose queries, keys and values are pooled by one depthwise convolution for all heads, then normalised.

    Position scores are a sum over each head's queries, written in place; the queries are added to the result.
    """

    def __init__(self, heads: int = 4, size: int = 8, residual: bool = True) -> None:
        super().__init__()
        self.heads, self.size, self.residual = heads, size, residual
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
        y = scores.softmax(-1) @ v
        y = y + q if self.residual else y
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
        k, v = torch.split(kv, [self.size, self.size], -1)
        scores = q @ k.transpose(-1, -2) + q @ self.position.t()
        y = (scores.softmax(-1) @ v).transpose(1, 3)
        y = y.reshape(-1, 3, 3, 2, 2).permute(0, 3, 1, 4, 2).contiguous()
        return y.view(b, self.heads * self.size, h, w)


def pooled(**options: bool) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = nn.Conv2d(3, 16, 4), Pooled(**options), nn.Linear(16, 4)  # type: ignore[arg-type]

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).flatten(2).transpose(1, 2)
            return self.head(x + self.block(x))

    return Net().eval()


def folded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), Folded(), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)
    ).eval()


@pytest.mark.parametrize("make", [pooled, lambda: pooled(residual=False), folded], ids=["pooled", "plain", "folded"])
def test_the_contract(make) -> None:
    report = find_sites(make(), IMAGES)
    print(report)
    notes = check_model(Case(make, IMAGES, oracle="columns"), checks=CHECKS)
    print(notes)
    g = wrap(make(), 0.5, example_inputs=IMAGES)
    print(compact(g, IMAGES)._lowered["any:3x8x8"].graph)
    from gatedprune.measure import count_macs

    print(
        report.macs_left(0.5),
        count_macs(compact(g, IMAGES), IMAGES).total,
        count_macs(make(), IMAGES).total,
        report.macs,
    )
