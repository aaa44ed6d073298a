"""The configuration: what it takes, what it refuses, and k."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gatedprune import GateConfig
from gatedprune.config import check_ratio, matches, predictor_size
from gatedprune.errors import ConfigError, GatedPruneError


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan, math.inf, True, False, "0.5", 1 + 0j])
def test_ratio_must_be_a_number_below_one(ratio: object) -> None:
    with pytest.raises(ConfigError, match=r"The `ratio` of wrap\(\) must be a float in \[0, 1\)\. Got"):
        GateConfig(ratio=ratio)  # type: ignore[arg-type]


def test_a_bad_ratio_in_a_mapping_names_its_pattern() -> None:
    with pytest.raises(ConfigError, match=r"pattern 'layer2\*', must be a float in \[0, 1\)\. Got 2"):
        GateConfig(ratio={"layer1*": 0.5, "layer2*": 2})
    with pytest.raises(ConfigError, match=r"mapping of wrap\(\) is empty"):
        GateConfig(ratio={})
    with pytest.raises(ConfigError, match="`ratio` must be a name pattern"):
        GateConfig(ratio={3: 0.5})  # type: ignore[dict-item]


def test_errors_are_value_errors_of_ours() -> None:
    with pytest.raises(ValueError, match="ratio") as caught:
        check_ratio(7, "set_ratio()")
    assert isinstance(caught.value, GatedPruneError)
    assert "set_ratio()" in str(caught.value)


@pytest.mark.parametrize("name", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8", None])
def test_counts_must_be_whole_and_positive(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be an integer of at least 1. Got"):
        GateConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_a_rank_is_whole_and_positive_or_none(value: object) -> None:
    with pytest.raises(ConfigError, match="`rank` must be an integer of at least 1. Got"):
        GateConfig(rank=value)  # type: ignore[arg-type]


def test_a_rank_counts_where_it_saves() -> None:
    assert GateConfig().predictor_rank(64, 64) is None
    config = GateConfig(rank=16)
    assert GateConfig.from_json(config.to_json()) == config
    assert config.predictor_rank(64, 64) == 16 and predictor_size(64, 64, 16) == 2048
    assert config.predictor_rank(32, 32) is None and predictor_size(32, 32, 16) == 1024  # as many: one matrix it is
    assert config.predictor_rank(1000, 3) is None and predictor_size(1000, 3, None) == 3000


@pytest.mark.parametrize("name", ["stream", "boost", "signed", "straight_through"])
def test_switches_must_be_booleans(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be True or False. Got 1"):
        GateConfig(**{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0.5, 0, -2, True, "4", float("inf"), float("nan")])
def test_a_bound_of_the_gain_is_a_finite_number_of_at_least_one(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"`max_gain` of wrap\(\) must be a finite number of at least 1, or None. Got"
    ):
        GateConfig(max_gain=value)  # type: ignore[arg-type]
    assert GateConfig(max_gain=1).max_gain == 1.0
    assert GateConfig(max_gain=None).max_gain is None


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize("value", [3, [""], [None], ("a", 2)])
def test_patterns_must_be_strings(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be a name pattern"):
        GateConfig(**{name: value})  # type: ignore[arg-type]


def test_one_pattern_may_stand_alone() -> None:
    assert GateConfig(include="layer1*").include == ("layer1*",)
    assert GateConfig(exclude=["a", "b"]).exclude == ("a", "b")


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GateConfig().ratio = 0.1  # type: ignore[misc]


def test_the_mapping_is_a_copy() -> None:
    ratios = {"a": 0.5}
    config = GateConfig(ratio=ratios)
    ratios["a"] = 3
    assert config.ratio_for("a") == 0.5


def test_json_round_trip() -> None:
    config = GateConfig(ratio={"layer1*": 0.25, "*": 0}, include=("l*",), exclude="x", round_to=8, stream=True)
    assert GateConfig.from_json(config.to_json()) == config
    assert GateConfig.from_dict(GateConfig().to_dict()) == GateConfig()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown options for GateConfig: density. Known: boost, exclude"):
        GateConfig.from_dict({"density": 0.5})


def test_the_first_pattern_that_fits_wins() -> None:
    config = GateConfig(ratio={"layer1.0*": 0.25, "layer1*": 0.75})
    assert config.ratio_for("layer1.0.conv1") == 0.25
    assert config.ratio_for("layer1.1.conv1") == 0.75
    assert config.ratio_for("layer2.0.conv1") is None


def test_patterns() -> None:
    assert matches("layer1.0.conv1", "layer1")
    assert matches("layer1.0.conv1", "layer?.0.*")
    assert not matches("layer10.0.conv1", "layer1")
    assert not matches("Layer1.0", "layer1*")


@given(st.integers(1, 4096), st.integers(0, 999), st.sampled_from([1, 2, 8, 16]), st.integers(1, 64))
def test_k_is_the_ceiling_rounded_up(channels: int, thousandths: int, round_to: int, least: int) -> None:
    k = GateConfig(round_to=round_to, min_channels=least).active_count(channels, thousandths / 1000)
    exact = max(math.ceil((1 - Fraction(thousandths, 1000)) * channels), least)
    assert k == min(channels, math.ceil(Fraction(exact, round_to)) * round_to)
    assert 1 <= k <= channels


def test_ratio_zero_keeps_all() -> None:
    assert GateConfig(round_to=8).active_count(13, 0.0) == 13


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan, True, "0.5"])
def test_macs_must_be_a_share(share: object) -> None:
    with pytest.raises(ConfigError, match=r"The `macs` of wrap\(\) must be a share of .* in \(0, 1\]\. Got"):
        GateConfig(macs=share)  # type: ignore[arg-type]


def test_ratio_and_macs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="either `ratio` or `macs`"):
        GateConfig(ratio=0.5, macs=0.5)
    assert GateConfig().ratio == 0.5
    assert GateConfig(macs=0.5).ratio is None
    assert GateConfig.from_json(GateConfig(macs=0.5).to_json()) == GateConfig(macs=0.5)
