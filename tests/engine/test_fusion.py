"""What layers of a lowered model take in, and what they must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine import native
from gatedprune.engine.compact import CompactModel
from gatedprune.engine.narrow import NarrowConv2d, NarrowLinear
from gatedprune.engine.selection import Selector
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

from ..tiny import SIZE, create

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")


def gate_up(model: nn.Module, *shape: int) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    gated = wrap(enliven(model).eval(), example_inputs=x)
    return excite(gated, (x,)), x


def operators(fast: CompactModel, x: Tensor) -> list[str]:
    return [str(n.target) for n in fast.prepare(x).graph.nodes if n.op == "call_function"]


def check(gated: GatedModel, fast: CompactModel, x: Tensor) -> None:
    with torch.no_grad():
        for batch in (x, x[:1]):
            want = gated(batch)
            torch.testing.assert_close(fast(batch), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_convolutions_take_in_what_follows() -> None:
    """Otherwise every map would be read and written again for its activation and for the next gate."""
    gated, x = gate_up(create("test_resnet"), 3, SIZE, SIZE)
    fast = compact(gated, x)
    layers = [m for m in fast.modules() if isinstance(m, NarrowConv2d)]
    assert any(m.activation == "relu" for m in layers) and any(m.subsample for m in layers)
    assert any(m.inplace for m in layers)
    assert any(m.subsampled for m in fast.modules() if isinstance(m, Selector))
    assert not [name for name in operators(fast, x) if "relu" in name or "aten.add" in name]


@pytest.mark.parametrize(("name", "options", "sums"), [
    ("test_convnext", {}, 0), ("test_vit", {"init_values": 0.5}, 1),  # position embeddings are added
])  # fmt: skip
def test_linear_layers_take_in_layer_scale_and_residual(name: str, options: dict, sums: int) -> None:
    """Of tokens, and where channels are moved to the front before they are scaled."""
    gated, x = gate_up(create(name, **options), 3, SIZE, SIZE)
    fast = compact(gated, x)
    layers = [m for m in fast.modules() if isinstance(m, NarrowLinear)]
    blocks = sum(path.endswith("mlp.fc2") for path, _ in gated.named_modules())
    assert blocks and sum(m.scale is not None for m in layers) >= blocks
    assert any(m.y_columns for m in layers) and any(m.x_columns for m in layers)
    names = operators(fast, x)
    assert len([n for n in names if "aten.add" in n]) == sums
    assert not any("gamma" in path for path, _ in fast.prepare(x).named_buffers())
    check(gated, fast, x)
    tuned = compact(gated, x, tune=dict.fromkeys(compact(gated, x, tune=True).tuning, "torch"))
    check(gated, tuned, x)


class Mlp(nn.Module):
    """Its result times a constant, behind a permutation or not, plus what entered."""

    def __init__(self, factors: Tensor, order: tuple[int, ...] | None, late: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 6)
        self.register_buffer("factors", factors)
        self.order, self.late = order, late

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        if self.order is not None:
            y, x = y.permute(self.order), x.permute(self.order)
        z = y * self.factors
        return z + y if self.late else z + x


@pytest.mark.parametrize(("factors", "order", "late", "taken"), [
    ((6,), None, False, True), ((1, 1, 6), None, False, True), ((6, 1), (0, 2, 1), False, True),
    ((6, 1), None, False, False),  # a factor for each token, of which there are as many as channels
    ((6,), (0, 2, 1), False, False), ((1,), None, False, False), ((6, 6), None, False, False),
    ((1, 1, 1, 6), None, False, False),  # the product has a dimension more
    ((6,), None, True, False),  # what is scaled is read as it was, too
])  # fmt: skip
def test_factors_are_taken_in_where_each_channel_has_one(factors: tuple[int, ...], order: tuple[int, ...] | None,
                                                         late: bool, taken: bool) -> None:  # fmt: skip
    gated, x = gate_up(Mlp(torch.rand(factors) + 0.5, order, late), 6, 6)
    fast = compact(gated, x)
    assert any(m.scale is not None for m in fast.modules() if isinstance(m, NarrowLinear)) is taken
    assert ("aten.mul.Tensor" not in operators(fast, x)) is taken
    check(gated, fast, x)
