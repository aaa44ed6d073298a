"""The table of dense, static and dynamic: same sites, same k, and no time where the results differ."""

from __future__ import annotations

import copy
import csv
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import gatedprune
from gatedprune import compare
from gatedprune.compare import Comparison, compare_models, comparison, equality, rankings
from gatedprune.compare.equality import Equality, check_equality
from gatedprune.compare.pareto import front
from gatedprune.engine import NarrowConv2d
from gatedprune.errors import ConfigError, DataError, ModelError

IMAGES = (2, 3, 64, 64)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet.r160_in1k", num_classes=7)


class Small(nn.Module):
    """Two inner sites and nothing else: quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 16, 3), nn.ReLU(),
            nn.Conv2d(16, 5, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


def trained(model: nn.Module, images: torch.Tensor, **options: object) -> nn.Module:
    """A gated model whose choice depends on the image, as after training."""
    gated = gatedprune.wrap(model, example_inputs=images, **options).eval()
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(0.3 * torch.randn_like(gate.weight))
    return gated


@pytest.fixture(scope="module")
def found() -> Comparison:
    images = torch.randn(IMAGES)
    seen: list[str] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(type(model).__name__)
        with torch.no_grad():
            return {"mean": float(model(images).mean()), "call": len(seen)}

    return compare(resnet(), images, ratio=0.5, evaluate=evaluate, warmup=1, repeats=2)


def test_rows_are_dense_static_dynamic(found: Comparison) -> None:
    assert [row.name for row in found.rows] == ["dense", "static", "dynamic"]
    dense, static, dynamic = found.rows
    assert static.macs.total < 0.7 * dense.macs.total
    assert static.macs.predictors == dense.macs.predictors == 0
    assert dynamic.macs.predictors > 0
    # Same sites and same k: what the layers cost is the same, the predictors come on top.
    assert dynamic.macs.total - dynamic.macs.predictors == static.macs.total
    assert static.parameters < dense.parameters < dynamic.parameters
    assert [row.metrics["call"] for row in found.rows] == [1, 2, 3]


def test_macs_agree_with_the_flop_counter(found: Comparison) -> None:
    for row in found.rows:
        assert row.macs.total == row.macs.operators, row.name


def test_untrained_static_and_dynamic_say_the_same(found: Comparison) -> None:
    assert found["static"].metrics["mean"] == pytest.approx(found["dynamic"].metrics["mean"], rel=1e-4)
    assert found["dense"].metrics["mean"] != pytest.approx(found["dynamic"].metrics["mean"], rel=1e-4)


def test_table_names_rows_columns_and_conditions(found: Comparison) -> None:
    text = str(found)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["dense", "static", "dynamic"]
    assert {"MMACs", "predictors", "ms", "mean", "call"} <= set(lines[0].split())
    assert f"{found['dense'].latency.median_ms:,.2f}" in lines[2]
    assert "1 thread," in text and "2×3×64×64" in text and torch.__version__.split("+")[0] in text
    assert re.search(r"10 sites keep \d+ of \d+ channels", text)
    assert len({len(line) for line in lines[:5]}) <= 2


def test_json_is_written_whole(found: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    found.to_json(path)
    read = json.loads(path.read_text())
    assert read == json.loads(json.dumps(found.to_dict()))
    assert read["rows"][2]["macs"]["predictors"] > 0
    assert read["equality"]["green"] is True
    assert read["environment"]["packages"]["torch-pruning"]
    assert [file.name for file in tmp_path.iterdir()] == ["comparison.json"]


def test_a_failed_write_leaves_the_old_file(found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "comparison.json"
    path.write_text("old")
    monkeypatch.setattr(json, "dump", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        found.to_json(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_gated_model_is_compared_as_it_is_and_left_alone() -> None:
    images = torch.randn(IMAGES)
    gated = trained(Small(), images, ratio=0.25).train()
    before = copy.deepcopy(gated.state_dict())
    result = compare(gated, images, warmup=0, repeats=1)
    assert gatedprune.is_gated(gated) and gated.training
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())
    assert result.active == {name: (g.active_count, g.channels) for name, g in gated.gates.items()}
    assert result["static"].macs.total == result["dynamic"].macs.total - result["dynamic"].macs.predictors
    assert result.equality.same_channels


def test_a_dense_model_is_left_alone() -> None:
    model = Small()
    keys = list(model.state_dict())
    compare(model, torch.randn(IMAGES), warmup=0, repeats=1)
    assert not gatedprune.is_gated(model)
    assert list(model.state_dict()) == keys


def test_sites_on_the_stream_are_said_to_be_dynamic_only() -> None:
    images = torch.randn(IMAGES)
    result = compare(resnet(), images, config=gatedprune.GateConfig(stream=True), warmup=0, repeats=1)
    assert result.dynamic_only
    assert "on the residual stream, stay whole in the static model" in str(result)


def test_three_models_of_your_own() -> None:
    images = torch.randn(IMAGES)
    gated = trained(Small(), images)
    static = gatedprune.prune_static(gated, example_inputs=images).model
    result = compare_models(Small(), static, gated, images, warmup=0, repeats=1)
    assert result["static"].parameters == sum(p.numel() for p in static.parameters())
    with pytest.raises(ConfigError, match=r"`gated` of compare_models\(\) has no gates"):
        compare_models(Small(), static, Small(), images)


@pytest.mark.parametrize("seed", [1, 7])
def test_a_handful_of_outputs_is_not_refused_by_luck(seed: int) -> None:
    """Of four numbers, the masked model's may happen to be rounded well: these two seeds were refused for it."""
    torch.manual_seed(seed)
    model, images = timm.create_model("test_resnet", num_classes=4).eval(), torch.randn(1, 3, 64, 64)
    gated = gatedprune.wrap(model, example_inputs=images)
    assert check_equality(gated.eval(), gatedprune.compact(gated, images), (images,)).green


def test_one_unlucky_input_is_tried_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(IMAGES)
    gated = trained(Small(), images)
    errors, inputs = [1.0], []  # the compact model's, on the first input alone

    def rms(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
        inputs.append(len(found))
        return errors.pop() if errors else 1e-7

    monkeypatch.setattr(equality, "_rms", rms)
    monkeypatch.setattr(equality, "ENOUGH_VALUES", 1)
    assert check_equality(gated, gatedprune.compact(gated, images), (images,)).green
    assert inputs == [1, 1, 2, 2]


def test_nothing_is_timed_on_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(IMAGES)
    gated = trained(Small(), images)
    static = gatedprune.prune_static(gated, example_inputs=images).model
    timed: list[str] = []
    monkeypatch.setattr(comparison, "measure_latency", lambda *a, **k: timed.append("timed"))
    forward = NarrowConv2d.forward

    def slightly_wrong(self: NarrowConv2d, x: torch.Tensor, *rest: object) -> object:
        y = forward(self, x, *rest)
        return (y[0] * (1 + 1e-5), y[1]) if self.subsample else y * (1 + 1e-5)

    monkeypatch.setattr(NarrowConv2d, "forward", slightly_wrong)
    with pytest.raises(ModelError, match="does not compute what the gated model computes"):
        compare_models(Small(), static, gated, images)
    assert timed == []


def test_equality_on_a_choice_that_varies_and_on_another_model() -> None:
    images = torch.randn(4, 3, 64, 64) * torch.rand(4, 3, 1, 1) * 3
    gated = trained(Small(), images)
    fast = gatedprune.compact(gated, images)
    report = check_equality(gated, fast, (images,))
    assert any(len(gate.last_active.unique(dim=0)) > 1 for gate in gated.gates.values())
    assert report.green and report.float64 < 1e-9
    other = copy.deepcopy(gated)
    with torch.no_grad():
        other.body[5].weight.mul_(1 + 1e-5)
    with pytest.raises(ModelError, match="was not timed"):
        check_equality(other, fast, (images,))
    # Where even the chosen channels differ, rounding may not serve as the excuse: float64 tells.
    with pytest.raises(ModelError, match="was not timed"):
        check_equality(trained(Small(), images), fast, (images,))


def test_nan_is_never_small() -> None:
    zero, nan = torch.zeros(2), torch.tensor([0.0, float("nan")])
    for pair in ([zero, nan], [nan, zero]):
        assert equality._largest(pair, [zero, zero]) == float("inf")
        assert equality._rms(pair, [zero, zero]) == float("inf")


@pytest.mark.parametrize(
    ("values", "green"),
    [
        ((1e-12, 1e-6, 2e-7, 1e-7, True), True),
        ((1e-12, 1e-6, 3e-6, 1e-7, True), False),
        ((1e-12, 0.1, 0.1, 1e-7, False), True),  # a tie fell the other way
        ((1e-6, 1e-6, 1e-7, 1e-7, True), False),
        ((float("nan"), 1e-6, 1e-7, 1e-7, True), False),
        ((1e-12, 1e-6, float("inf"), 1e-7, True), False),
    ],
)
def test_what_counts_as_equal(values: tuple, green: bool) -> None:
    assert Equality(*values).green is green


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"config": gatedprune.GateConfig()}])
def test_options_of_gating_are_for_dense_models(options: dict) -> None:
    images = torch.randn(IMAGES)
    with pytest.raises(ConfigError, match="this one is gated already"):
        compare(trained(Small(), images), images, **options)


def test_inputs_must_be_given() -> None:
    with pytest.raises(DataError, match="`example_inputs` of compare"):
        compare(Small(), None)


def test_evaluate_must_return_named_numbers() -> None:
    with pytest.raises(ConfigError, match=r"`evaluate` of compare\(\) must return a dict.*Got float"):
        compare(Small(), torch.randn(IMAGES), evaluate=lambda model: 0.5, warmup=0, repeats=1)  # type: ignore[arg-type,return-value]


def test_several_rankings_ratios_and_dynamic_after_static() -> None:
    images = torch.randn(IMAGES)
    data = [torch.randn(4, 3, 64, 64) * torch.rand(4, 3, 1, 1) for _ in range(3)]
    told: list[str] = []
    names = ("magnitude-l2", "random", "taylor", "activation", "batch-norm")
    found = compare(Small(), images, ratio=[0.25, 0.5], rankings=names, calibrate=data, combined=True, warmup=0,
                    repeats=1, on_row=told.append)  # fmt: skip
    kinds = ["static"] * 4 + ["dynamic", "static, then dynamic"]
    assert [row.kind for row in found.rows] == ["dense", *kinds, *kinds]
    assert told == [*(row.name for row in found.rows), "time"]
    for ratio in (0.25, 0.5):
        rows = [row for row in found.rows if row.ratio == ratio]
        executed = {row.macs.total - row.macs.predictors for row in rows}
        assert len(executed) == 1, "the same number of channels in every row"
        assert [row.ranking for row in rows if row.kind == "static"] == list(names[:4])
        combined = found[f"static, then dynamic @ {ratio}"]
        assert combined.equality is not None and combined.equality.green
        # Channels are gone for good, so that it is smaller than the dynamic model.
        assert combined.parameters < found[f"dynamic @ {ratio}"].parameters
        assert combined.memory is not None and found["dense"].memory is not None
        assert combined.memory.weights < found["dense"].memory.weights + 20_000
    assert found["dynamic @ 0.5"].macs.total < found["dynamic @ 0.25"].macs.total
    assert "static models of equal shapes are timed once" in found.notes
    # One of the two sites has no batch norm: that ranking cannot be had, and a note says so, once.
    (missing,) = [note for note in found.notes if "no row" in note]
    assert missing.startswith("no row 'static, batch-norm': ")


@pytest.mark.parametrize("options", [{}, {"rankings": ["magnitude-l2", "activation"]}])
def test_static_models_get_the_statistics_of_the_samples_too(options: dict) -> None:
    """The norm of `Small` reads the images alone, so that they are the same whatever is pruned."""
    images, data = torch.randn(IMAGES), [torch.randn(IMAGES) + 3 for _ in range(2)]
    norms: list[nn.BatchNorm2d] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        norms.extend(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        return {}

    found = compare(Small(), images, calibrate=data, evaluate=evaluate, warmup=0, repeats=1, **options)
    dense, *static = norms
    assert len(static) == sum(row.kind == "static" for row in found.rows)
    assert bool((dense.running_mean == 0).all())
    for norm in static:
        assert norm.num_features == 6 and norm.running_mean is not None
        assert bool((norm.running_mean.abs() > 0.1).all()), "the images are 3 on average"
    assert any("batch norms" in note for note in found.notes)


def test_several_ratios_of_a_model_that_is_gated() -> None:
    images = torch.randn(IMAGES)
    gated = trained(Small(), images, ratio=0.25)
    found = compare(gated, images, ratio=[0, 0.5], warmup=0, repeats=1)
    assert [row.name for row in found.rows] == [
        "dense", "static @ 0", "dynamic @ 0", "static @ 0.5", "dynamic @ 0.5"]  # fmt: skip
    assert found["static @ 0"].macs.total == found["dense"].macs.total > found["static @ 0.5"].macs.total
    assert {gate.ratio for gate in gated.gates.values()} == {0.25}


def test_what_ranks_is_what_is_kept() -> None:
    """Activation: the channels of the largest mean contribution; Taylor: of the largest weight times gradient."""
    images = torch.randn(IMAGES)
    gated = gatedprune.wrap(Small(), 0.5, example_inputs=images).eval()
    before = copy.deepcopy(gated.state_dict())
    pruner = rankings.Pruner(gated, (images,), [images, images * 2])
    scores = rankings.mean_contributions(gated, [images, images * 2])
    for name, kept in pruner("activation").kept.items():
        others = [c for c in range(len(scores[name])) if c not in kept.tolist()]
        assert len(kept) == gated.gates[name].active_count and scores[name][kept].min() >= scores[name][others].max()
    half = {name: k // 2 for name, k in pruner("activation").kept.items() for k in [len(k)]}
    assert {name: len(k) for name, k in pruner("taylor", half).kept.items()} == half
    assert all(parameter.grad is None for parameter in gated.parameters())
    assert all(torch.equal(value, before[key]) for key, value in gated.state_dict().items())
    dead = "body.0"
    with torch.no_grad():
        gated.get_submodule(dead).weight[::2] = 0  # writes nothing: no activation, no gradient
    for ranking in ("activation", "taylor", "magnitude-l1"):
        kept = rankings.Pruner(gated, (images,), [images])(ranking).kept[dead]
        assert kept.tolist() == list(range(1, 12, 2)), ranking


def test_a_ranking_that_fails_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object, ranking: str, counts: object = None) -> None:
        raise ModelError("it cannot be traced")

    monkeypatch.setattr(rankings.Pruner, "__call__", fails)
    found = compare(Small(), torch.randn(IMAGES), rankings=["random"], combined=True, warmup=0, repeats=1)
    assert [row.name for row in found.rows] == ["dense", "dynamic"]
    assert "no row 'static, random': it cannot be traced" in str(found)
    assert "no row 'static, then dynamic': it cannot be traced" in str(found)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rankings": ["luck"]}, "Unknown ranking 'luck'"),
        ({"rankings": "random"}, "must be a sequence of names"),
        ({"rankings": ["taylor"]}, "'taylor' of static pruning needs data"),
        ({"rankings": ["random"], "importance": lambda group: None}, "either `importance` or `rankings`"),
        ({"ratio": []}, "is an empty sequence"),
        ({"ratio": [0.5, 1.0]}, r"`ratio` of compare\(\) must be a float in"),
    ],
)
def test_requests_that_make_no_sense(options: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        compare(Small(), torch.randn(IMAGES), **options)
    with pytest.raises(DataError, match="are an iterator"):
        compare(Small(), torch.randn(IMAGES), calibrate=iter([torch.randn(IMAGES)]))


def test_csv_html_and_plot(found: Comparison, tmp_path: Path) -> None:
    found.to_csv(tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["dense", "static", "dynamic"]
    assert [float(row["mean"]) for row in rows] == [row.metrics["mean"] for row in found.rows]
    assert [int(row["bytes_peak"]) for row in rows] == [row.memory.peak for row in found.rows if row.memory]
    page = found._repr_html_()
    assert page.count("<tr>") == 4 and "<th style='text-align:left'>dynamic</th>" in page
    pytest.importorskip("matplotlib")
    assert "<svg" in page
    figure = found.plot(tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 5000
    assert [axes.get_xlabel() for axes in figure.axes] == ["GMACs per sample", "ms a batch of 2"]
    assert {axes.get_ylabel() for axes in figure.axes} == {"mean"}


def test_the_front_holds_what_nothing_beats() -> None:
    points = [(4.0, 90.0), (1.0, 50.0), (2.0, 40.0), (2.0, 70.0), (3.0, 70.0), (5.0, 90.0)]
    assert front(points) == [1, 3, 0]
    assert front([]) == []
