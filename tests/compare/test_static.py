"""Static pruning: the sites asked for, exactly k each, by torch-pruning's ranking, nothing else touched."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune import prune_static
from gatedprune.compare.surgery import Surgeon
from gatedprune.errors import ConfigError, ModelError

IMAGES = (2, 3, 64, 64)


def lively(model: nn.Module) -> nn.Module:
    """Give norms scales, shifts and statistics of their own, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    assert tensor is not None
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture
def resnet() -> nn.Module:
    return lively(timm.create_model("test_resnet.r160_in1k", num_classes=7))


class Joined(nn.Module):
    """Two producers side by side, concatenated, normalised and read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.last = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([self.left(x), self.right(x)], 1)).relu())


def test_every_site_keeps_exactly_k(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES)
    sites = list(gatedprune.find_sites(resnet, images))
    result = prune_static(resnet, ratio=0.3, example_inputs=images)
    assert result.by == "torch-pruning"
    assert set(result.kept) == {site.name for site in sites}
    for site in sites:
        k = site.channels - int(0.3 * site.channels)
        assert len(result.kept[site.name]) == k
        for edge in site.edges:
            weight = result.model.get_submodule(edge.path).weight
            assert isinstance(weight, Tensor) and weight.shape[edge.dim] == k
    assert gatedprune.count_macs(result.model, images).total < gatedprune.count_macs(resnet, images).total
    assert result.model(images).shape == (2, 7)


def test_an_untouched_gated_model_is_the_static_one(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES)
    gated = gatedprune.wrap(copy.deepcopy(resnet).double(), ratio=0.5, example_inputs=images.double())
    result = prune_static(gated, example_inputs=images.double())
    gated.eval()
    with torch.no_grad():
        torch.testing.assert_close(result.model.eval()(images.double()), gated(images.double()), rtol=1e-9, atol=1e-9)
    for name, gate in gated.gates.items():
        assert torch.equal(result.kept[name], gate.last_active[0])


def test_kept_channels_of_one_sample_give_the_gated_output(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES, dtype=torch.float64) * torch.tensor([0.2, 2.0]).view(2, 1, 1, 1)
    gated = gatedprune.wrap(resnet.double(), ratio=0.5, boost=False, example_inputs=images).eval()
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn_like(gate.weight))
        wanted = gated(images)
        chosen = {name: gate.last_active for name, gate in gated.gates.items()}
        assert any(not torch.equal(active[0], active[1]) for active in chosen.values())
        for sample in range(2):
            keep = {name: active[sample] for name, active in chosen.items()}
            pruned = prune_static(gated, keep=keep, example_inputs=images).model.eval()
            torch.testing.assert_close(pruned(images)[sample], wanted[sample], rtol=1e-9, atol=1e-9)


def test_concatenated_sites_are_pruned_each_for_itself() -> None:
    model = lively(Joined()).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    keep = {"left": [1, 3], "right": [0, 2, 5]}
    pruned = prune_static(model, keep=keep, example_inputs=images).model.eval()
    masked = copy.deepcopy(model).eval()
    gone = [0, 2] + [4 + channel for channel in (1, 3, 4)]
    with torch.no_grad():
        masked.last.weight[:, gone] = 0
        torch.testing.assert_close(pruned(images), masked(images))
    assert pruned.left.weight.shape[0] == 2 and pruned.right.weight.shape[0] == 3
    assert pruned.last.weight.shape[1] == 5


class Branches(nn.Module):
    """A sum of two branches: one site with two producers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.norm(self.left(x)) + self.right(x)).relu())


@pytest.mark.parametrize("by", ["torch-pruning", "gatedprune"])
def test_branches_that_are_added_lose_the_same_channels(by: str) -> None:
    model = lively(Branches()).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = prune_static(model, keep={"left": [1, 3, 6]}, example_inputs=images, by=by)
    assert result.by == by
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.last.weight[:, [0, 2, 4, 5, 7]] = 0
        torch.testing.assert_close(result.model.eval()(images), masked(images))
    rows = sorted(m.weight.shape[0] for m in result.model.modules() if isinstance(m, nn.Conv2d))
    assert rows == [3, 3, 5]


def test_ranked_by_torch_prunings_importance() -> None:
    torch_pruning = pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    model = Joined()
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(10.0))
    scale_only = torch_pruning.importance.BNScaleImportance()
    kept = prune_static(
        model, counts={"left": 2, "right": 3}, importance=scale_only, example_inputs=torch.randn(1, 3, 8, 8)
    ).kept
    assert kept["left"].tolist() == [2, 3]
    assert kept["right"].tolist() == [3, 4, 5]


def test_importances_see_gradients() -> None:
    torch_pruning = pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    model = Joined()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    model.left.weight.grad[1] = 1e3  # |w · ∂L/∂w| decides
    taylor = torch_pruning.importance.TaylorImportance()
    result = prune_static(model, counts={"left": 1}, importance=taylor, example_inputs=torch.randn(1, 3, 8, 8))
    assert result.kept["left"].tolist() == [1]
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert model.left.weight.grad is not None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_ties_keep_the_lower_index(value: float) -> None:
    # With all weights zero torch-pruning's normaliser divides 0 by 0.
    model = Joined()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    kept = prune_static(model, ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8)).kept
    assert kept["left"].tolist() == [0, 1]
    assert kept["right"].tolist() == [0, 1, 2]


def test_the_model_stays_as_it_is_and_the_copy_keeps_its_modes(resnet: nn.Module) -> None:
    resnet.train()
    resnet.bn1.eval()
    resnet.layer1.requires_grad_(False)
    before = copy.deepcopy(resnet.state_dict())
    with torch.inference_mode():
        pruned = prune_static(resnet, ratio=0.5, example_inputs=torch.randn(IMAGES)).model
    assert all(torch.equal(value, before[key]) for key, value in resnet.state_dict().items())
    assert {name: module.training for name, module in pruned.named_modules()} == {
        name: module.training for name, module in resnet.named_modules()
    }
    assert {name: parameter.requires_grad for name, parameter in pruned.named_parameters()} == {
        name: parameter.requires_grad for name, parameter in resnet.named_parameters()
    }


def test_a_gated_model_tells_sites_and_counts(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES)
    gated = gatedprune.wrap(resnet, {"layer1": 0.25, "layer2": 0.75}, example_inputs=images)
    result = prune_static(gated, example_inputs=images)
    assert {name: len(kept) for name, kept in result.kept.items()} == {
        name: gate.active_count for name, gate in gated.gates.items()
    }
    assert not gatedprune.is_gated(result.model)
    assert gatedprune.is_gated(gated)


def test_sites_not_named_stay_whole(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES)
    pruned = prune_static(resnet, counts={"layer1.0.conv1": 5}, example_inputs=images).model
    changed = {
        name
        for (name, a), (_, b) in zip(resnet.named_parameters(), pruned.named_parameters(), strict=True)
        if a.shape != b.shape
    }
    assert changed == {
        "layer1.0.conv1.weight",
        "layer1.0.bn1.weight",
        "layer1.0.bn1.bias",
        "layer1.0.conv2.weight",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of `ratio`, `counts` and `keep`.*Got none"),
        ({"ratio": 0.5, "counts": {}}, "Got ratio and counts"),
        ({"ratio": 1.0}, r"`ratio` of prune_static\(\) must be a float in \[0, 1\). Got 1.0"),
        ({"counts": {"nowhere": 1}}, "unknown sites: nowhere. Known: left, right"),
        ({"counts": {"left": 0}}, r"must be in \[1, 4\] for the site left. Got 0"),
        ({"counts": {"left": True}}, r"must be in \[1, 4\] for the site left. Got True"),
        ({"keep": {"left": [4]}}, r"channel indices in \[0, 4\) for the site left"),
        ({"keep": {"left": [-1]}}, r"channel indices in \[0, 4\) for the site left"),
        ({"keep": {"left": []}}, r"channel indices in \[0, 4\) for the site left"),
        ({"keep": {"left": [0.5]}}, r"channel indices in \[0, 4\) for the site left"),
        ({"keep": {"left": [1, 1]}}, "names a channel of the site left twice"),
    ],
)
def test_what_stays_must_be_said_once_and_right(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_static(Joined(), example_inputs=torch.randn(1, 3, 8, 8), **options)


def test_a_model_without_gates_tells_no_sites() -> None:
    with pytest.raises(ConfigError, match="is a model without gates"):
        prune_static(Joined(), Joined(), ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8))


def test_a_model_without_sites_is_named() -> None:
    with pytest.raises(ModelError, match="Conv2d has no inner site to prune"):
        prune_static(nn.Conv2d(3, 4, 1), ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8))


def test_stream_sites_have_no_static_counterpart(resnet: nn.Module) -> None:
    images = torch.randn(IMAGES)
    sites = [site for site in gatedprune.find_sites(resnet, images, stream=True) if site.kind == "stream"]
    with pytest.raises(ModelError, match=f"The site {sites[0].name} is on the residual stream"):
        prune_static(resnet, sites, ratio=0.5, example_inputs=images)


def test_layers_narrowed_behind_the_sites_back_are_caught() -> None:
    model, images = Joined(), torch.randn(1, 3, 8, 8)
    left, _ = gatedprune.find_sites(model, images)
    blind = dataclasses.replace(left, consumers=())
    with pytest.raises(ModelError, match=r"left last.weight with shape .* \(part of no site"):
        prune_static(model, [blind], ratio=0.5, example_inputs=images)


def test_layers_left_wide_are_caught() -> None:
    model, images = Joined(), torch.randn(1, 3, 8, 8)
    left, right = gatedprune.find_sites(model, images)
    wider = dataclasses.replace(right.producers[0], units=torch.tensor([0, 1, 2, 3, -1, -1]))
    greedy = dataclasses.replace(left, producers=(*left.producers, wider))
    with pytest.raises(ModelError, match=r"left right.weight with shape .* \(asked by the site left\)"):
        prune_static(model, [greedy], ratio=0.5, example_inputs=images)


def test_a_model_that_no_longer_runs_is_named() -> None:
    model = Joined()
    with Surgeon(model, (torch.randn(1, 3, 8, 8),)) as surgeon:
        model.last = nn.Conv2d(9, 5, 1)
        with pytest.raises(ModelError, match="Joined no longer runs after torch-pruning narrowed it: RuntimeError"):
            surgeon.check_runs()


def test_a_model_that_torch_pruning_cannot_trace_is_named() -> None:
    model = Joined()
    with (
        pytest.raises(ModelError, match="torch-pruning cannot trace Joined"),
        Surgeon(model, (torch.randn(1, 5, 8, 8),)),
    ):
        pass
    model(torch.randn(1, 3, 8, 8))


def test_scores_must_be_one_a_channel() -> None:
    with pytest.raises(ModelError, match=r"must give 4 scores, one a channel, for the site left. Got shape \(3,\)"):
        prune_static(
            Joined(),
            ratio=0.5,
            importance=lambda group: torch.ones(3),
            example_inputs=torch.randn(1, 3, 8, 8),
        )


def test_missing_torch_pruning_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'gatedprune\[compare\]'"):
        prune_static(Joined(), ratio=0.5, example_inputs=torch.randn(1, 3, 8, 8))


def test_torch_pruning_that_removes_other_channels_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Surgeon.remove

    def others(self: Surgeon, site: gatedprune.Site, kept: Tensor) -> None:
        remove(self, site, (site.channels - 1 - kept).flip(0))

    monkeypatch.setattr(Surgeon, "remove", others)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(ModelError, match="removed other channels of"):
        prune_static(model, keep={"0": range(4)}, example_inputs=torch.zeros(2, 3, 8, 8), by="torch-pruning")
