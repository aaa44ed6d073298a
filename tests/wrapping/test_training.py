"""A gated model in the loops that people train with: straight-through, autocast, compile, copies, accumulation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedprune import wrap
from gatedprune.wrapping import GatedModel

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
        if not name.startswith("gatedprune."):
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
    free = copy.deepcopy(gated)
    seen: list[Tensor] = []

    def let_in(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        dense = module_input(free, "norm2", x)
        seen.append(torch.zeros((), requires_grad=True))
        return out + seen[-1] * dense[:, loser : loser + 1] * F.one_hot(torch.tensor(loser), 12).view(1, 12, 1, 1)

    slope = 1e-3
    values = []
    for amount in (0.0, slope):
        handle = free.norm2.register_forward_hook(
            lambda m, a, out, amount=amount: out + amount * raw(free, a[0])[:, loser : loser + 1] * unit(loser)
        )
        values.append(float(F.cross_entropy(free(x), torch.tensor([0])).detach()))
        handle.remove()
    assert found == pytest.approx((values[1] - values[0]) / slope, rel=0.02)


def unit(channel: int) -> Tensor:
    return F.one_hot(torch.tensor(channel), 12).view(1, 12, 1, 1).float()


def raw(model: nn.Module, x: Tensor) -> Tensor:
    """What `norm2` makes of its input, without hooks."""
    norm = model.norm2
    return F.batch_norm(x, None, None, norm.weight, norm.bias, True).detach()
