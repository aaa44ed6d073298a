"""Recorded runs: the same numbers as the graph, for every model, and the graph itself where somebody looks at it."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from gatedprune import compact, wrap
from gatedprune.engine import CompactModel, native
from gatedprune.engine.program import Programs, record
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

from ..tiny import SIZE, create

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")


def gate_up(name: str) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, SIZE, SIZE)
    return excite(wrap(enliven(create(name)), example_inputs=x), (x,)), x


def program_of(fast: CompactModel, x: Tensor) -> Any:
    return fast._programs.find(fast._programs.key((x,)))


@pytest.fixture(scope="module")
def fast() -> CompactModel:
    gated, x = gate_up("test_resnet")
    return compact(gated, x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE)


@pytest.fixture
def called(fast: CompactModel, x: Tensor) -> Callable[[], int]:
    """How often the graph itself was called: by a program never. Counted without hooks, which it would notice."""
    graph, count = fast.prepare(x), []
    forward = graph.forward

    def counting(*args: Any) -> Any:
        count.append(1)
        return forward(*args)

    graph.__dict__["forward"] = counting
    yield lambda: len(count)
    del graph.__dict__["forward"]


# Made of the same operators as another one.
ALIKE = ("test_convnext2", "test_convnext3", "test_efficientnet_evos", "test_efficientnet_ln", "test_vit2", "test_vit4")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in timm.list_models("test_*")]
)
def test_equals_the_graph(name: str) -> None:
    gated, x = gate_up(name)
    fast = compact(gated, x)
    graph = fast.prepare(x)
    for images in (x, x[:1], torch.randn_like(x)):
        first = fast(images)
        assert program_of(fast, images).size > 5
        again, active = fast(images), fast.last_active
        with torch.no_grad():
            wanted = graph(images)
        assert torch.equal(again, wanted) and torch.equal(first, wanted)
        assert {n: a.tolist() for n, a in active.items()} == {n: a.tolist() for n, a in fast.last_active.items()}


def test_several_results_and_lists_of_them() -> None:
    model = timm.create_model("test_resnet", features_only=True)
    x = torch.randn(2, 3, 96, 96)
    gated = excite(wrap(enliven(model).eval(), example_inputs=x), (x,))
    fast = compact(gated, x)
    first, again = fast(x), fast(x)
    assert program_of(fast, x) is not None
    assert type(again) is type(first) and all(map(torch.equal, first, again))
    assert len(again) == 5 and all(y.requires_grad is False and not y.is_inference() for y in [*first, *again])


def test_no_module_is_called_again(fast: CompactModel, x: Tensor, called: Callable[[], int]) -> None:
    fast._programs.clear()  # another test may have recorded these shapes
    fast(x)
    before = called()
    fast(x)
    fast(x.clone())
    assert before >= 1 and called() == before


def _hooked(fast: CompactModel, x: Tensor) -> Any:
    layer, heard = next(m for m in fast.modules() if type(m).__name__ == "NarrowConv2d"), []
    handle = layer.register_forward_hook(lambda *a: heard.append(a))
    fast(x)
    handle.remove()
    assert heard


def _hooked_anywhere(fast: CompactModel, x: Tensor) -> Any:
    heard: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: heard.append(type(module).__name__))
    fast(x)
    handle.remove()
    assert "NarrowConv2d" in heard


def _counted(fast: CompactModel, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() > 0


def _autocast(fast: CompactModel, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast(x)


@pytest.mark.parametrize(
    "look",
    [
        _hooked,
        _hooked_anywhere,
        _counted,
        _autocast,
        lambda fast, x: fast(x.to(memory_format=torch.channels_last)),
        lambda fast, x: fast(x.transpose(2, 3)),
        lambda fast, x: fast(nn.Parameter(x)),
    ],
    ids=["hook", "hook on any module", "flop counter", "autocast", "channels last", "strided", "subclass"],
)
def test_who_looks_sees_the_graph(fast: CompactModel, x: Tensor, called: Callable[[], int], look: Any) -> None:
    fast(x)
    before = called()
    look(fast, x)
    assert called() == before + 1
    fast(x)
    assert called() == before + 1, "and the program is used again afterwards"


def test_a_hook_may_call_the_model(fast: CompactModel, x: Tensor) -> None:
    fast, found = copy.deepcopy(fast), []
    fast.prepare(x)
    layer = next(m for m in fast.modules() if type(m).__name__ == "NarrowConv2d")

    def again(module: nn.Module, *rest: Any) -> None:
        handle.remove()
        found.append(fast(x[:1]))

    handle = layer.register_forward_hook(again)
    thread = threading.Thread(target=lambda: found.append(fast(x)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive() and [len(y) for y in found] == [1, 2]


def test_new_weights_are_seen(fast: CompactModel, x: Tensor) -> None:
    fast = copy.deepcopy(fast)
    before = fast(x)
    layer = next(m for m in fast.modules() if type(m).__name__ == "NarrowConv2d")
    layer.weight.mul_(2)
    after = fast(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, fast.prepare(x)(x))


def test_copies_and_conversions_record_anew(fast: CompactModel, x: Tensor) -> None:
    wanted = fast(x)
    other = copy.deepcopy(fast)
    assert program_of(other, x) is None and torch.equal(other(x), wanted)
    held = io.BytesIO()
    torch.save(fast._programs, held)
    held.seek(0)
    assert torch.load(held, weights_only=False).find(fast._programs.key((x,))) is None
    assert other.double()(x.double()).dtype is torch.float64
    assert program_of(other, x) is None


def test_thresholds_are_not_recorded(x: Tensor) -> None:
    model = wrap(enliven(timm.create_model("test_resnet")).eval(), example_inputs=x, gate="threshold")
    fast = compact(excite(model, (x,)), x)
    fast(x)
    assert program_of(fast, x) is None and program_of(fast, x[:1]) is None


def test_many_shapes_are_forgotten(fast: CompactModel) -> None:
    fast = copy.deepcopy(fast)
    for batch in range(1, 20):
        fast(torch.randn(batch, 3, 64, 64))
    assert len(fast._programs._known) == 16


def test_several_threads_record_and_run(fast: CompactModel) -> None:
    fast = copy.deepcopy(fast)
    images = [torch.randn(1 + i % 3, 3, 96, 96) for i in range(12)]
    with torch.no_grad():
        wanted = [fast.prepare(one)(one) for one in images]
    found: list[Any] = [None] * len(images)

    def run(i: int) -> None:
        for _ in range(5):
            found[i] = fast(images[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, wanted))
    assert all(program_of(fast, one) is not None for one in images)


def _odd(self: nn.Module, x: Tensor, y: Tensor) -> Any:
    """Operators with every kind of argument and result."""
    a, b = torch.ops.aten.split_with_sizes(x, [1, x.shape[1] - 1], 1)
    c = torch.ops.aten.index(x, [None, torch.ops.aten.argsort(y)[:2]])
    d = torch.ops.aten._to_copy(b, dtype=torch.float64, memory_format=torch.contiguous_format)
    e = torch.ops.aten.full([2, 3], True, dtype=torch.bool, device=torch.device("cpu"), layout=torch.strided)
    f = torch.ops.aten.add(x, 1.5).mul(2).sub_(y.sum())  # numbers where tensors may stand
    g = torch.ops.aten.upsample_nearest2d(x[None], None, [2.0, 2.0])
    values, order = torch.ops.aten.sort(y)
    return {"a": a, "list": [c, d, (e, f)], "g": g, "number": 3, "v": values, "o": order, "y": y}


def test_every_kind_of_argument() -> None:
    graph = _graph(_odd, 2)
    program, result = record(graph, (torch.randn(4, 5, 6), torch.randn(5)))
    assert program is not None
    x, y = torch.randn(4, 5, 6), torch.randn(5)
    wanted, found = graph(x, y), program(x, y)
    assert found.keys() == wanted.keys() == result.keys() and found["number"] == 3
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert found["list"][1].dtype is torch.float64 and found["y"] is y


def _graph(function: Callable[..., Any], inputs: int = 1) -> fx.GraphModule:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *args: Tensor) -> Any:
            return function(self, *args)

    graph = fx.Graph()
    args = tuple(graph.placeholder(f"x{i}") for i in range(inputs))
    graph.output(graph.call_module("one", args))
    root = nn.Module()
    root.one = One()
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * float(x.sum() > 0),
        lambda self, x: x[x > 0],
        lambda self, x: torch.rand_like(x),
        lambda self, x: x + self.calls.add_(1),
        lambda self, x: x if torch.equal(x, x) else -x,
    ],
    ids=["a value", "a size by values", "chance", "a state", "a comparison"],
)
def test_what_differs_from_run_to_run_is_not_recorded(function: Callable[..., Any]) -> None:
    graph = _graph(function)
    program, result = record(graph, (torch.randn(5),))
    assert program is None and isinstance(result, Tensor) and not result.is_inference()


def test_wrong_inputs_and_arguments_are_refused() -> None:
    new = torch.classes.gatedprune.Program
    program = new(1)
    program.tensor(0)
    assert program.call("aten::neg", "", [-1]) == 1
    program.finish([1])
    with pytest.raises(RuntimeError, match="takes 1 tensors, not 2"):
        program.run([torch.ones(1), torch.ones(1)])
    assert program.run([torch.ones(1)])[0].item() == -1
    with pytest.raises(IndexError, match="register 7"):
        new(1).tensor(7)
    with pytest.raises(RuntimeError, match="takes 1 arguments, not 0"):
        new(1).call("aten::neg", "", [-1])
    with pytest.raises(RuntimeError, match="aten::nothing"):
        new(0).call("aten::nothing", "", [])


def test_programs_know_nothing_at_first(x: Tensor) -> None:
    programs = Programs()
    assert programs.find(programs.key((x,))) is None and programs.find(None) is None
    assert programs.key((x, 3)) != programs.key((x, 4)) != programs.key((x[:1], 4))
