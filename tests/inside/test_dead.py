"""`prune_dead`: equal where no removed channel wins, checked site by site; saved and loaded like any gated model."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import CheckpointError, ConfigError, DataError, ModelError
from gatedprune.functional import active_mask
from gatedprune.inside import DeadPruning, cut_sites, prune_dead, usage
from gatedprune.inside import dead as module
from gatedprune.testing import Case
from gatedprune.testing.case import outputs

EXACT = 1e-12


def case(name: str) -> Case:
    size = 64 if "vit" not in name else None
    return Case(lambda: timm.create_model(name, num_classes=5), name=name, size=size, ratio=0.5)


@pytest.fixture(scope="module")
def resnet() -> Case:
    return case("test_resnet")


@pytest.fixture(scope="module")
def pruned(resnet: Case) -> DeadPruning:
    return resnet.gated().prune_dead(list(resnet.inputs()))


def off(found: nn.Module, wanted: nn.Module, args: tuple) -> float:
    pairs = list(zip(outputs(found, args), outputs(wanted, args), strict=True))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


# Batch norms; depthwise layers, squeeze-excite, norms over the active channels; tokens and attention; groups.
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet_ln", "test_vit", "test_byobnet"])
def test_nothing_changes_where_no_removed_channel_wins(name: str) -> None:
    one = case(name)
    gated, args = one.gated(torch.float64), one.inputs(torch.float64)
    result = prune_dead(gated, list(args))
    assert result.removed > 0.05 * sum(result.channels.values()) and not result.left
    assert off(result.model, gated, args) < EXACT
    gains = [gate.last_gain for gate in result.model.gates.values()]
    assert any(bool((gain != 1).any()) for gain in gains), "no gain says anything"
    fast = gatedprune.compact(result.model, args, backend="torch")
    assert off(fast, gated, args) < EXACT


@pytest.mark.parametrize("rank", [3, 40])
def test_predictors_of_low_rank_are_cut_as_well(rank: int) -> None:
    one = Case(lambda: timm.create_model("test_resnet", num_classes=5), size=64, ratio=0.5, rank=rank)
    gated, args = one.gated(torch.float64), one.inputs(torch.float64)
    result = prune_dead(gated, list(args))
    ranks = [(gate.rank, result.model.gates[name].rank) for name, gate in gated.gates.items()]
    assert (rank, None if rank == 40 else rank) in ranks, "of 40, one matrix takes less where channels are gone"
    assert result.removed > 0 and off(result.model, gated, args) < EXACT


def test_only_dead_channels_go_and_everything_shrinks(resnet: Case, pruned: DeadPruning) -> None:
    gated = resnet.gated()
    outputs(gated, resnet.inputs())
    for name, gate in gated.gates.items():
        assert gate.last_active is not None
        used = active_mask(gate.last_active, gate.channels).any(0).nonzero()[:, 0]
        assert pruned.kept[name].tolist() == used.tolist()
        assert pruned.model.gates[name].channels == len(used)
        assert pruned.model.gates[name].active_count == gate.active_count
    assert pruned.removed == sum(g.channels for g in gated.gates.values()) - sum(map(len, pruned.kept.values())) > 0
    assert all(after < before for before, after in (pruned.parameters, pruned.macs, pruned.macs_left))
    assert pruned.parameters[1] == sum(p.numel() for p in pruned.model.parameters())
    assert pruned.macs[1] == gatedprune.find_sites(gatedprune.unwrap(copy.deepcopy(pruned.model)), resnet.inputs()).macs
    lines = str(pruned).splitlines()
    assert lines[0] == f"{pruned.removed} of 640 channels removed" and lines[-3].startswith("parameters: ")


def test_the_model_it_came_from_is_left_alone(resnet: Case) -> None:
    gated = resnet.gated().train()
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    result = gated.prune_dead(list(resnet.inputs()))
    assert all(torch.equal(value, before[name]) for name, value in gated.state_dict().items())
    assert gated.training and result.model.training and result.model is not gated
    loss = outputs(result.model, resnet.inputs())[0].sum()
    assert loss.isfinite()
    result.model(*resnet.inputs()).sum().backward()
    assert all(p.grad is not None for n, p in result.model.named_parameters() if n.endswith("conv1.weight"))


def test_cutting_is_what_torch_pruning_does(resnet: Case, pruned: DeadPruning) -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra compare")
    static = gatedprune.prune_static(
        resnet.gated(), keep=pruned.kept, example_inputs=resnet.inputs(), by="torch-pruning"
    )
    ours = gatedprune.unwrap(copy.deepcopy(pruned.model)).state_dict()
    theirs = static.model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rarely_winning_channels_go_too_and_k_gives_way(resnet: Case) -> None:
    gated = resnet.gated()
    counts = usage(gated, list(resnet.inputs()))
    result = gated.prune_dead(found=counts, below=0.7)  # of three images, channels that win for one or two go as well
    for name, gate in gated.gates.items():
        stays = max(2, len(counts[name].always))
        assert len(result.kept[name]) == stays == result.model.gates[name].channels
        assert result.model.gates[name].active_count == min(gate.active_count, stays)
    assert any(result.model.gates[n].active_count < g.active_count for n, g in gated.gates.items())
    assert outputs(result.model, resnet.inputs())[0].isfinite().all()


def test_matched_batch_norms_stay_matched(resnet: Case) -> None:
    (images,) = resnet.inputs(torch.float64)
    gated = gatedprune.wrap(resnet.dense().double(), ratio=0.5, example_inputs=images)
    gated.calibrate([images], rounds=1, folds=2)
    assert gated.gate_modules.matched
    result = gated.prune_dead([images])
    assert result.removed > 0 and result.model.gate_modules.matched == gated.gate_modules.matched
    assert off(result.model, gated, (images,)) < EXACT


def test_a_site_that_cannot_be_cut_stays_whole_and_says_why() -> None:
    # Its weights are standardised over the channels that they read; a classifier's are not.
    sites = ("stem.conv1", "final_conv")
    one = Case(lambda: timm.create_model("test_nfnet"), size=64, include=sites)
    gated = one.gated(torch.float64)
    result = gated.prune_dead(list(one.inputs(torch.float64)))
    assert "computes something else" in result.left["stem.conv1"] and "stem.conv1: its dead channels" in str(result)
    assert len(result.kept["stem.conv1"]) == result.channels["stem.conv1"] and result.removed > 0
    assert off(result.model, gated, one.inputs(torch.float64)) < EXACT


def test_stream_sites_stay_whole() -> None:
    one = Case(lambda: timm.create_model("test_resnet", num_classes=5), size=64, ratio=0.5, stream=True)
    gated, args = one.gated(torch.float64), one.inputs(torch.float64)
    result = gated.prune_dead(list(args))
    assert set(result.left.values()) == {"it is on the residual stream"} and result.removed > 0
    assert off(result.model, gated, args) < EXACT


def test_what_a_wrong_cut_would_change_is_caught(resnet: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, sites: object, kept: dict[str, Tensor]) -> None:
        name = "layer1.0.conv1"
        if name in kept:  # another channel in place of the last one
            gone = next(i for i in range(32) if i not in kept[name].tolist())
            kept = {**kept, name: torch.cat([kept[name][:-1], torch.tensor([gone])]).sort().values}
        cut_sites(model, sites, kept)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "cut_sites", wrong)
    result = resnet.gated().prune_dead(list(resnet.inputs()))
    assert "computes something else" in result.left["layer1.0.conv1"]


def test_gates_that_lost_what_they_had_learnt_are_caught(resnet: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_copy_gate", lambda *_: None)
    with pytest.raises(ModelError, match="computes something else .* it holds more than gates and layers"):
        resnet.gated().prune_dead(list(resnet.inputs()))


def test_saved_and_loaded(resnet: Case, pruned: DeadPruning, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gatedprune.save(pruned.model, tmp_path / "small")
    gatedprune.save(resnet.gated(), tmp_path / "large")
    loaded = gatedprune.load(tmp_path / "small")
    a, b = outputs(loaded, resnet.inputs()), outputs(pruned.model, resnet.inputs())
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    small, large = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "large"))
    assert small < large
    again = loaded.prune_dead([resnet.inputs()[0][:1]])  # pruned twice: indices are those of the first model
    assert again.removed > 0
    gatedprune.save(again.model, tmp_path / "smaller")
    given = gatedprune.load(tmp_path / "smaller", resnet.dense())
    for model in (given, gatedprune.load(tmp_path / "smaller", gatedprune.unwrap(copy.deepcopy(again.model)))):
        assert torch.equal(outputs(model, resnet.inputs())[0], outputs(again.model, resnet.inputs())[0])


def test_a_pruned_file_that_is_damaged_or_of_another_model(pruned: DeadPruning, tmp_path: Path) -> None:
    gatedprune.save(pruned.model, tmp_path / "m")
    file = tmp_path / "m" / "gatedprune.json"
    saved = json.loads(file.read_text())
    other = timm.create_model("test_resnet", num_classes=5)
    other.layer1[0].conv1 = nn.Conv2d(32, 40, 1, bias=False)
    other.layer1[0].bn1 = nn.BatchNorm2d(40)
    other.layer1[0].conv2 = nn.Conv2d(40, 32, 3, padding=1, bias=False)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"holds a pruned model.*layer1.0.conv1 had 32 channels"):
        gatedprune.load(tmp_path / "m", other)
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())
    saved["pruned"]["conv1.0"][1][-1] = 99
    file.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match="is damaged"):
        gatedprune.load(tmp_path / "m")


def test_refusals(resnet: Case) -> None:
    gated, (images,) = resnet.gated(), resnet.inputs()
    with pytest.raises(ModelError, match="is not gated"):
        prune_dead(nn.Identity(), [images])
    with pytest.raises(ConfigError, match="needs either `batches`"):
        gated.prune_dead()
    with pytest.raises(ConfigError, match=r"`below`, must be a float in \[0, 1\)"):
        gated.prune_dead([images], below=1.0)
    with pytest.raises(DataError, match="are empty"):
        gated.prune_dead([])
    found = usage(case("test_byobnet").gated(), [images])
    with pytest.raises(ConfigError, match="counts other sites"):
        gated.prune_dead(found=found)


def test_a_layer_of_another_kind_is_refused_before_anything_is_cut(resnet: Case) -> None:
    gated, dense = resnet.gated(), resnet.dense()
    nn.utils.parametrizations.weight_norm(dense.layer1[0].conv1)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(ModelError, match=r"layer1.0.conv1 .* cannot be cut: it has no parameter `weight` of its own"):
        cut_sites(dense, gated.gated_sites, {"layer1.0.conv1": torch.arange(4)})
    assert all(torch.equal(v, before[n]) for n, v in dense.state_dict().items())
