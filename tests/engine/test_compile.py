"""torch.compile takes masked and compact models whole, without a graph break, and gives their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import gatedprune
from gatedprune.engine import native


def gated_model(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, **({"img_size": 64} if "vit" in name else {})).eval()
    gated = gatedprune.wrap(model, 0.5, example_inputs=x)
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(0.3 * torch.randn_like(gate.weight))
    return gated.eval(), x


def assert_compiles(model: Any, x: Tensor, backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: a graph break is an error
    with torch.no_grad():
        for images in (x, x * 0.5 + 1):
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["masked", "torch", "native"])
def test_without_a_graph_break(name: str, backend: str, kind: str) -> None:
    gated, x = gated_model(name)
    if kind == "native":
        pytest.importorskip("ninja", reason="the native engine is built with ninja")
        if not native.load():
            pytest.skip("the native engine cannot be built here")
    assert_compiles(gated if kind == "masked" else gatedprune.compact(gated, x, backend=kind), x, backend)


def test_a_compiled_masked_model_is_trained() -> None:
    gated, x = gated_model("test_resnet")
    torch._dynamo.reset()
    compiled = torch.compile(gated.train(), fullgraph=True, backend="aot_eager")
    (compiled(x).square().mean() + gated.penalty()).backward()
    assert all(gate.weight.grad is not None and gate.weight.grad.any() for gate in gated.gates.values())
