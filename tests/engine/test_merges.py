"""Sums of branches stay narrow: both operands hold the same active channels, and so does the sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, count_macs, wrap
from gatedprune.engine import narrow
from gatedprune.testing.case import enliven, excite

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def conv(c_in: int, c_out: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(c_out))


class Cell(nn.Module):
    """Two branches, a third one added to their sum; the concatenation of sums is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 16), conv(3, 16), conv(3, 16, 1)
        self.left, self.right = nn.Sequential(conv(16, 12), nn.SiLU()), nn.Sequential(conv(16, 12, 1), nn.ReLU())
        self.last = nn.Conv2d(28, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.a(x) + self.b(x)).add_(self.c(x)).relu()
        return self.last(torch.cat([self.left(x) + self.right(x), x], 1))


class Hierarchy(nn.Module):
    """Each part of a split is added to what a layer made of the part before it, in groups or not."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.first, self.last = conv(3, 96), nn.Conv2d(96, 6, 1)
        self.inside = nn.ModuleList(conv(32, 32, 3, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).relu().split(32, 1)
        done, y = [], parts[0]
        for i, layer in enumerate(self.inside):
            y = layer(y if i == 0 else y + parts[i]).relu()
            done.append(y)
        return self.last(torch.cat([*done, parts[2]], 1))


class Excited(nn.Module):
    """Squeeze-excite on a branch, and on the sum; a branch that is pooled and resized before it is added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 16), conv(3, 16, 1)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.down2, self.up2 = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.last = nn.Conv2d(16, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        a = a * self.up(self.down(a.mean((2, 3), keepdim=True)).relu()).sigmoid()
        b = nn.functional.interpolate(nn.functional.max_pool2d(self.b(x).relu(), 2), scale_factor=2)
        x = a + b
        return self.last(x * self.up2(self.down2(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


class Awake(nn.Module):
    """A branch whose activation wakes suppressed channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(3, 16), conv(3, 16), nn.Conv2d(16, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.a(x).sigmoid() - self.b(x))


NETS: dict[str, Callable[[], nn.Module]] = {
    "cell": Cell,
    "hierarchy": lambda: Hierarchy(1),
    "hierarchy of few groups": lambda: Hierarchy(2),
    "hierarchy of many groups": lambda: Hierarchy(16),
    "squeeze-excite": Excited,
    "awake": Awake,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("boost", [True, False])
def test_compact_equals_masked_and_nothing_is_widened(name: str, boost: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64) * torch.tensor([0.4, 1.0, 2.0]).view(
        3, 1, 1, 1
    )
    gated = excite(wrap(enliven(NETS[name]()).eval().double(), example_inputs=x, boost=boost), (x,))
    assert max(len(site.gain_at) for site in gated.gated_sites) >= (1 if "many" in name else 2)
    fast = compact(gated, x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), gated(x), **EXACT)
        torch.testing.assert_close(fast(x[1:2]), gated(x)[1:2], **EXACT)
    assert not any(isinstance(m, (narrow.Widen, narrow.Take)) for m in fast.modules())
    assert count_macs(fast, x).total == gated.site_report.macs_left(0.5)


@pytest.mark.parametrize("name", ["cell", "squeeze-excite"])
def test_in_float32_by_the_backend_at_hand(name: str) -> None:
    x = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    gated = excite(wrap(enliven(NETS[name]()).eval(), example_inputs=x), (x,))
    with torch.no_grad():
        torch.testing.assert_close(compact(gated, x)(x), gated(x), rtol=1e-4, atol=1e-4)
