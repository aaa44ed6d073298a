"""F(2×2, 3×3): the transformed weights, and which layers are computed so."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

import gatedprune
from gatedprune.engine import NarrowConv2d, native
from gatedprune.engine.winograd import pays, restore_weight, transform_weight

# B and A of Lavin and Gray's equation 7.
B_T = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
A_T = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)
OPTIONS = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


def test_a_tile_by_the_equation() -> None:
    tile, weight = torch.randn(1, 5, 4, 4, dtype=torch.float64), torch.randn(3, 5, 3, 3, dtype=torch.float64)
    transformed = transform_weight(weight).view(4, 4, 3, 5)
    inside = B_T @ tile[0] @ B_T.T
    found = A_T @ torch.einsum("abok,kab->oab", transformed, inside) @ A_T.T
    torch.testing.assert_close(found, F.conv2d(tile, weight)[0], rtol=1e-12, atol=1e-12)


def test_weights_are_transformed_in_float64() -> None:
    weight = torch.randn(4, 4, 3, 3)
    transformed = transform_weight(weight)
    assert torch.equal(transformed, transform_weight(weight.double()).float())
    torch.testing.assert_close(restore_weight(transformed), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "change", "size", "wanted"),
    [
        ((64, 64, 3, 3), {}, (28, 28), True),
        ((64, 64, 3, 3), {}, (7, 7), False),
        ((256, 256, 3, 3), {}, (14, 14), False),
        ((256, 256, 3, 3), {}, (60, 80), True),
        ((64, 3, 3, 3), {}, (56, 56), False),
        ((64, 64, 1, 1), {}, (56, 56), False),
        ((64, 64, 3, 3), {"stride": (2, 2)}, (56, 56), False),
        ((64, 64, 3, 3), {"dilation": (1, 2)}, (56, 56), False),
        ((64, 32, 3, 3), {"groups": 2}, (56, 56), False),
    ],
)
def test_where_it_pays(shape: tuple[int, ...], change: dict, size: tuple[int, int], wanted: bool) -> None:
    assert pays(torch.zeros(shape), {**OPTIONS, **change}, size) == wanted


@pytest.mark.skipif(not native.load(), reason="no native engine here")
def test_each_size_of_image_by_itself() -> None:
    model = timm.create_model("resnet18").eval()
    gated = gatedprune.wrap(model, ratio=0.5).eval()
    compact = gatedprune.compact(gated)
    transformed = []
    for size in (64, 128, 256):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            torch.testing.assert_close(compact(x), gated(x), rtol=1e-4, atol=1e-4)
        layers = [m for m in compact.prepare(x).modules() if isinstance(m, NarrowConv2d)]
        transformed.append(sum(m.winograd for m in layers))
    # 64 channels on maps of 32×32 and 64×64, not on 16×16; 128 channels on 32×32.
    assert transformed == [0, 4, 7]


@pytest.mark.skipif(not native.load(), reason="no native engine here")
def test_a_layer_tuned_to_pytorch_has_its_own_weights_again() -> None:
    gated = gatedprune.wrap(timm.create_model("resnet18").eval(), ratio=0.5).eval()
    x = torch.randn(1, 3, 128, 128)
    layers = {n: m for n, m in gatedprune.compact(gated, x).prepare(x).named_modules() if isinstance(m, NarrowConv2d)}
    fast = [name for name, layer in layers.items() if layer.winograd]
    assert fast
    compact = gatedprune.compact(gated, x, tune=dict.fromkeys(fast, "torch"))
    tuned = compact.prepare(x)
    for name in fast:
        layer = tuned.get_submodule(name)
        assert isinstance(layer, NarrowConv2d) and not layer.winograd and not layer.native and layer.weight.dim() == 4
    with torch.no_grad():
        torch.testing.assert_close(compact(x), gated(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.load(), reason="no native engine here")
def test_elsewhere_the_weights_are_restored() -> None:
    weight, bias = torch.randn(32, 24, 3, 3), torch.randn(32)
    layer = NarrowConv2d(weight, bias, (1, 1), (1, 1), (1, 1), 1, native=True, winograd=True)
    plain = NarrowConv2d(weight, bias, (1, 1), (1, 1), (1, 1), 1)
    x, index = torch.randn(2, 5, 9, 8), torch.tensor([[0, 3, 4, 11, 23]])
    torch.testing.assert_close(layer(x, index), plain(x, index), rtol=1e-5, atol=1e-5)
    layer.native = False
    torch.testing.assert_close(layer(x, index), plain(x, index), rtol=1e-5, atol=1e-5)
    assert str(layer) == str(plain)
