"""What the suite remembers of tracing: weights are a model's own, and what may compute something else is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .exports import RememberedExports

IMAGES = torch.ones(2, 3)


class Model(nn.Module):
    def __init__(self, times: float = 2.0, tied: bool = False) -> None:
        super().__init__()
        self.times, self.settings, self.table = times, {"also": [1, (2, None)]}, torch.arange(3)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("shift", torch.rand(3))
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.times + self.shift + self.table


@pytest.fixture
def traced() -> list[nn.Module]:
    return []


@pytest.fixture
def exports(traced: list[nn.Module]) -> RememberedExports:
    def export(model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Any:
        traced.append(model)
        return torch.export.export(model, args, dynamic_shapes=shapes)

    return RememberedExports(export)


def test_a_model_that_is_built_alike_has_its_own_weights(exports: RememberedExports, traced: list[nn.Module]) -> None:
    models = [Model(), Model(), Model()]
    for model in models:
        torch.testing.assert_close(exports(model, (IMAGES,), None).module()(IMAGES), model(IMAGES))
    assert traced == models[:1]


def add_hook(model: Model) -> None:
    model.a.register_forward_hook(lambda module, args, y: -y)


def set_times(model: Model) -> None:
    model.times = 3.0


def set_setting(model: Model) -> None:
    model.settings["also"][1] = (2, "x")  # type: ignore[index]


def set_table(model: Model) -> None:
    model.table = torch.arange(3) + 1


def set_forward(model: Model) -> None:
    model.forward = lambda x: x  # type: ignore[method-assign]


def set_layer(model: Model) -> None:
    model.b = nn.Linear(3, 3, bias=False)


@pytest.mark.parametrize("change", [add_hook, set_times, set_setting, set_table, set_forward, set_layer, Model.double])
def test_a_model_that_differs_is_traced(change: Any, exports: RememberedExports, traced: list[nn.Module]) -> None:
    exports(Model(), (IMAGES,), None)
    model = Model()
    change(model)
    x = IMAGES.to(model.a.weight.dtype)
    torch.testing.assert_close(exports(model, (x,), None).module()(x), model(x))
    assert len(traced) == 2


def test_tied_weights_and_other_inputs_are_traced(exports: RememberedExports, traced: list[nn.Module]) -> None:
    for model, args in ((Model(), IMAGES), (Model(tied=True), IMAGES), (Model(), IMAGES[:1])):
        exports(model, (args,), None)
    assert len(traced) == 3
