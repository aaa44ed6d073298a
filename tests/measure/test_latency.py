"""The timer: who is called, how often, in what order, and that everything is as before afterwards."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch
from torch import Tensor, nn

from gatedprune.errors import ConfigError, DataError
from gatedprune.measure import measure_latency


class Recorder(nn.Module):
    """Writes down each call and the state it was called in."""

    def __init__(self, name: str, log: list[str], pause: float = 0.0) -> None:
        super().__init__()
        self.name, self.log, self.pause = name, log, pause
        self.norm = nn.BatchNorm1d(2)
        self.states: set[tuple[bool, bool, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(self.name)
        self.states.add((self.training, torch.is_inference_mode_enabled(), torch.get_num_threads()))
        time.sleep(self.pause)
        return self.norm(x)


def test_alternates_and_counts_only_the_timed_rounds() -> None:
    log: list[str] = []
    models = {name: Recorder(name, log) for name in "abc"}
    found = measure_latency(models, torch.zeros(4, 2), warmup=1, repeats=3)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert list(found) == ["a", "b", "c"]
    assert {latency.repeats for latency in found.values()} == {3}
    assert {(latency.batch, latency.device) for latency in found.values()} == {(4, "cpu")}


def test_runs_in_eval_and_inference_mode_on_the_asked_threads_and_restores() -> None:
    model = Recorder("a", []).train()
    model.norm.eval()  # a frozen norm in a model that trains
    before = torch.get_num_threads()
    found = measure_latency({"a": model}, torch.zeros(4, 2), threads=before + 1, warmup=0, repeats=2)
    assert model.states == {(False, True, before + 1)}
    assert found["a"].threads == before + 1
    assert torch.get_num_threads() == before
    assert model.training and not model.norm.training
    assert gc.isenabled()


def test_restores_after_an_error_too() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no")

    model = Recorder("a", []).train()
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="no"):
        measure_latency({"a": model, "b": broken}, torch.zeros(4, 2), threads=before + 1)
    assert model.training
    assert torch.get_num_threads() == before
    assert gc.isenabled()


def test_measures_milliseconds_in_order() -> None:
    log: list[str] = []
    models = {"quick": Recorder("q", log), "slow": Recorder("s", log, pause=0.02)}
    found = measure_latency(models, torch.zeros(4, 2), warmup=1, repeats=5)
    assert 20 <= found["slow"].p20_ms <= found["slow"].median_ms <= found["slow"].p80_ms < 2000
    assert found["quick"].median_ms < found["slow"].p20_ms
    assert json.loads(json.dumps(found["slow"].to_dict()))["repeats"] == 5
    assert f"{found['slow'].median_ms:.2f} ms" in str(found["slow"])


def test_warm_up_is_not_timed() -> None:
    model = Recorder("a", [], pause=0.5)

    def quick_after_the_first(x: Tensor) -> Tensor:
        y = model(x)
        model.pause = 0.0
        return y

    found = measure_latency({"a": quick_after_the_first}, torch.zeros(4, 2), warmup=1, repeats=1)
    assert found["a"].median_ms < 200


def test_several_arguments() -> None:
    found = measure_latency({"add": torch.add}, (torch.zeros(3, 2), torch.zeros(3, 2)), warmup=0, repeats=1)
    assert found["add"].batch == 3


@pytest.mark.parametrize("models", [{}, [nn.Identity()], None])
def test_models_must_be_named(models: object) -> None:
    with pytest.raises(ConfigError, match=r"`models` of measure_latency\(\) must be a non-empty dict"):
        measure_latency(models, torch.zeros(1, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [{"threads": 0}, {"warmup": -1}, {"repeats": 0}, {"repeats": 2.5}, {"repeats": True}]
)
def test_numbers_must_be_in_their_domain(option: dict[str, int]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=f"`{name}` of measure_latency"):
        measure_latency({"a": nn.Identity()}, torch.zeros(1, 2), **option)  # type: ignore[arg-type]


def test_inputs_must_be_a_batch() -> None:
    with pytest.raises(DataError, match=r"The inputs of measure_latency\(\) must be a tensor"):
        measure_latency({"a": nn.Identity()}, "image.png")  # type: ignore[arg-type]
