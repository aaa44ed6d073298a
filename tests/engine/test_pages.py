"""A model's tensors on large pages: the same numbers, in as much memory."""

from __future__ import annotations

import copy
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine import native, pages

needs_large_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages")


class Mixed(nn.Module):
    """Tied, strided, of other types, empty, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(512, 2000), nn.Linear(512, 2000)
        self.other.weight = self.one.weight
        self.register_buffer("rows", torch.randn(300, 512 + 16)[:, 3:515])
        self.register_buffer("short", torch.randn(700, 33).bfloat16())
        self.register_buffer("numbers", torch.arange(70_001))
        self.register_buffer("nothing", torch.zeros(0, 5))
        self.register_buffer("meta", torch.zeros(3, device="meta"), persistent=False)


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@needs_large_pages
def test_the_same_tensors() -> None:
    model = Mixed()
    before, wanted, places = tensors(model), copy.deepcopy(model.state_dict()), [t.data_ptr() for t in tensors(model)]
    strides = [t.stride() for t in before]
    assert pages.move(model)
    after = tensors(model)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert [t.stride() for t in after] == strides and model.other.weight is model.one.weight
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    moved = [t for t, place in zip(after, places, strict=True) if t.data_ptr() != place]
    assert {id(t) for t in moved} == {id(t) for t in after if t.numel() and t.device.type == "cpu"}
    inside = sorted(t.untyped_storage().data_ptr() for t in moved)
    assert inside[0] % pages.LARGE == 0 and all(at % 64 == 0 for at in inside)
    assert len(set(inside)) == len(inside) and inside[-1] - inside[0] < 8e6  # side by side, none over another


@needs_large_pages
def test_memory_of_others_stays() -> None:
    model, owner = Mixed(), nn.Linear(512, 2000)
    model.one.weight = owner.weight
    at = owner.weight.data_ptr()
    assert pages.move(model, besides=owner)
    assert owner.weight.data_ptr() == at and model.one.bias.data_ptr() != at


def test_small_models_stay() -> None:
    model = nn.Linear(10, 10)
    at = model.weight.data_ptr()
    assert not pages.move(model) and model.weight.data_ptr() == at


def test_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixed()
    at = model.one.weight.data_ptr()

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("out of memory")

    monkeypatch.setattr(pages.mmap, "mmap", refuse)
    assert not pages.move(model)
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert not pages.move(model) and model.one.weight.data_ptr() == at


@needs_large_pages
@pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")
def test_compact_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 512, 3, padding=1), nn.BatchNorm2d(512), nn.ReLU(), nn.Conv2d(512, 512, 1), nn.ReLU()]
    gated = wrap(nn.Sequential(*layers, nn.Conv2d(512, 300, 1)).eval(), example_inputs=torch.randn(1, 3, 9, 9))
    places = {name: value.data_ptr() for name, value in gated.state_dict().items()}
    fast = compact(gated, torch.randn(1, 3, 9, 9))
    assert {name: value.data_ptr() for name, value in gated.state_dict().items()} == places
    x, larger = torch.randn(2, 3, 9, 9), torch.randn(1, 3, 20, 12)
    with torch.no_grad():
        wanted = [gated(x), gated(larger)]
    again = copy.deepcopy(fast)
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    for model in (fast, again, loaded):
        found = [model(x), model(larger)]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.double()(x.double()), gated.double()(x.double()))
