"""What a model spells out in arithmetic or by assignment is found, and nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine.narrow_norms import NarrowResponseNorm
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


class ResponseNorm(nn.Module):
    """A global response norm (ConvNeXt V2), as timm writes it; ``last``: channels come last."""

    def __init__(self, channels: int, last: bool = False, order: int = 2) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(channels)) for _ in range(2))
        self.places, self.dim, self.order = ((1, 2), -1, order) if last else ((2, 3), 1, order)
        self.shape = (1, 1, 1, -1) if last else (1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(p=self.order, dim=self.places, keepdim=True)
        y = x * (size / (size.mean(self.dim, keepdim=True) + 1e-6))
        return x + torch.addcmul(self.bias.view(self.shape), self.weight.view(self.shape), y)


class Last(nn.Module):
    """Layers of a network that see channels last."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(3, 16), nn.GELU(), norm, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x.permute(0, 2, 3, 1)))))


def response_network(last: bool) -> nn.Module:
    torch.manual_seed(0)
    return Last(ResponseNorm(16, True)).eval() if last else network(ResponseNorm(16))


@pytest.mark.parametrize("last", [False, True])
def test_response_norms_are_found_and_compute_the_same(last: bool) -> None:
    model = response_network(last).double()
    graph = capture(model, (IMAGES.double(),))
    names = [getattr(n.target, "__name__", "") for n in graph.graph.nodes]
    assert "response_norm" in names
    assert "linalg_vector_norm.default" not in names
    with torch.no_grad():
        torch.testing.assert_close(graph(IMAGES.double()), model(IMAGES.double()), rtol=1e-12, atol=1e-12)


def test_other_responses_are_left_alone() -> None:
    report = find_sites(network(ResponseNorm(16, order=1)), IMAGES)
    assert "`mean`, which mixes" in report.skipped["0"]


@pytest.mark.parametrize("last", [False, True])
def test_a_site_with_a_response_norm_obeys_the_contract(last: bool) -> None:
    report = find_sites(response_network(last), IMAGES)
    name = "fc1" if last else "0"
    assert [norm.kind for norm in report[name].norms] == ["response"]
    checks = ["identity", "static", "compact_float64", "compact_float32", "macs_fall"]
    check_model(Case(lambda: response_network(last), IMAGES, oracle="columns"), checks=checks)
    lowered = compact(wrap(response_network(last), 0.5, example_inputs=IMAGES), IMAGES)
    assert any(isinstance(module, NarrowResponseNorm) for module in lowered.modules())


def test_the_mean_response_is_that_of_the_active_channels() -> None:
    gated = wrap(response_network(False), 0.5, example_inputs=IMAGES, boost=False, include=["0"])
    y = gated[0](IMAGES)
    active = gated.gates["0"].last_active[0]
    assert active is not None
    norm, kept = gated[1], y[0, active]
    size = kept.flatten(1).norm(dim=1)[:, None, None]
    weight, bias = (p[active].view(-1, 1, 1) for p in (norm.weight, norm.bias))
    seen: list[Tensor] = []
    gated[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gated(IMAGES)
    torch.testing.assert_close(seen[0][0, active], kept + weight * kept * size / (size.mean() + 1e-6) + bias)


class Assigned(nn.Module):
    """Scores that are overwritten; ``kept``: a view of them is read afterwards, ``start``: not all of them are."""

    def __init__(self, kept: bool = False, start: int = 0) -> None:
        super().__init__()
        self.first, self.last, self.kept, self.start = nn.Linear(8, 16), nn.Linear(16, 4), kept, start

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.flatten(2))
        view = y.view(-1, 3, 4, 4) if self.kept else None
        y[:, self.start :] = y[:, self.start :].tanh() + y[:, self.start :].sigmoid()
        y = self.last(y)
        return y if view is None else y + view.mean(3)


def test_what_is_overwritten_whole_is_replaced() -> None:
    x = torch.randn(3, 3, 8)
    for dynamic in (False, True):
        graph = capture(Assigned().eval(), (x,), dynamic_batch=dynamic)
        assert not any("copy_" in str(node.target) for node in graph.graph.nodes)
    graph = capture(Assigned(kept=True), (x,))
    assert any("copy_" in str(node.target) for node in graph.graph.nodes)
    graph = capture(Assigned(start=1), (x,))
    assert any("copy_" in str(node.target) for node in graph.graph.nodes)


def test_overwriting_obeys_the_contract() -> None:
    x = torch.randn(3, 3, 8)
    assert [site.name for site in find_sites(Assigned(), x)] == ["first"]
    assert len(find_sites(Assigned(kept=True), x)) == len(find_sites(Assigned(start=1), x)) == 0
    check_model(Case(Assigned, x, oracle="columns"), checks=["identity", "static", "compact_float64"])
