"""A gated model in the loops that people train with: straight-through, autocast, compile, copies, accumulation."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from gatedprune import is_gated, wrap
from gatedprune.functional import scale_channels
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

from ..tiny import SIZE, create

IMAGES = torch.zeros(2, 3, 16, 16)


class Small(nn.Module):
    """Two sites, `first` and `second`, each with a norm and an activation whose slope at 0 is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)), inplace=True)
        return self.last(self.norm2(self.second(x)).relu()).mean((2, 3))


def gated_small(**options: object) -> GatedModel:
    torch.manual_seed(0)
    gated = wrap(Small(), 0.5, example_inputs=IMAGES, **options).train()
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.normal_(std=0.2)
    return gated


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    out = model(x)
    F.cross_entropy(out.float(), torch.arange(len(x)) % 4).backward()
    return out.detach()


def test_straight_through_changes_gradients_of_gates_and_nothing_else() -> None:
    plain = gated_small()
    passing = gated_small(straight_through=True)
    x = torch.randn(6, 3, 16, 16)
    assert torch.equal(step(plain, x), step(passing, x))
    for (name, one), other in zip(plain.state_dict().items(), passing.state_dict().values(), strict=True):
        assert torch.equal(one, other), name  # the norms' statistics too
    ours, theirs = grads(plain), grads(passing)
    for name in ours:
        # `first` and its norm also hear of it, through what the gate of `second` sees.
        if not name.startswith(("gatedprune.", "first", "norm1")):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-12)
    for site, gate in passing.gates.items():
        never = torch.ones(gate.channels, dtype=torch.bool).index_fill_(0, gate.last_active.unique(), False)
        assert bool(never.any()), f"{site}: every channel won somewhere, and the test shows nothing"
        assert bool(gate.bias.grad[never].all())
        assert not bool(plain.gates[site].bias.grad[never].any())


def test_the_gradient_of_a_loser_is_that_of_the_gain_it_would_have() -> None:
    """A loser's saliency is worth what the loss gains by it: its activation times the gradient where it is read."""
    gated = gated_small(straight_through=True)
    x = torch.randn(1, 3, 16, 16)
    step(gated, x)
    gate = gated.gates["second"]
    loser = next(c for c in range(gate.channels) if c not in gate.last_active[0])
    found = float(gate.bias.grad[loser])
    other = copy.deepcopy(gated)
    unit = F.one_hot(torch.tensor(loser), gate.channels).view(1, -1, 1, 1)
    losses = []
    for gain in (0.0, 1e-3):

        def let_in(norm: nn.Module, args: tuple, out: Tensor, gain: float = gain) -> Tensor:
            return out + gain * unit * F.batch_norm(args[0], None, None, norm.weight, norm.bias, True)

        handle = other.norm2.register_forward_hook(let_in)
        losses.append(float(F.cross_entropy(other(x), torch.tensor([0])).detach()))
        handle.remove()
    assert found == pytest.approx((losses[1] - losses[0]) / 1e-3, rel=0.02)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, straight_through: bool) -> None:
    gated = gated_small(straight_through=straight_through)
    with torch.autocast("cpu", dtype=dtype):
        out = gated(torch.randn(4, 3, 16, 16))
        loss = F.cross_entropy(out, torch.arange(4)) + gated.penalty()
    (2.0**10 * loss).backward()  # as a gradient scaler does
    assert out.dtype == dtype
    for name, gradient in grads(gated).items():
        assert bool(gradient.isfinite().all()), name
    for gate in gated.gates.values():
        assert gate.last_saliency.dtype == torch.float32
        assert gate.weight.grad is not None and bool(gate.weight.grad.any())


def test_under_autocast_the_same_channels_win() -> None:
    """`first` sees the images themselves, which bfloat16 holds exactly here."""
    gated = gated_small().eval()
    x = torch.randn(16, 3, 16, 16).bfloat16().float()
    gated(x)
    wanted = gated.gates["first"].last_active
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gated(x)
    assert torch.equal(gated.gates["first"].last_active, wanted)


@pytest.mark.parametrize("straight_through", [False, True])
def test_compile_sees_one_graph(straight_through: bool) -> None:
    gated = gated_small(straight_through=straight_through)
    plain = copy.deepcopy(gated)
    x = torch.randn(4, 3, 16, 16)
    wanted = step(plain, x)
    # fullgraph: a graph break is an error. The backend runs what was captured, backwards too, without a compiler.
    compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x), wanted)
    torch.testing.assert_close(grads(gated), grads(plain), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gated.penalty(), plain.penalty())


def test_channels_last() -> None:
    gated = gated_small()
    other = copy.deepcopy(gated).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16)
    seen: list[Tensor] = []
    other.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
    wanted = step(gated, x)
    torch.testing.assert_close(step(other, x.to(memory_format=torch.channels_last)), wanted)
    torch.testing.assert_close(grads(other), grads(gated), rtol=1e-4, atol=1e-6)
    assert seen[0].is_contiguous(memory_format=torch.channels_last), "the gain has changed the layout"


def test_gradients_accumulate() -> None:
    gated = gated_small().eval()  # without batch statistics, parts add up to the whole
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    (F.cross_entropy(gated(x), y) + gated.penalty(0.1)).backward()
    wanted = grads(gated)
    gated.zero_grad(set_to_none=True)
    for part, labels in zip(x.split(4), y.split(4), strict=True):
        ((F.cross_entropy(gated(part), labels) + gated.penalty(0.1)) / 2).backward()
    torch.testing.assert_close(grads(gated), wanted, rtol=1e-4, atol=1e-6)


def test_a_moving_average_is_a_gated_model_of_its_own() -> None:
    gated = gated_small()
    step(gated, torch.randn(4, 3, 16, 16))  # leaves tensors of a graph behind, which cannot be copied
    average = ModelEmaV3(gated, decay=0.5)
    assert is_gated(average.module) and average.module.gates["first"] is not gated.gates["first"]
    before = average.module.gates["first"].weight.clone()
    with torch.no_grad():
        gated.gates["first"].weight.add_(1.0)
    average.update(gated)
    torch.testing.assert_close(average.module.gates["first"].weight, before + 0.5)
    gated.set_ratio(0.0)
    assert average.module.gates["first"].active_count == 8
    x = torch.randn(2, 3, 16, 16)
    average.module.eval()(x)
    assert average.module.gates["first"].last_active.shape == (2, 8)


def test_a_step_keeps_few_more_activations() -> None:
    """Each site keeps one tensor more for the backward pass, what the gain is multiplied on, and small ones."""
    gated = gated_small(straight_through=True)
    x = torch.randn(8, 3, 16, 16)

    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(x)
        assert out.requires_grad
        return sum(sizes.values())

    extra = kept(gated) - kept(Small().train())
    maps = 8 * (16 + 12) * 16 * 16 * 4
    assert extra <= 1.05 * maps


class Inverted(nn.Module):
    """One site, `expand`: two norms and a layer of single channels before `project` reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.project = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.expand(x)).relu()
        return self.project(self.norm2(self.depthwise(x)).relu()).mean((2, 3))


def gated_inverted(**options: object) -> GatedModel:
    torch.manual_seed(0)
    gated = wrap(Inverted(), 0.5, example_inputs=IMAGES, boost=False, **options).train()
    with torch.no_grad():
        gated.gates["expand"].weight.normal_(std=0.2)
    return gated


@pytest.mark.parametrize("straight_through", [False, True])
def test_batch_norms_behind_a_gate_take_no_zeros_for_values(straight_through: bool) -> None:
    """A channel that loses for a sample is not computed: it must not move the statistics, as zeros would."""
    gated = gated_inverted(straight_through=straight_through)
    torch.manual_seed(0)
    dense, x = Inverted().train(), torch.randn(6, 3, 16, 16)
    gated(x), dense(x)
    gate = gated.gates["expand"]
    assert len(gate.last_active.unique()) < gate.channels, "every channel won somewhere, and the test shows less"
    for name in ("norm1", "norm2"):
        ours, theirs = gated.get_submodule(name), dense.get_submodule(name)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_losers_of_a_silenced_site_learn_by_straight_through() -> None:
    """Their gradient is that of the mask where the site is read; all others stay as they are."""
    plain, passing = gated_inverted(), gated_inverted(straight_through=True)
    x = torch.randn(6, 3, 16, 16)
    read: list[Tensor] = []
    passing.norm2.register_forward_hook(lambda module, args, out: read.append(out.detach().relu()))
    asked: list[Tensor] = []
    passing.project.register_full_backward_pre_hook(lambda module, out: asked.append(out[0]))
    torch.testing.assert_close(step(passing, x), step(plain, x), rtol=0, atol=0)
    ours, theirs = grads(passing), grads(plain)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)
    gate = passing.gates["expand"]
    back = torch.einsum("bohw,oi->bihw", asked[0], passing.project.weight.detach()[:, :, 0, 0])
    lost = 1 - F.one_hot(gate.last_active, gate.channels).sum(1)
    wanted = lost * (back * read[0]).sum((2, 3)) * (gate.last_saliency > 0)
    torch.testing.assert_close(gate.bias.grad, wanted.sum(0))


def gradients(gated: GatedModel, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)  # one of the models drops out
    gated.zero_grad(set_to_none=True)
    out = gated(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return grads(gated)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_what_is_not_kept_for_the_backward_pass_changes_no_gradient(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    gated = excite(wrap(enliven(create(name)).double(), 0.5, example_inputs=x, stream=True), (x,)).train(training)
    found, plain = gradients(gated, x), lambda x, gain, dim, fate=None: scale_channels(x, gain, dim)
    monkeypatch.setattr("gatedprune.wrapping.hooks.scale_channels", plain)
    monkeypatch.setattr("gatedprune.wrapping.hooks.scale_batch_normed", lambda x, gain, *_: scale_channels(x, gain, 1))
    wanted = gradients(gated, x)
    assert wanted.keys() == found.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(
            found[parameter], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=parameter: f"{n}: {m}"
        )


def test_losers_learn_from_small_gradients() -> None:
    """The product, 2^-100 of a loser, cannot stand for what was multiplied: 1e-16 of it is no number any more."""
    layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 4, 1), nn.Flatten())
    gated = wrap(layers, 0.5, example_inputs=IMAGES, straight_through=True).train()
    x = torch.randn(4, 3, 16, 16)
    found = {}
    for size in (1.0, 1e-16):
        gated.zero_grad()
        (size * gated(x).sin().sum()).backward()
        (gate,) = gated.gates.values()
        found[size] = gate.bias.grad / size
    assert found[1.0].all()
    torch.testing.assert_close(found[1e-16], found[1.0], rtol=1e-4, atol=1e-5)


class Dense(nn.Module):
    """Each layer reads what all layers before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 11, 19, 27))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.cat([x, layer(x).sigmoid()], 1)
        return self.layers[-1](x).mean((2, 3))


def test_the_masks_of_one_place_are_one_multiplication() -> None:
    gated = excite(wrap(enliven(Dense()), 0.5, example_inputs=IMAGES), (torch.randn(4, 3, 16, 16),))
    last = gated.layers[-1]
    assert len(gated.gates) == 3 and len(last._forward_pre_hooks) == 1
    seen = []
    last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gated(torch.randn(4, 3, 16, 16))
    for i, gate in enumerate(gated.gates.values()):
        zero = (seen[0][:, 3 + 8 * i : 11 + 8 * i] == 0).all(3).all(2)
        assert torch.equal(zero, ~gate.last_wins) and zero.any() and not zero.all(0).all()
