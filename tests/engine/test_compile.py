"""torch.compile takes masked and compact (plain PyTorch) models whole, without a graph break, with their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatedprune

from ..tiny import SIZE, create


def gated_model(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, SIZE, SIZE)
    gated = gatedprune.wrap(create(name), 0.5, example_inputs=x)
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
@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_without_a_graph_break(name: str, backend: str, kind: str) -> None:
    gated, x = gated_model(name)
    assert_compiles(gated if kind == "masked" else gatedprune.compact(gated, x, backend="torch"), x, backend)
