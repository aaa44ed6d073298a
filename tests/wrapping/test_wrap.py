"""`wrap` and `unwrap`: what they refuse, and that a failure leaves the model as it was."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune import GateConfig, find_sites, is_gated, unwrap, wrap
from gatedprune.errors import ConfigError, DataError, ModelError
from gatedprune.testing.snapshot import Snapshot
from gatedprune.wrapping import model as wrapping

IMAGES = torch.zeros(2, 3, 32, 32)


class Small(nn.Module):
    """Two sites: `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 12, 3, padding=1)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.norm(self.first(x)).relu()).relu())


class Pointwise(nn.Module):
    """Nothing to gate."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x)


class Branching(nn.Module):
    """A forward pass that no tracer can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


@pytest.fixture
def small() -> Small:
    return Small().eval()


def test_the_same_object_comes_back_gated(small: Small) -> None:
    gated = wrap(small, 0.5, example_inputs=IMAGES)
    assert gated is small
    assert is_gated(gated)
    assert isinstance(gated, Small)
    assert type(gated).__name__ == "GatedSmall"
    assert list(gated.gates) == ["first", "second"]
    assert [g.active_count for g in gated.gates.values()] == [8, 6]
    assert [s.name for s in gated.gated_sites] == ["first", "second"]
    assert gated.gate_config == GateConfig(ratio=0.5)
    assert gated.site_report["first"].channels == 16


@pytest.mark.parametrize("ratio", [1.0, -0.5, math.nan, True, "half"])
def test_a_bad_ratio_is_refused_before_anything_happens(small: Small, ratio: object) -> None:
    before = Snapshot(small)
    with pytest.raises(ConfigError, match=r"`ratio` of wrap\(\) must be a float in \[0, 1\)"):
        wrap(small, ratio, example_inputs=IMAGES)  # type: ignore[arg-type]
    assert before.differences(small) == []


def test_a_mapping_gates_what_it_names(small: Small) -> None:
    gated = wrap(small, {"second": 0.75}, example_inputs=IMAGES)
    assert {name: gate.active_count for name, gate in gated.gates.items()} == {"second": 3}


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"ratio": {"third": 0.5}}, "third"),
        ({"include": "layer*"}, r"layer\*"),
        ({"include": ["first", "x"]}, "x"),
    ],
)
def test_a_pattern_that_fits_nothing_is_refused(small: Small, options: dict, pattern: str) -> None:
    before = Snapshot(small)
    with pytest.raises(ConfigError, match=rf"pattern '{pattern}' of wrap\(\) fits no site. Sites: first, second"):
        wrap(small, example_inputs=IMAGES, **options)
    assert before.differences(small) == []


def test_include_and_exclude(small: Small) -> None:
    assert list(wrap(copy.deepcopy(small), include="f*", example_inputs=IMAGES).gates) == ["first"]
    assert list(wrap(copy.deepcopy(small), exclude="first", example_inputs=IMAGES).gates) == ["second"]
    assert list(wrap(copy.deepcopy(small), min_channels=13, example_inputs=IMAGES).gates) == ["first"]
    with pytest.warns(UserWarning, match=r"`exclude` pattern 'nothing\*' fits no site of Small"):
        wrap(small, exclude="nothing*", example_inputs=IMAGES)


def test_nothing_warns_without_a_reason(small: Small) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(small, exclude="first", example_inputs=IMAGES)


def test_leaving_nothing_is_refused(small: Small) -> None:
    with pytest.raises(ModelError, match="leave none of the 2 sites of Small"):
        wrap(small, exclude=("first", "second"), example_inputs=IMAGES)
    assert not is_gated(small)


def test_a_model_without_sites_is_told_why() -> None:
    model = Pointwise()
    before = Snapshot(model)
    with pytest.raises(ModelError, match=r"(?s)Nothing in Pointwise can be gated:.*only.*leave the model as an output"):
        wrap(model, example_inputs=IMAGES)
    assert before.differences(model) == []


def test_gating_twice_is_refused(small: Small) -> None:
    gated = wrap(small, example_inputs=IMAGES)
    with pytest.raises(ModelError, match=r"already gated.*set_ratio\(\), or unwrap\(\) it first"):
        wrap(gated, example_inputs=IMAGES)
    with pytest.raises(ModelError, match="holds a gated model"):
        wrap(nn.Sequential(gated), example_inputs=IMAGES)
    assert len(gated.gates) == 2


@pytest.mark.parametrize("thing", [None, 3, torch.zeros(2), Small])
def test_only_modules_are_wrapped(thing: object) -> None:
    with pytest.raises(ConfigError, match=r"wrap\(\) takes a torch.nn.Module. Got"):
        wrap(thing)  # type: ignore[arg-type]


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, 32, 32, dtype=torch.uint8), (), "image", ([1.0],)])
def test_inputs_must_be_floating_point_tensors(small: Small, inputs: object) -> None:
    before = Snapshot(small)
    with pytest.raises(ConfigError, match="`example_inputs` must be a floating-point tensor such as"):
        wrap(small, example_inputs=inputs)
    assert before.differences(small) == []


def test_inputs_that_do_not_fit_and_models_that_cannot_be_traced() -> None:
    for model in (Small(), Branching()):
        before = Snapshot(model)
        inputs = torch.zeros(2, 5, 8, 8) if isinstance(model, Small) else IMAGES
        with pytest.raises(ModelError, match=rf"{type(model).__name__} could not be traced.*Give `example_inputs`"):
            wrap(model, example_inputs=inputs)
        assert before.differences(model) == []


def test_config_and_options_exclude_each_other(small: Small) -> None:
    with pytest.raises(ConfigError, match="either `config` or single options"):
        wrap(small, 0.5, config=GateConfig())
    with pytest.raises(ConfigError, match="`config` must be a GateConfig. Got dict"):
        wrap(small, config={"ratio": 0.5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Unknown options for GateConfig: density"):
        wrap(small, density=0.5)
    assert wrap(small, config=GateConfig(ratio=0.25), example_inputs=IMAGES).gates["first"].active_count == 12


def test_a_name_that_is_taken_is_refused(small: Small) -> None:
    small.gatedprune = nn.Identity()
    with pytest.raises(ModelError, match="has an attribute `gatedprune` of its own"):
        wrap(small, example_inputs=IMAGES)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("stage", ["find_sites", "magnitude_importance", "attach 1", "attach 2", "_gated_class"])
def test_a_failure_at_any_stage_leaves_the_model_untouched(
    small: Small, monkeypatch: pytest.MonkeyPatch, stage: str, training: bool
) -> None:
    small.train(training)
    before = Snapshot(small)
    name, _, which = stage.partition(" ")
    real, calls = getattr(wrapping, name), []

    def failing(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == int(which or 1):
            raise RuntimeError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(wrapping, name, failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        wrap(small, example_inputs=IMAGES)
    assert before.differences(small) == []
    monkeypatch.undo()
    assert is_gated(wrap(small, example_inputs=IMAGES))


@pytest.mark.parametrize("training", [False, True])
def test_unwrap_restores_the_object(small: Small, training: bool) -> None:
    small.train(training)
    small.norm.eval()
    small.first.weight.requires_grad_(False)
    own, norm = [], copy.deepcopy(small.norm.state_dict())
    small.first.register_forward_hook(lambda *_: own.append(1))
    before = Snapshot(small)
    gated = wrap(small, example_inputs=IMAGES)
    assert {m.training for m in gated.gates.values()} == {training}
    gated(torch.randn(2, 3, 32, 32))
    own.clear()
    assert unwrap(gated) is small
    assert type(small) is Small
    small.norm.load_state_dict(norm)  # training mode has moved its statistics
    assert before.differences(small) == []
    small(IMAGES)
    assert own == [1]  # the user's own hook stays


def test_unwrap_takes_gated_models_only(small: Small) -> None:
    with pytest.raises(ModelError, match=r"unwrap\(\) takes a model that wrap\(\) returned. Small is not gated"):
        unwrap(small)


def test_other_inputs_than_it_was_wrapped_for(small: Small) -> None:
    gated = wrap(small, example_inputs=IMAGES)
    with pytest.raises(DataError, match=r"gate of site 'first' expects 3 channels in dimension 1.*\(2, 5, 8, 8\)"):
        gated(torch.zeros(2, 5, 8, 8))


def test_sites_are_found_beneath_the_gates(small: Small) -> None:
    names = [s.name for s in find_sites(small, IMAGES)]
    gated = wrap(small, example_inputs=IMAGES)
    assert [s.name for s in find_sites(gated, IMAGES)] == names
    assert len(gated.gates) == 2


def test_default_inputs_come_from_the_timm_configuration() -> None:
    gated = wrap(timm.create_model("test_resnet"))
    assert len(gated.gates) >= 7
    assert gatedprune.is_gated(gated)
