"""Which backend computes: chosen, refused, timed; and the same numbers from each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine import native
from gatedprune.engine.narrow import MaxPool2d, NarrowConv2d, NarrowLinear, UpsampleBilinear2d
from gatedprune.errors import BackendError, ConfigError
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

from ..tiny import SIZE, create

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")
MODELS = ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", "test_nfnet", "test_mambaout"]


def gate_up(name: str, **options: Any) -> tuple[GatedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 3, SIZE, SIZE)
    gated = wrap(enliven(create(name)), example_inputs=x, **options)
    return excite(gated, (x,)), x


@needs_native
@pytest.mark.parametrize("name", MODELS)
def test_native_equals_plain_pytorch(name: str) -> None:
    gated, x = gate_up(name)
    fast, plain = compact(gated, x, backend="native"), compact(gated, x, backend="torch")
    assert (fast.backend, plain.backend) == ("native", "torch")
    with torch.no_grad():
        a, b = fast(x), plain(x)
    same = all(torch.equal(fast.last_active[n], plain.last_active[n]) for n in gated.gates)
    assert same, "near ties in float32 chose other channels: take another seed"
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


@needs_native
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_signed_gates_see_the_mean_as_it_is(name: str) -> None:
    gated, x = gate_up(name, signed=True)
    fast = compact(gated, x, backend="native")
    with torch.no_grad():
        found, wanted = fast(x), gated(x)
    assert all(torch.equal(fast.last_active[n], gate.last_active) for n, gate in gated.gates.items())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@needs_native
def test_max_pooling_is_native_where_no_channel_is_missing_too() -> None:
    """PyTorch's own takes ten times as long, as it goes pixel by pixel."""
    gated, x = gate_up("test_resnet")
    fast, plain = compact(gated, x), compact(gated, x, backend="torch")
    assert [m for m in fast.modules() if isinstance(m, MaxPool2d)]
    assert not any("max_pool" in str(n.target) for n in fast.prepare(x).graph.nodes if n.op == "call_function")
    assert any("max_pool" in str(n.target) for n in plain.prepare(x).graph.nodes if n.op == "call_function")


class Decoder(nn.Module):
    """Interpolates what is narrow, and what holds all its channels."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 24), (24, 8), (8, 4)))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.interpolate(layer(x).relu(), mode="bilinear", **self.options)
        return x


@needs_native
@pytest.mark.parametrize(
    "options", [{"scale_factor": 2}, {"scale_factor": 1.3}, {"size": (9, 17)}, {"size": (7, 30), "align_corners": True}]
)
def test_interpolation_is_native(options: dict) -> None:
    x = torch.randn(2, 3, 6, 11)
    gated = wrap(Decoder(**options).eval(), ratio=0.5, example_inputs=x)
    fast, plain = compact(gated, x), compact(gated, x, backend="torch")
    assert len([m for m in fast.modules() if isinstance(m, UpsampleBilinear2d)]) == 4
    for model in (fast, plain):
        torch.testing.assert_close(model(x), gated(x), rtol=1e-4, atol=1e-5)
    own = next(m for m in fast.modules() if isinstance(m, UpsampleBilinear2d))
    y = torch.randn(1, 2, 6, 11)
    torch.testing.assert_close(own(y.double()).float(), own(y), rtol=1e-6, atol=1e-5)  # and elsewhere PyTorch's


class Pooled(nn.Module):
    """Ends in a mean over the pixels of what an activation leaves."""

    def __init__(self, activation: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3)
        self.activation, self.pool, self.head = activation, pool, nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.activation(self.second(self.first(x).relu()))).flatten(1))


class Mean(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(**self.options)


@needs_native
@pytest.mark.parametrize(
    ("activation", "pool", "own"),
    [
        (nn.ReLU(), nn.AdaptiveAvgPool2d(1), True),
        (nn.ReLU6(), Mean(dim=(2, 3)), True),
        (nn.ReLU(), Mean(dim=(-1, -2), keepdim=True), True),
        (nn.ReLU(), Mean(dim=(3,), keepdim=True), False),
        (nn.ReLU(), nn.AdaptiveAvgPool2d((1, 2)), False),
    ],
)
def test_global_pooling_comes_with_the_layer(activation: nn.Module, pool: nn.Module, own: bool) -> None:
    x = torch.randn(2, 3, 9, 12)
    size = activation(torch.zeros(1, 24, 5, 8))
    model = Pooled(activation, pool).eval()
    model.head = nn.Linear(pool(size).flatten(1).shape[1], 5)
    gated = wrap(model, ratio=0.5, example_inputs=x, include=["first"])
    fast = compact(gated, x)
    targets = [str(n.target) for n in fast.prepare(x).graph.nodes]
    assert any("mean" in t or "pool" in t for t in targets) != own
    torch.testing.assert_close(fast(x), gated(x), rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize(
    ("activation", "pool"), [(nn.SiLU(), nn.AdaptiveAvgPool2d(1)), (nn.Identity(), Mean(dim=(2, 3)))]
)
def test_global_pooling_of_what_may_be_negative(activation: nn.Module, pool: nn.Module) -> None:
    """The layer knows |y| only."""
    x = torch.randn(2, 3, 9, 12)
    gated = wrap(Pooled(activation, pool).eval(), ratio=0.5, example_inputs=x, include=["first"])
    fast = compact(gated, x)
    targets = [str(n.target) for n in fast.prepare(x).graph.nodes]
    assert any("global_pool" in t for t in targets) and not any("mean" in t or "avg_pool" in t for t in targets)
    torch.testing.assert_close(fast(x), gated(x), rtol=1e-4, atol=1e-5)


class Excited(nn.Module):
    """A map that is scaled by its own mean, and perhaps read once more."""

    def __init__(self, again: bool, negative: bool) -> None:
        super().__init__()
        self.first, self.second, self.squeeze = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 24, 1)
        self.again, self.negative = again, negative

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        y = y if self.negative else y.relu()
        z = y * self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        return z - y if self.again else z


@needs_native
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_product_takes_the_place_of_what_nobody_reads_any_more(again: bool, negative: bool) -> None:
    x = torch.randn(2, 3, 9, 12)
    gated = wrap(Excited(again, negative).eval(), ratio=0.5, example_inputs=x, include=["first"])
    fast = compact(gated, x)
    assert any(n.target is torch.ops.aten.mul_.Tensor for n in fast.prepare(x).graph.nodes) != again
    for _ in range(3):  # as a graph, recorded, and from the recording
        torch.testing.assert_close(fast(x), gated(x), rtol=1e-4, atol=1e-5)


@needs_native
def test_input_and_intermediate_values_survive() -> None:
    """Layers write over the residual: never over the caller's tensor, nor over what a later layer reads."""
    gated, x = gate_up("test_resnet")
    fast, before = compact(gated, x), x.clone()
    with torch.no_grad():
        first = fast(x)
        assert torch.equal(x, before)
        assert torch.equal(fast(x), first)


@needs_native
def test_what_native_does_not_compute_is_refused_or_left_to_pytorch() -> None:
    gated, x = gate_up("test_resnet")
    with pytest.raises(BackendError, match="float16 models on the CPU"):
        compact(gated, x, backend="native").double()(x)
    other = compact(gated, x).double()
    assert other.backend == "torch"
    other(x.double())
    mixed = copy.deepcopy(gated).bfloat16()
    next(m for m in mixed.modules() if isinstance(m, nn.BatchNorm2d)).float()
    assert compact(mixed, x.bfloat16()).backend == "torch"


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_computed_as_if_in_float32(name: str, dtype: torch.dtype) -> None:
    """float16: in float32. bfloat16, where the CPU multiplies it: products of rounded numbers, all else in float32."""
    gated, x = gate_up(name)
    half, images = copy.deepcopy(gated).to(dtype), x.to(dtype)
    fast, wide = compact(half, images), copy.deepcopy(half).float()
    with torch.no_grad():
        y, wanted = fast(images), wide(images.float())
        again = fast(images)  # recorded by now
    assert fast.backend == "native" and y.dtype is dtype
    assert torch.equal(again, y)
    pairs = [(fast.last_active[n], wide.gates[n].last_active) for n in gated.gates]
    rounds = dtype is torch.bfloat16 and torch.ops.gatedprune.multiplies_bfloat16()
    same = sum(int((a[:, :, None] == b[:, None]).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)
    assert same > 0.99 if rounds else same == 1.0
    error = float((y.float() - wanted).norm() / wanted.norm())
    assert error < (1e-2 if rounds else 5e-3 if dtype is torch.bfloat16 else 1e-3)
    kinds = {m.weight.dtype for m in fast.modules() if isinstance(m, (NarrowConv2d, NarrowLinear))}
    assert (torch.bfloat16 in kinds) == rounds


@needs_native
def test_bfloat16_can_be_tuned() -> None:
    gated, x = gate_up("test_convnext")
    half, images = copy.deepcopy(gated).bfloat16(), x.bfloat16()
    fast = compact(half, images)
    with torch.no_grad():
        y = fast(images).float()
        (graph,) = fast._lowered.values()
        paths = [n for n, m in graph.named_modules() if isinstance(m, NarrowLinear)]
        plain = compact(half, images, tune=dict.fromkeys(paths, "torch"))
        assert paths and not any(m.native for m in plain.modules() if isinstance(m, NarrowLinear))
        torch.testing.assert_close(plain(images).float(), y, rtol=0, atol=1e-2 * float(y.abs().max()))
        assert compact(half, images, tune=True)(images).dtype is torch.bfloat16


@needs_native
def test_half_precision_comes_back_as_it_was() -> None:
    gated, x = gate_up("test_resnet")
    half = copy.deepcopy(gated).bfloat16()
    fast = compact(half, x.bfloat16())
    with torch.no_grad():
        y = fast(x.bfloat16())
        wide = copy.deepcopy(fast).float()
        assert wide.backend == "native" and wide(x).dtype is torch.float32
        wanted = wide(x.bfloat16().float()).bfloat16()
        torch.testing.assert_close(wanted, y, rtol=0, atol=1e-2 * float(y.abs().max()))
        assert fast.float().bfloat16()(x.bfloat16()).dtype is torch.bfloat16
        torch.testing.assert_close(fast(x.bfloat16()), y)
        assert fast(x[:0].bfloat16()).dtype is torch.bfloat16
    state = fast.source().state_dict()
    assert state.keys() == half.state_dict().keys()
    assert all(torch.equal(state[k], v) and state[k].dtype is v.dtype for k, v in half.state_dict().items())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    gated, x = gate_up("test_resnet")
    monkeypatch.setitem(native.build._state, "loaded", False)
    monkeypatch.setitem(native.build._state, "error", "there is no C++ compiler.")
    with pytest.raises(BackendError, match=r"no C\+\+ compiler.*Use backend='auto'"):
        compact(gated, x, backend="native")
    fast = compact(gated, x)
    assert fast.backend == "torch"
    with torch.no_grad():
        torch.testing.assert_close(fast(x), gated(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [{"backend": "cuda"}, {"share": "all"}, {"tune": {"conv1/0": "fast"}}])
def test_options_out_of_their_domain(options: dict) -> None:
    gated, x = gate_up("test_resnet")
    with pytest.raises(ConfigError, match=next(iter(options))):
        compact(gated, x, **options)


class _MeanOverBatch(nn.Module):
    """The masked reference of share="batch": every gate sees the mean of what its samples would show it."""

    def __init__(self, gated: GatedModel) -> None:
        super().__init__()
        self.gated = gated
        for gate in gated.gates.values():
            of = gate._saliency
            gate._saliency = lambda s, of=of: of(s.mean(0, keepdim=True).expand_as(s))  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gated(x)
        return y


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_one_active_set_for_the_batch(name: str, backend: str) -> None:
    gated, x = gate_up(name)
    fast = compact(gated, x, share="batch", backend=backend)
    with torch.no_grad():
        found, want = fast(x), _MeanOverBatch(gated)(x)
        assert all(len(a) == 1 for a in fast.last_active.values())
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@needs_native
def test_tuning_is_kept_and_can_be_handed_on() -> None:
    gated, x = gate_up("test_resnet")
    fast = compact(gated, x, tune=True)
    assert fast.tuning and set(fast.tuning.values()) <= {"native", "torch"}
    choice = dict.fromkeys(fast.tuning, "torch")
    other = compact(gated, x, tune=choice)
    assert other.tuning == choice
    assert not any(m.native for m in other.modules() if isinstance(m, (NarrowConv2d, NarrowLinear)))
    with torch.no_grad():
        torch.testing.assert_close(other(x), fast(x), rtol=1e-3, atol=1e-3)
        other(x[..., :48])  # another size: what it has in common is tuned alike
    assert not any(m.native for m in other.modules() if isinstance(m, (NarrowConv2d, NarrowLinear)))
