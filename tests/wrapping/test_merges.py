"""A sum of branches: one choice of channels for all of them, and the gain on each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedprune import wrap
from gatedprune.testing.case import enliven, excite


class Sum(nn.Module):
    """Two branches, added before the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 1)
        self.norm_a, self.norm_b = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.norm_a(self.a(x)) + self.norm_b(self.b(x[:, :, 1:-1, 1:-1]))).relu())


def images() -> Tensor:
    return torch.randn(4, 3, 10, 10, dtype=torch.float64) * torch.tensor([0.3, 1.0, 2.0, 4.0]).view(4, 1, 1, 1)


def test_a_suppressed_channel_is_in_no_branch() -> None:
    x = images()
    gated = excite(wrap(enliven(Sum()).eval().double(), example_inputs=x), (x,))
    (gate,) = gated.gates.values()
    with torch.no_grad():
        found = gated(x)
        assert gate.last_active is not None and gate.last_gain is not None
        assert (gate.last_active != gate.last_active[0]).any() and (gate.last_gain != 1).any()
        for i in range(len(x)):
            active, gain = gate.last_active[i], gate.last_gain[i].view(-1, 1, 1)
            total: Tensor | float = 0.0
            for layer, norm, image in ((gated.a, gated.norm_a, x), (gated.b, gated.norm_b, x[:, :, 1:-1, 1:-1])):
                y = F.conv2d(image[i : i + 1], layer.weight[active], layer.bias[active])
                stats = [v[active] for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
                total = total + gain * F.batch_norm(y, *stats, eps=norm.eps)
            assert isinstance(total, Tensor)
            wanted = F.conv2d(total.relu(), gated.last.weight[:, active], gated.last.bias)
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-10, atol=1e-10)


def test_the_gate_starts_from_the_weights_of_all_branches() -> None:
    model = Sum()
    with torch.no_grad():
        model.b.weight[3:6].mul_(100)
    gated = wrap(model, ratio=0.8, example_inputs=torch.zeros(2, 3, 10, 10))
    (gate,) = gated.gates.values()
    gated.eval()(torch.randn(2, 3, 10, 10))
    assert gate.last_active is not None
    assert {3, 4, 5} <= set(gate.last_active[0].tolist())


def test_every_branch_teaches_the_gate() -> None:
    x = images()
    gated = wrap(enliven(Sum()).double(), example_inputs=x)
    (gate,) = gated.gates.values()
    gradients = []
    for silent in ("norm_a", "norm_b"):
        gated.zero_grad()
        handle = gated.get_submodule(silent).register_forward_hook(lambda module, args, y: y.detach())
        gated(x).square().mean().backward()
        handle.remove()
        assert gate.weight.grad is not None
        gradients.append(gate.weight.grad.clone())
    assert all(g.abs().sum() > 0 for g in gradients)
    assert not torch.allclose(*gradients)
