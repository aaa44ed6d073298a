"""RMS norms spelt out in arithmetic are found, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.sites import capture, find_sites
from gatedprune.testing import Case, check_model

IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Norm2d(nn.Module):
    """An RMS norm over the channels of a map, as timm writes it."""

    def __init__(self, channels: int, dim: int = 1, power: int = 2, act: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) + 0.5)
        self.dim, self.power, self.act = dim, power, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(self.power).mean(dim=self.dim, keepdim=True) + 1e-6)
        return self.act(x * self.weight.reshape(1, -1, 1, 1))


def network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def operators(model: nn.Module) -> list[str]:
    return [str(n.target) for n in capture(model, (IMAGES,)).graph.nodes if n.op == "call_function"]


def test_the_graph_computes_the_same() -> None:
    model = network(Norm2d(16, act=nn.GELU())).double()
    graph = capture(model, (IMAGES.double(),))
    assert "aten.rms_norm.default" in [str(n.target) for n in graph.graph.nodes]
    assert "aten.mean.dim" not in [str(n.target) for n in graph.graph.nodes]
    with torch.no_grad():
        torch.testing.assert_close(graph(IMAGES.double()), model(IMAGES.double()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"dim": 2}, {"power": 4}])
def test_other_means_are_left_alone(options: dict) -> None:
    assert "aten.rms_norm.default" not in operators(network(Norm2d(16, **options)))


def test_a_site_with_such_a_norm_obeys_the_contract() -> None:
    make = lambda: network(Norm2d(16, act=nn.GELU()))  # noqa: E731
    report = find_sites(make(), IMAGES)
    assert [(site.name, len(site.norms)) for site in report] == [("0", 1), ("2", 0)]
    checks = ["identity", "exactly_k", "static", "compact_float64", "compact_float32", "macs_fall"]
    notes = check_model(Case(make, IMAGES, oracle="columns"), checks=checks)
    assert set(notes) == set(checks)


def test_statistics_are_those_of_the_active_channels() -> None:
    gated = wrap(network(Norm2d(16)), 0.5, example_inputs=IMAGES, boost=False, include=["0"])
    y = gated[0](IMAGES)
    active = gated.gates["0"].last_active[0]
    assert active is not None
    norm = gated[1]
    kept = y[0, active]
    wanted = kept * torch.rsqrt(kept.square().mean(0) + 1e-6) * norm.weight[active].view(-1, 1, 1)
    seen: list[Tensor] = []
    gated[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gated(IMAGES)
    torch.testing.assert_close(seen[0][0, active], wanted)
    torch.testing.assert_close(compact(gated, IMAGES)(IMAGES), gated(IMAGES))
