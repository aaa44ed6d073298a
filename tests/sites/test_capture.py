"""Capturing leaves the model as it was, and knows that a module under two names is one module."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from gatedprune.sites import capture, find_sites

IMAGES = torch.zeros(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def remembered_exports() -> None:
    """Every model is traced."""


class Caching(nn.Module):
    """Keeps a constant that it has computed, until train() or eval() is called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.cache: dict[str, Tensor] = {}
        self.calls: list[int] = []

    def train(self, mode: bool = True) -> Caching:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if "twice" not in self.cache:
            self.cache["twice"] = self.weight * 2
        return x + self.cache["twice"]


def test_what_a_model_has_cached_stays() -> None:
    model = Caching().eval()
    model(IMAGES)
    cache, value = model.cache, model.cache["twice"]
    capture(model, (IMAGES,))
    assert model.cache is cache
    assert list(model.cache) == ["twice"]
    assert model.cache["twice"] is value


def test_caches_are_filled_in_silence() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(Caching().eval(), (IMAGES,))


class Shared(nn.Module):
    """One MLP under two names, called once under each."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1))
        self.two = self.one
        self.own = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        x = x + self.two(x.flip(3))
        return x + self.own(x)


def test_a_module_under_two_names_runs_twice() -> None:
    report = find_sites(Shared().eval(), IMAGES)
    assert [site.name for site in report] == ["own.0"]
    assert "runs once" in report.skipped["one.0"]
