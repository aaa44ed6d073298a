"""Minimal filtering: which layers are computed so. The kernel is tested in `native`."""

from __future__ import annotations

import pytest
import timm
import torch

import gatedprune
from gatedprune.engine import NarrowConv2d, native
from gatedprune.engine.winograd import pays

OPTIONS = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


@pytest.mark.parametrize(
    ("shape", "change", "size", "wanted"),
    [
        ((64, 64, 3, 3), {}, (28, 28), True),
        ((64, 64, 3, 3), {}, (7, 7), False),
        ((256, 256, 3, 3), {}, (14, 14), True),
        ((256, 3072, 3, 3), {}, (14, 20), True),
        ((64, 3, 3, 3), {}, (56, 56), False),
        ((64, 64, 1, 1), {}, (56, 56), False),
        ((64, 64, 3, 3), {"stride": (2, 2)}, (56, 56), False),
        ((64, 64, 3, 3), {"dilation": (1, 2)}, (56, 56), False),
        ((64, 32, 3, 3), {"groups": 2}, (56, 56), False),
        ((64, 3, 7, 7), {"stride": (2, 2)}, (112, 112), True),
        ((64, 3, 7, 7), {"stride": (2, 2)}, (16, 16), False),
        ((64, 1, 7, 7), {"stride": (2, 2)}, (112, 112), False),
        ((64, 3, 7, 7), {"stride": (4, 4)}, (56, 56), False),
        ((64, 3, 7, 7), {}, (112, 112), False),
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
    # 3×3 on maps of 16×16 and more: those of the first stage, of the second one too, of the third one. 7×7 from 128 on.
    assert transformed == [4, 8, 11]
