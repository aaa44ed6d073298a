"""The compact model: any batch, any size, any layout; a snapshot; and never a wrong number."""

from __future__ import annotations

import copy
import threading

import pytest
import timm
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine import CompactModel, NarrowConv2d
from gatedprune.errors import DataError, GatedPruneError, ModelError
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return noise * (0.3 + torch.rand(*shape[:2], 1, 1, generator=generator, dtype=torch.float64))


def gate_up(model: nn.Module, x: Tensor, **options: object) -> GatedModel:
    gated = wrap(enliven(model).eval().double(), example_inputs=x, **options)
    return excite(gated, (x,))


@pytest.fixture(scope="module")
def resnet() -> GatedModel:
    return gate_up(timm.create_model("test_resnet", num_classes=5), images(3, 3, 64, 64), stream=True)


@pytest.fixture(scope="module")
def fast(resnet: GatedModel) -> CompactModel:
    return compact(resnet, images(1, 3, 64, 64))


def same(fast: CompactModel, gated: GatedModel, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(x), gated(x), **EXACT)
    for name, active in fast.last_active.items():
        assert torch.equal(active, gated.gates[name].last_active), name


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size(fast: CompactModel, resnet: GatedModel, batch: int) -> None:
    same(fast, resnet, images(batch, 3, 64, 64))
    assert len(fast._lowered) <= 3, "a batch size was lowered for itself"


@pytest.mark.parametrize("size", [(64, 96), (57, 75), (33, 47)])
def test_new_and_odd_image_sizes(fast: CompactModel, resnet: GatedModel, size: tuple[int, int]) -> None:
    same(copy.deepcopy(fast), resnet, images(2, 3, *size))


def test_empty_batch(fast: CompactModel) -> None:
    assert fast(images(0, 3, 64, 64)).shape == (0, 5)


def test_memory_layouts(fast: CompactModel, resnet: GatedModel) -> None:
    x = images(2, 3, 64, 64)
    same(fast, resnet, x.to(memory_format=torch.channels_last))
    same(fast, resnet, x.transpose(2, 3).contiguous().transpose(2, 3))
    same(fast, resnet, images(2, 6, 64, 64)[:, ::2])
    same(fast, resnet, x[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_channels_last_images(name: str) -> None:
    x = images(2, 3, 64, 64)
    options = {"img_size": 64} if "vit" in name else {}
    gated = gate_up(timm.create_model(name, num_classes=5, **options), x)
    same(compact(gated, x), gated, x.to(memory_format=torch.channels_last))


@pytest.mark.usefixtures("poisoned_memory")
def test_no_memory_is_read_that_nobody_wrote(resnet: GatedModel) -> None:
    x = images(2, 3, 64, 64)
    same(compact(resnet, x), resnet, x)


@pytest.mark.parametrize("k", [1, "all"])
def test_extreme_counts(resnet: GatedModel, k: int | str) -> None:
    gated, x = copy.deepcopy(resnet), images(2, 3, 64, 64)
    for gate in gated.gates.values():
        gate.active_count = gate.channels if k == "all" else 1
    same(compact(gated, x), gated, x)


def test_the_input_is_not_written_to(fast: CompactModel) -> None:
    x = images(2, 3, 64, 64)
    before = x.clone()
    fast(x)
    assert torch.equal(x, before)


def test_single_precision_and_back(fast: CompactModel, resnet: GatedModel) -> None:
    other, x = copy.deepcopy(fast).float(), images(2, 3, 64, 64)
    assert other(x.float()).dtype == torch.float32
    assert fast(x).dtype == torch.float64
    torch.testing.assert_close(other(x.float()).double(), fast(x), rtol=1e-4, atol=1e-4)
    same(fast, resnet, x)


def test_copies_are_apart(fast: CompactModel, resnet: GatedModel) -> None:
    x = images(2, 3, 64, 64)
    wanted = fast(x)
    other = copy.deepcopy(fast)
    assert torch.equal(other(x), wanted)
    assert list(other.last_active) == list(fast.last_active)
    for module in other.modules():
        if isinstance(module, NarrowConv2d):
            module.weight.zero_()
    assert not torch.equal(other(x), wanted)
    assert torch.equal(fast(x), wanted)


def test_it_is_a_snapshot(resnet: GatedModel) -> None:
    gated, x = copy.deepcopy(resnet), images(2, 3, 64, 64)
    fast = compact(gated, x)
    wanted, state = fast(x), copy.deepcopy(gated.state_dict())
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.normal_()
    gated.set_ratio(0.9)
    assert torch.equal(fast(x), wanted)
    # The other way round, too: neither lowering nor running has touched the gated model, and gradients still
    # flow.
    gated = copy.deepcopy(resnet).train()
    compact(gated, x)(x)
    assert gated.training
    assert all(m.training for m in gated.modules())
    assert all(p.requires_grad for p in gated.parameters())
    assert all(torch.equal(v, state[k]) for k, v in gated.state_dict().items())


def test_it_is_for_inference(fast: CompactModel) -> None:
    with pytest.raises(ModelError, match=r"for inference. Train the gated model.*compact\(\) again"):
        fast.train()
    assert not fast.training
    fast.eval()
    x = images(1, 3, 64, 64).requires_grad_()
    assert not fast(x).requires_grad


@pytest.mark.parametrize("thing", [nn.Conv2d(3, 3, 1), None, 3])
def test_only_gated_models_are_compacted(thing: object) -> None:
    with pytest.raises(ModelError, match=r"compact\(\) takes a model that gatedprune.wrap\(\) returned"):
        compact(thing)  # type: ignore[arg-type]


def test_bad_inputs(fast: CompactModel) -> None:
    for bad in ((), (3,), (torch.zeros(2, 3, 64, 64, dtype=torch.uint8),)):
        with pytest.raises(DataError, match="takes floating-point tensors such as"):
            fast(*bad)
    with pytest.raises(GatedPruneError):
        copy.deepcopy(fast)(images(2, 5, 64, 64))


class ReadAgain(nn.Module):
    """A residual stream whose earlier states are read once more, later: by name, through a view, and as an output."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1)) for _ in "ab"
        )
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stem = self.stem(x)
        seen = {"view": lambda: stem.flatten(2), "slice": lambda: stem[:, :, 1:]}.get(self.how, lambda: stem)()
        first = stem + self.one(stem)
        second = first + self.two(first)
        if self.how == "subtract":
            return self.last(second - stem)
        if self.how == "twice":
            return self.last(first + stem + self.two(second))
        if self.how == "output":
            return self.last(second), stem
        return self.last(second) + seen.mean()


@pytest.mark.parametrize("how", ["subtract", "twice", "output", "view", "slice"])
def test_a_stream_that_is_read_later_is_not_overwritten(how: str) -> None:
    x = images(2, 3, 12, 12)
    gated = gate_up(ReadAgain(how), x, stream=True)
    fast = compact(gated, x)
    assert any(gate.active_count < gate.channels for gate in gated.gates.values())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), gated(x), **EXACT)


class Broadcast(nn.Module):
    """The stream that the branch is added to is a broadcast: one number per channel stands for a whole map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x.mean((2, 3), keepdim=True).expand_as(x) + self.branch(x))


def test_a_broadcast_stream_is_not_written_into() -> None:
    x = images(2, 3, 12, 12)
    gated = gate_up(Broadcast(), x, stream=True)
    same(compact(gated, x), gated, x)


class Added(nn.Module):
    """A module that adds its own input, so that the model's input is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.branch(x))


def test_the_callers_tensor_is_no_stream_to_add_into() -> None:
    x = images(2, 8, 12, 12)
    gated = gate_up(Added(), x, stream=True)
    before, fast = x.clone(), compact(gated, x)
    same(fast, gated, x)
    assert torch.equal(x, before)


class Shared(nn.Module):
    """One layer called twice, one buffer used in place, several arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = self.act(self.first(x))
        y = self.act(self.second(y * scale[:, None, None, None]))
        return {"out": self.third(y), "mean": y.mean(1)}


def test_several_arguments_and_a_dictionary_of_outputs() -> None:
    args = (images(3, 3, 12, 12), torch.rand(3, dtype=torch.float64) + 0.5)
    gated = excite(wrap(enliven(Shared()).eval().double(), example_inputs=args, include="first"), args)
    fast = compact(gated, args)
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), gated(*args), **EXACT)
        torch.testing.assert_close(fast(args[0][:1], args[1][:1]), gated(args[0][:1], args[1][:1]), **EXACT)


@pytest.mark.parametrize("boost", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.7])
def test_boost_and_ratio(boost: bool, ratio: float) -> None:
    # Excited gates are as steep as it takes to tell the samples apart: between two, they blow rounding up to 1e-10.
    x = images(4, 3, 32, 32)
    gated = gate_up(timm.create_model("test_byobnet", num_classes=5), x, boost=boost, ratio=ratio, round_to=4)
    same(compact(gated, x), gated, x)


class Woken(nn.Module):
    """Half of the channels are added to the residual stream and the other half is a site: the norm is held in full."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 4, 1)
        self.stem = nn.Conv2d(3, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.first(x)
        y = torch.cat([x + y[:, :16], y[:, 16:]], 1)
        return self.third(self.second(self.norm(y).sigmoid()).relu())


def test_gates_do_not_see_what_a_norm_has_woken() -> None:
    x = images(3, 3, 12, 12)
    gated = gate_up(Woken(), x)
    assert list(gated.gates) == ["first", "second"]
    same(compact(gated, x), gated, x)


class Positional(nn.Module):
    """Attention whose positional part is computed from a buffer that is expanded to the batch."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.qkv, self.place, self.proj = nn.Linear(8, 48), nn.Linear(3, 4), nn.Linear(16, 8)
        self.register_buffer("places", torch.randn(1, 5, 5, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x) if self.fixed else x.shape[0]  # tracing fixes what len() returns
        q, k, v = self.qkv(x).reshape(batch, 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        place = self.place(self.places.expand(batch, -1, -1, -1)).permute(0, 3, 1, 2).softmax(-1)
        attention = (q @ k.transpose(-2, -1)).softmax(-1) + place
        return self.proj((attention @ v).transpose(1, 2).reshape(batch, 5, 16))


@pytest.mark.parametrize("fixed", [False, True])
def test_what_depends_on_the_batch_size_is_no_constant(fixed: bool) -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gated = gate_up(Positional(fixed), x)
    fast = compact(gated, x)
    same(fast, gated, x)
    same(fast, gated, x[:2])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_new_sizes_of_images_in_several_threads(backend: str) -> None:
    """`torch.export` patches modules for all threads, so what others compute meanwhile would come to nothing."""
    torch.manual_seed(0)
    gated = wrap(timm.create_model("test_resnet").eval(), ratio=0.5)
    fast = compact(gated, torch.randn(1, 3, 64, 64), backend=backend)
    images = [torch.randn(1 + i % 2, 3, 32 + 16 * i, 48) for i in range(4)]
    with torch.no_grad():
        wanted = [gated(x) for x in images]
    found: list[list[torch.Tensor]] = [[] for _ in images]

    def run(i: int) -> None:
        found[i].extend(fast(images[i]) for _ in range(6))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, want in zip(found, wanted, strict=True):
        assert len(each) == 6
        for y in each:
            torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
