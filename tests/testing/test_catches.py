"""Each check of the contract suite fails on a model that breaks what it checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedprune.engine import CompactModel, NarrowConv2d, compact
from gatedprune.errors import ConfigError
from gatedprune.gates import Gate
from gatedprune.testing import CHECKS, Case, check_model, parametrize_checks
from gatedprune.wrapping import GatedModel
from gatedprune.wrapping.hooks import _ScaleInput, _ScaleOutput


class Small(nn.Module):
    """One inner site with a norm, one with a depthwise layer behind it, and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 1)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.third = nn.Conv2d(24, 16, 1)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        y = self.third(torch.sigmoid(self.depth(self.second(x))))
        return self.last((x + y).mean((2, 3)))


IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.3, 1.0, 2.0]).view(
    3, 1, 1, 1
)


def small(**options: Any) -> Case:
    return Case(Small, IMAGES, name="small", stream=True, **options)


@pytest.fixture
def case() -> Case:
    return small()


def breaking(case: Case, method: str, fault: Callable[[Any], None]) -> None:
    """Let what the case hands out have a fault."""
    real = getattr(case, method)

    def broken(*args: Any) -> Any:
        model = real(*args)
        fault(model)
        return model

    setattr(case, method, broken)


def wrong_engine(case: Case, fault: Callable[[CompactModel], None]) -> None:
    """The same for the compact models."""
    for name, dtype in (("compacted", torch.float32), ("compacted64", torch.float64)):
        fast = compact(Case.gated(case, dtype), case.inputs(dtype))
        fault(fast)
        case.__dict__[name] = fast


def test_a_sound_model_passes_everything(case: Case) -> None:
    notes = check_model(case)
    assert list(notes) == list(CHECKS)
    assert notes["static"] == "torch-pruning"
    assert notes["macs_fall"].endswith("% of the MACs left")


def test_thresholds_pass_everything_with_different_numbers_of_winners() -> None:
    case = small(gate="threshold")
    assert list(check_model(case)) == list(CHECKS)
    gated = case.gated()
    with torch.no_grad():
        gated(*case.inputs())
    counts = [(gate.last_active < gate.channels).sum(1) for gate in gated.gates.values()]
    assert sum(bool(c.min() < c.max()) for c in counts) >= len(counts) / 2


def test_a_threshold_that_is_off_and_winners_below_it() -> None:
    def shift(gated: GatedModel) -> None:
        gated.gates["first"].threshold += 10  # type: ignore[operator]

    def swap(gated: GatedModel) -> None:
        def choose(gate: Gate, args: tuple, wins: Tensor) -> None:
            first = wins.to(torch.uint8).argmax(1, keepdim=True)
            gate.last_wins = wins.scatter(1, first, False)

        gated.gates["first"].register_forward_hook(choose)

    for fault, match in ((shift, r"site first: 1 channels win on average, not 8"),
                         (swap, r"site first: the winners are not those above the threshold")):  # fmt: skip
        case = small(gate="threshold")
        breaking(case, "gated", fault)
        with pytest.raises(AssertionError, match=match):
            CHECKS["exactly_k"](case)


def test_check_model_takes_a_factory_and_a_selection() -> None:
    notes = check_model(Small, IMAGES, ratio=0.25, checks=["unwrap", "exactly_k"])
    assert list(notes) == ["unwrap", "exactly_k"]
    with pytest.raises(ValueError, match="Unknown checks: speed. Known: identity"):
        check_model(Small, IMAGES, checks=["speed"])


def test_all_failures_are_named_at_once(case: Case) -> None:
    def deafen(gated: GatedModel) -> None:
        gated.gates["first"].active_count = 3

    breaking(case, "gated", deafen)
    with pytest.raises(AssertionError, match=r"(?s)\d of 13 checks failed:\nexactly_k: small.*site first"):
        check_model(case)


def test_a_changed_value_is_no_identity(case: Case) -> None:
    def nudge(gated: GatedModel) -> None:
        with torch.no_grad():
            gated.gates["first"].bias += 1e-6

    breaking(case, "untouched", nudge)
    with pytest.raises(AssertionError, match="small-stream: at ratio 0, output 0 differs by .*site first"):
        CHECKS["identity"](case)


def test_a_gate_on_another_dimension(case: Case) -> None:
    gated = case.untouched()
    site = gated.gated_sites[0]
    object.__setattr__(site, "in_channels", 12)
    case.untouched = lambda: gated  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="site first: the gate looks at 12 values in dimension 1"):
        CHECKS["gates_see_channels"](case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda active: active[:, :-1], "has shape"),
        (lambda active: active.flip(1), "not strictly ascending"),
        (lambda active: active + 16, r"outside \[0, 16\)"),
        (lambda active: active.int(), "not int64"),
        (lambda active: torch.arange(8).expand(3, 8), "larger saliency than a winner"),
    ],
)
def test_wrong_active_sets(
    case: Case, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], message: str
) -> None:
    gated = case.gated()
    gate = gated.gates["first"]

    right: Any = Gate.last_active
    # The masking itself stays right: only what the gate says it chose is wrong.
    monkeypatch.setattr(Gate, "last_active", property(lambda g: change(right.fget(g)) if g is gate else right.fget(g)))
    monkeypatch.setattr(_ScaleOutput, "__call__", lambda *_: None)
    case.gated = lambda *_: gated  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=f"site first.*{message}"):
        CHECKS["exactly_k"](case)


def test_samples_that_choose_alike_are_no_test(case: Case) -> None:
    def numb(gated: GatedModel) -> None:
        for gate in gated.gates.values():
            gate.weight.data.zero_()

    breaking(case, "gated", numb)
    with pytest.raises(AssertionError, match="no site chooses differently"):
        CHECKS["exactly_k"](case)


@pytest.mark.parametrize("oracle", ["torch-pruning", "columns"])
@pytest.mark.parametrize("fault", ["gain forgotten", "mask forgotten", "channel not silenced"])
def test_gating_that_is_not_removal(oracle: str, fault: str) -> None:
    case = small(oracle=oracle)

    def hooks(gated: GatedModel) -> None:
        if fault == "mask forgotten":  # sigmoid wakes the suppressed channels again
            hooks = gated.third._forward_pre_hooks
            del hooks[next(key for key, hook in hooks.items() if isinstance(hook, _ScaleInput))]
        for hook in gated.norm._forward_hooks.values() if fault == "gain forgotten" else ():
            hook.factors[0].gain = False
        if fault == "channel not silenced":
            gated.norm._forward_hooks.clear()

    breaking(case, "gated", hooks)
    site = "second" if fault == "mask forgotten" else "first"
    with pytest.raises(AssertionError, match=rf"small-stream: sample 0 is off by .*wrong by itself: site .*{site}"):
        CHECKS["static"](case)


def test_torch_pruning_must_not_fail_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatedprune.testing.oracle._LIMIT_S", 1e-4)
    with pytest.raises(AssertionError, match="torch-pruning was asked for as the reference and failed"):
        CHECKS["static"](small(oracle="torch-pruning"))
    note = CHECKS["static"](small(oracle="auto"))
    assert note is not None
    assert note.startswith("columns zeroed (torch-pruning took more than")


@pytest.mark.parametrize("check", ["compact_float64", "compact_float32"])
@pytest.mark.parametrize("error", [1e-2, 1e-5])
def test_an_engine_with_a_wrong_weight(case: Case, check: str, error: float) -> None:
    def spoil(fast: CompactModel) -> None:
        layer = next(m for m in fast.modules() if isinstance(m, NarrowConv2d))
        layer.weight.mul_(1 + error)

    wrong_engine(case, spoil)
    with pytest.raises(AssertionError, match="small-stream.*the compact model is off by"):
        CHECKS[check](case)


def test_an_engine_that_chooses_other_channels(case: Case) -> None:
    def confuse(fast: CompactModel) -> None:
        fast.gates["first"].bias += torch.arange(16.0)

    wrong_engine(case, confuse)
    with pytest.raises(AssertionError, match="site first: compact and masked choose different channels"):
        CHECKS["compact_float64"](case)
    with pytest.raises(AssertionError, match="chose other channels for every sample"):
        CHECKS["compact_float32"](case)


def test_samples_that_leak_into_each_other(case: Case) -> None:
    assert case.compacted64 is not None  # made before the fault
    gated = case.gated(torch.float64)
    gated.norm.register_forward_hook(lambda module, x, y: y + 1e-6 * y.mean(0, keepdim=True))
    case.gated = lambda *_: gated  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"sample \d of the masked model|changes sample 0 of the masked model"):
        CHECKS["samples_independent"](case)


def test_an_engine_whose_samples_share_indices(case: Case) -> None:
    class Sharing(NarrowConv2d):
        def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
            indices = (None if i is None else i[:1].expand(len(x), -1) for i in rest[:3])
            return super().forward(x, *indices, *rest[3:])

    def share(fast: CompactModel) -> None:
        for module in fast.modules():
            if isinstance(module, NarrowConv2d):
                module.__class__ = Sharing

    wrong_engine(case, share)
    with pytest.raises(AssertionError, match=r"sample \d of the compact model"):
        CHECKS["samples_independent"](case)


def test_randomness_in_eval_mode(case: Case) -> None:
    assert case.compacted is not None  # made before the fault
    gated = case.gated()
    gated.norm.register_forward_hook(lambda module, x, y: y + 1e-6 * torch.randn_like(y))
    case.gated = lambda *_: gated  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="the masked model is not deterministic"):
        CHECKS["deterministic"](case)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda gated: gated.gates["first"].bias.requires_grad_(False), "site first: ρ gets no gradient"),
        (lambda gated: gated.gates["first"].weight.requires_grad_(False), "site first: φ gets no gradient"),
        (lambda gated: gated.norm.bias.requires_grad_(False), "1 backbone parameters get no gradient.*norm.bias"),
        (lambda gated: gated.gates["first"].bias.register_hook(lambda g: g + 1), "that never won gets a gradient"),
        (lambda gated: gated.gates["first"].bias.register_hook(lambda g: g * float("nan")), "is not finite"),
        (
            lambda gated: gated.gates["first"].weight.register_hook(lambda g: g * 0),
            "only 0% of the rows of φ of winners",
        ),
    ],
)
def test_gradients_that_are_missing_or_wrong(case: Case, fault: Callable[[Any], Any], message: str) -> None:
    breaking(case, "gated", fault)
    with pytest.raises(AssertionError, match=message):
        CHECKS["gradients"](case)


def test_a_loss_that_runs_away(case: Case) -> None:
    def blow_up(gated: GatedModel) -> None:
        gated.last.register_forward_hook(lambda module, x, y: y + y.new_tensor(float("inf")))

    breaking(case, "untouched", blow_up)
    with pytest.raises(AssertionError, match="the loss is (inf|nan) at step 0"):
        CHECKS["training_steps"](case)


@pytest.mark.parametrize("fault", ["hook", "module", "attribute", "class", "weight", "frozen"])
def test_traces_left_behind(case: Case, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatedprune.testing import restoring

    real = restoring.unwrap

    def sloppy(gated: GatedModel) -> nn.Module:
        model = real(gated)
        if fault == "hook":
            model.first.register_forward_hook(lambda *_: None)
        elif fault == "module":
            model.add_module("left", nn.Identity())
        elif fault == "attribute":
            model.second.left = 1
        elif fault == "class":
            model.first.__class__ = type("Conv2d", (nn.Conv2d,), {})
        elif fault == "weight":
            model.first.weight.data[0, 0, 0, 0] += 1e-6
        else:
            model.first.weight.requires_grad_(False)
        return model

    monkeypatch.setattr(restoring, "unwrap", sloppy)
    messages = {
        "hook": "module 'first': _forward_hooks holds 1 entries, had 0",
        "module": "module 'left' is new",
        "attribute": "module 'second': attribute left is new",
        "class": "module 'first' is of class Conv2d",
        "weight": "tensor first.weight changed",
        "frozen": "requires_grad of first.weight changed",
    }
    with pytest.raises(AssertionError, match=f"after unwrap.*{messages[fault]}"):
        CHECKS["unwrap"](case)


def test_a_checkpoint_that_does_not_arrive(case: Case) -> None:
    def ignore(gated: GatedModel) -> None:
        gated.load_state_dict = lambda *_, **__: nn.modules.module._IncompatibleKeys([], [])

    breaking(case, "untouched", ignore)
    with pytest.raises(AssertionError, match="does not compute what the loaded backbone does"):
        CHECKS["state_dicts"](case)


def test_backbone_keys_that_are_missing(case: Case) -> None:
    def forget(gated: GatedModel) -> None:
        real = gated.backbone_state_dict
        gated.backbone_state_dict = lambda: dict(list(real().items())[1:])

    breaking(case, "gated", forget)
    with pytest.raises(AssertionError, match="backbone keys differ: .*first.weight"):
        CHECKS["state_dicts"](case)


def test_an_engine_that_saves_nothing(case: Case) -> None:
    wide = copy.deepcopy(case.untouched())
    case.__dict__["compacted"] = compact(wide, case.inputs())
    with pytest.raises(AssertionError, match=r"takes [\d,]+ MACs, the dense one"):
        CHECKS["macs_fall"](case)


def test_cases_refuse_what_they_cannot_use() -> None:
    with pytest.raises(ConfigError, match="needs at least two samples"):
        Case(Small, IMAGES[:1])
    with pytest.raises(ConfigError, match="`oracle` must be 'auto', 'torch-pruning' or 'columns'. Got 'guess'"):
        Case(Small, IMAGES, oracle="guess")


def test_excited_gates_differ_between_samples_and_stay_near_one(case: Case) -> None:
    gated = case.gated()
    gated(IMAGES)
    for name, gate in gated.gates.items():
        assert gate.last_active is not None
        assert gate.last_gain is not None
        assert (gate.last_active != gate.last_active[:1]).any(), name
        assert 0.4 <= float(gate.last_gain.detach().min()) < 0.99, name
        assert 1.01 < float(gate.last_gain.detach().max()) <= 1.6, name


def test_enlivened_models_have_no_silent_branch(case: Case) -> None:
    for parameter in case.dense().parameters():
        assert parameter.numel() == 1 or parameter.min() != parameter.max()
    again = Case(Small, IMAGES).dense()
    assert again.state_dict().keys() == case.dense().state_dict().keys()


@parametrize_checks([Case(Small, IMAGES, name="plain", oracle="columns")], checks=["exactly_k", "static"])
def test_parametrized(case: Case, check: Any) -> None:
    assert case.label == "plain"
    check(case)


def test_a_lean_case_holds_one_compact_model_that_is_the_same() -> None:
    plain, lean = small(), small(lean=True)
    lean._base.load_state_dict(plain._base.state_dict())
    assert lean.compacted.backend == plain.compacted.backend
    args = plain.inputs(torch.float64)
    assert torch.equal(lean.compacted64(*args), plain.compacted64(*args))
    assert "compacted" not in lean.__dict__ and "compacted" in plain.__dict__
    assert lean.compacted is not None and "compacted64" not in lean.__dict__


def test_bad_luck_of_three_samples_is_judged_over_more(case: Case) -> None:
    """An error in the first call alone is luck; the same in every call is not."""
    wanted = len(case.inputs()[0])

    def unlucky(calls: int) -> None:
        left = iter(range(calls))

        def spoil(module: object, x: object, y: torch.Tensor) -> torch.Tensor:
            return y if next(left, None) is None else y * (1 + 3e-6)

        case.compacted.register_forward_hook(spoil)

    unlucky(1)
    note = CHECKS["compact_float32"](case)
    assert note is not None
    assert f"over {8 * wanted} samples" in note
    unlucky(100)
    with pytest.raises(AssertionError, match=f"over {8 * wanted} samples"):
        CHECKS["compact_float32"](case)
