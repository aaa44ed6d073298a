"""The contract suite on timm's tiny models: every check, inner sites alone and with the residual stream's."""

from __future__ import annotations

import pytest
import timm

from gatedprune.errors import ModelError
from gatedprune.testing import Case, Check, parametrize_checks

from .tiny import SIZE, create

# Model → the reference of contract 2. Where torch-pruning is able it must be used, so that no failure of
# it passes unseen; for the others this is what it does with them (version 1.6.1).
NO_END = "columns"  # does not come to an end
LOSES_LAYER = "columns"  # "a layer would lose all of its channels"
FIXED_VIEW = "columns"  # a channel count is written into forward()
GROUPS = "columns"  # leaves the number of a norm's groups as it was
OTHERS = "columns"  # narrows other dimensions than those of the sites

MODELS = {
    "test_byobnet": "torch-pruning",
    "test_coatnet": NO_END,
    "test_convnext": "torch-pruning",
    "test_convnext2": "torch-pruning",
    "test_convnext3": "torch-pruning",
    "test_efficientnet": "torch-pruning",
    "test_efficientnet_evos": OTHERS,
    "test_efficientnet_gn": GROUPS,
    "test_efficientnet_ln": "torch-pruning",
    "test_mambaout": LOSES_LAYER,
    "test_maxvit": NO_END,
    "test_nfnet": OTHERS,
    "test_resnet": "torch-pruning",
    "test_vit": FIXED_VIEW,
    "test_vit2": FIXED_VIEW,
    "test_vit3": FIXED_VIEW,
    "test_vit4": FIXED_VIEW,
    "test_vit_relpos": LOSES_LAYER,
}


# The timm that brought them, where it is newer than the oldest that setup.cfg allows.
SINCE = {"test_coatnet": (1, 0, 31), "test_maxvit": (1, 0, 31), "test_vit_relpos": (1, 0, 31)}
INSTALLED = tuple(int(part) for part in timm.__version__.split(".")[:3])
HERE = [name for name in MODELS if SINCE.get(name, (0,)) <= INSTALLED]


def case(name: str, stream: bool) -> Case:
    return Case(lambda: create(name), size=SIZE, stream=stream, name=name, oracle=MODELS[name])


# One model of a kind with the residual stream's sites too: they come from the same rules. MORE_STREAMS take longer.
MORE_STREAMS = ("test_coatnet", "test_convnext2")
WITH_STREAM = (
    "test_byobnet",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
)
CASES = [case(name, False) for name in HERE] + [case(name, True) for name in WITH_STREAM if name in HERE]


def test_every_tiny_model_is_here() -> None:
    assert sorted(HERE) == sorted(timm.list_models("test_*"))


@parametrize_checks(CASES)
def test_contract(case: Case, check: Check) -> None:
    try:
        case.untouched()
    except ModelError as error:
        # A model without sites must say so, with a reason for every layer; it is tested as soon as it has
        # some.
        assert "can be gated" in str(error) and len(str(error).splitlines()) > 1
        pytest.skip(f"{case.name} has no sites yet: {str(error).splitlines()[1].strip()}")
    check(case)


@pytest.mark.slow
@parametrize_checks([case(name, True) for name in MORE_STREAMS if name in HERE])
def test_contract_of_more_streams(case: Case, check: Check) -> None:
    check(case)


def varying(name: str) -> Case:
    """The same with thresholds, where samples have different numbers of channels."""
    other = case(name, False)
    return Case(other.make, size=other._size, name=f"{name}-threshold", oracle=other.oracle, gate="threshold")


# Batch norms and convolutions in groups; attention heads, whose number stands in views, and norms over tokens.
@parametrize_checks(
    [varying("test_byobnet"), varying("test_vit")],
    [
        "identity",
        "exactly_k",
        "static",
        "compact_float64",
        "samples_independent",
        "gradients",
        "state_dicts",
        "macs_fall",
    ],
)
def test_contract_with_thresholds(case: Case, check: Check) -> None:
    check(case)


def squeezed(name: str) -> Case:
    """The same with predictors of low rank; as many as there are samples, so that `Case` can have them contested."""
    other = case(name, False)
    return Case(other.make, size=other._size, name=f"{name}-rank", oracle=other.oracle, rank=3)


@parametrize_checks([squeezed("test_efficientnet"), squeezed("test_vit")])
def test_contract_with_predictors_of_low_rank(case: Case, check: Check) -> None:
    assert any(gate.rank == 3 for gate in case.gated().gates.values())
    check(case)
