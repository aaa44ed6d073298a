"""A gated model stays the model that it was, and can do more."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import timm
import torch
from torch import Tensor, nn

from gatedprune import is_gated, unwrap, wrap
from gatedprune.errors import ConfigError, ModelError
from gatedprune.testing.case import enliven, excite
from gatedprune.wrapping import GatedModel

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [[0.5, 1.0, 2.0], [2.0, 0.5, 1.0], [1.0, 2.0, 0.5]]
).view(3, 3, 1, 1)
FEATURES = {"features_only": True, "out_indices": (1, 2, 3)}


def resnet(**options: object) -> nn.Module:
    return enliven(timm.create_model("test_resnet", num_classes=5, **options)).eval()


@pytest.fixture(scope="module")
def wrapped() -> GatedModel:
    return excite(wrap(resnet(), 0.5, example_inputs=IMAGES), (IMAGES,))


@pytest.fixture
def gated(wrapped: GatedModel) -> GatedModel:
    return copy.deepcopy(wrapped)


def test_timm_methods_stay_usable(gated: GatedModel) -> None:
    dense = resnet()
    assert gated.num_features == dense.num_features
    assert gated.feature_info == dense.feature_info
    assert gated.pretrained_cfg == dense.pretrained_cfg
    assert gated.get_classifier() is gated.fc
    with torch.no_grad():
        whole = gated(IMAGES)
        assert torch.equal(gated.forward_head(gated.forward_features(IMAGES)), whole)
        last, maps = gated.forward_intermediates(IMAGES)
        assert torch.equal(last, gated.forward_features(IMAGES))
        assert not torch.equal(maps[-1], dense.forward_intermediates(IMAGES)[1][-1])
    gated.reset_classifier(0)
    assert gated(IMAGES).shape == (3, dense.num_features)
    gated.set_grad_checkpointing(True)
    gated.train()(IMAGES).sum().backward()
    assert gated.gates["conv1.0"].bias.grad is not None


def test_features_only() -> None:
    dense = resnet(**FEATURES)
    gated = excite(wrap(copy.deepcopy(dense), 0.5, example_inputs=IMAGES), (IMAGES,))
    assert gated.feature_info.channels() == dense.feature_info.channels()
    with torch.no_grad():
        maps, wanted = gated(IMAGES), dense(IMAGES)
    assert [m.shape for m in maps] == [m.shape for m in wanted]
    assert not torch.equal(maps[-1], wanted[-1])
    with torch.no_grad():
        again = unwrap(gated)(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


def chain() -> list[nn.Module]:
    return [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)]


class Listed(nn.ModuleList):
    """A list that runs its elements."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [nn.Sequential, Listed])
def test_gates_are_no_element_of_a_list(kind: type) -> None:
    dense = kind(*chain()) if kind is nn.Sequential else kind(chain())
    wanted = dense.eval()(IMAGES)
    last = dense[-1]
    gated = wrap(dense, 0.0, example_inputs=IMAGES)
    assert list(gated.gates) == ["0", "2"]
    assert torch.equal(gated(IMAGES), wanted)
    assert len(gated) == 5
    assert list(gated)[-1] is gated[-1] is last
    gated.append(nn.Identity())
    assert torch.equal(gated(IMAGES), wanted)
    assert [name for name, _ in unwrap(gated).named_children()] == ["0", "1", "2", "3", "4", "5"]


def test_gates_are_no_entry_of_a_dictionary() -> None:
    dense = resnet(**FEATURES)
    names = list(dense)
    gated = wrap(dense, 0.5, example_inputs=IMAGES)
    assert list(gated) == list(gated.keys()) == [name for name, _ in gated.items()] == names
    assert len(list(gated.values())) == len(gated) == len(names)
    assert "gatedprune" not in gated
    assert names[0] in gated


class Around(nn.Module):
    """A model built around a timm one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = timm.create_model("test_resnet", **FEATURES)
        self.neck = nn.Conv2d(self.encoder.feature_info.channels()[-1], 24, 3, padding=1)
        self.head = nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(self.encoder(x)[-1]).relu())


def test_a_module_around_a_timm_model() -> None:
    gated = wrap(Around().eval(), 0.5, example_inputs=IMAGES)
    assert "neck" in gated.gates
    assert any(name.startswith("encoder.") for name in gated.gates)
    gated(IMAGES)
    assert {gate.last_active.shape[0] for gate in gated.gates.values()} == {3}
    assert not is_gated(gated.encoder)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(gated: GatedModel, how: str) -> None:
    gated(IMAGES)
    if how == "deepcopy":
        other = copy.deepcopy(gated)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(gated))
    else:
        buffer = io.BytesIO()
        torch.save(gated, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is type(gated)
    with torch.no_grad():
        wanted = gated(IMAGES)
        assert torch.equal(other(IMAGES), wanted)
        # Its hooks run its own gates, and taking them out leaves the first model's alone.
        other.gates["conv1.0"].active_count = 1
        other(IMAGES)
        assert other.gates["conv1.0"].last_active.shape[1] == 1
        assert torch.equal(gated(IMAGES), wanted)
        plain = unwrap(other)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
        assert torch.equal(plain(IMAGES), resnet_of(gated)(IMAGES))
        assert torch.equal(gated(IMAGES), wanted)


def resnet_of(gated: GatedModel) -> nn.Module:
    model = resnet()
    model.load_state_dict(gated.backbone_state_dict())
    return model


def test_set_ratio(gated: GatedModel) -> None:
    gated.set_ratio(0.25)
    assert all(g.active_count == g.channels - g.channels // 4 for g in gated.gates.values())
    gated.set_ratio({"layer1*": 0.75, "*": 0.0})
    assert gated.gates["layer1.0.conv1"].ratio == 0.75
    assert gated.gates["conv1.0"].ratio == 0
    gated(IMAGES)
    k = gated.gates["layer1.0.conv1"].active_count
    assert gated.gates["layer1.0.conv1"].last_active.shape == (3, k)


def test_a_refused_ratio_changes_nothing(gated: GatedModel) -> None:
    before = {name: gate.active_count for name, gate in gated.gates.items()}
    with pytest.raises(ConfigError, match=r"`ratio` of set_ratio\(\) must be a float"):
        gated.set_ratio(1.0)
    with pytest.raises(ConfigError, match=r"set_ratio\(\), pattern 'layer2\*', must be a float"):
        gated.set_ratio({"layer1*": 0.9, "layer2*": -1})
    with pytest.raises(ConfigError, match=r"pattern 'stage\*' of set_ratio\(\) fits no site"):
        gated.set_ratio({"layer1*": 0.9, "stage*": 0.5})
    assert {name: gate.active_count for name, gate in gated.gates.items()} == before


def test_penalty_is_the_mean_l1_of_the_saliencies(gated: GatedModel) -> None:
    fresh = copy.deepcopy(gated)
    with pytest.raises(ModelError, match=r"penalty\(\) needs a forward pass first"):
        fresh.penalty()
    gated(IMAGES)
    wanted = sum(float(g.last_saliency.detach().double().sum(1).mean()) for g in gated.gates.values())
    found = gated.penalty(1e-3)
    assert found.shape == ()
    assert float(found.detach()) == pytest.approx(1e-3 * wanted, rel=1e-5)
    found.backward()
    assert all(g.bias.grad is not None and g.bias.grad.any() for g in gated.gates.values())


def test_loading_a_backbone_ranks_untouched_gates_anew() -> None:
    gated = wrap(resnet(), 0.5, example_inputs=IMAGES)
    start = {name: gate.bias.clone() for name, gate in gated.gates.items()}
    donor = enliven(timm.create_model("test_resnet", num_classes=5), seed=9)
    gated.load_state_dict(donor.state_dict())
    anew = wrap(copy.deepcopy(donor), 0.5, example_inputs=IMAGES)
    for name, gate in gated.gates.items():
        assert not torch.equal(gate.bias, start[name])
        assert torch.equal(gate.bias, anew.gates[name].bias)
        assert torch.equal(gate.start, gate.bias)


def test_loading_a_backbone_keeps_trained_gates(gated: GatedModel) -> None:
    before = {name: gate.bias.clone() for name, gate in gated.gates.items()}
    gated.load_state_dict(resnet().state_dict())
    assert all(torch.equal(gate.bias, before[name]) for name, gate in gated.gates.items())


def test_a_checkpoint_with_half_the_gates_is_an_error(gated: GatedModel) -> None:
    state = gated.state_dict()
    lost = next(key for key in state if key.startswith("gatedprune.") and key.endswith("bias"))
    del state[lost]
    with pytest.raises(RuntimeError, match="Missing key"):
        gated.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        gated.load_state_dict({k: v for k, v in resnet().state_dict().items() if k != "fc.bias"})


def test_a_backbone_loads_where_the_gated_model_is_part_of_another(gated: GatedModel) -> None:
    both = nn.Sequential(gated)
    missing = both.load_state_dict({f"0.{k}": v for k, v in resnet().state_dict().items()})
    assert not missing.missing_keys


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_autocast(gated: GatedModel, training: bool) -> None:
    gated.train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gated(IMAGES)
    assert out.dtype == torch.bfloat16
    assert bool(out.isfinite().all())
    (out.float().square().mean() + gated.penalty()).backward()
    assert all(g.bias.grad is not None and bool(g.bias.grad.isfinite().all()) for g in gated.gates.values())


def test_autocast_is_close_to_full_precision(gated: GatedModel) -> None:
    for gate in gated.gates.values():
        gate.active_count = gate.channels  # who wins may change; what is computed may not
    with torch.no_grad():
        exact = gated(IMAGES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = gated(IMAGES).float()
    # bfloat16 keeps 8 bits; some twenty layers.
    assert float((rough - exact).abs().max()) <= 0.1 * float(exact.abs().max())


def test_training_mode_uses_batch_statistics_and_gates(gated: GatedModel) -> None:
    gated.train()
    before = gated.bn1.running_mean.clone()
    gated(IMAGES).sum().backward()
    assert not torch.equal(gated.bn1.running_mean, before)
    assert gated.gates["conv1.0"].last_active is not None


def test_double(gated: GatedModel) -> None:
    out = gated.double()(IMAGES.double())
    assert out.dtype == torch.float64
    assert gated.gates["conv1.0"].last_gain.dtype == torch.float64


def test_a_masked_model_in_two_threads(gated: GatedModel) -> None:
    wanted = [gated(IMAGES[i : i + 1]).detach() for i in range(2)]
    copies, found = [copy.deepcopy(gated) for _ in range(2)], [None, None]

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = copies[i](IMAGES[i : i + 1]).detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))
