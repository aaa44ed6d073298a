"""Calibration on small timm models: the gain stays 1, the choice follows the contributions, nothing else changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import gatedprune
from gatedprune.errors import ConfigError, DataError, ModelError
from gatedprune.sites import suspended
from gatedprune.training import Contributions, OracleChoice, held_out_r2
from gatedprune.training.divergence import divergence
from gatedprune.training.matching import following_norms
from gatedprune.training.tempering import SHARES
from tests.tiny import SIZE, create


def images(n: int = 24, seed: int = 0) -> Tensor:
    """Images that differ in brightness, colour and coarseness: something to choose by."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 6, 6, generator=g) * torch.rand(n, 3, 1, 1, generator=g) * 2
    x = torch.nn.functional.interpolate(coarse, 48, mode="bilinear")
    return x + torch.randn(n, 3, 1, 1, generator=g)


def gated(name: str = "test_efficientnet", ratio: float = 0.5, **options: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    return gatedprune.wrap(model, ratio, example_inputs=torch.zeros(1, 3, 48, 48), **options)


def dense_record(model: Any, x: Tensor) -> Contributions:
    with torch.no_grad(), suspended(model), Contributions(model, following_norms(model, x)) as record:
        model(x)
    return record


@pytest.mark.parametrize("signed", [False, True])
def test_the_first_gate_is_the_ridge_regression_of_contributions(signed: bool) -> None:
    """Against the regression computed from the data; the shift and the scale are the same for all channels."""
    model, x = gated(signed=signed), images()
    found = model.calibrate(x.split(5), rounds=1, temper=False)
    name, gate = next(iter(model.gates.items()))
    record, info = dense_record(model, x), found.sites[name]
    s, t = record.seen[name], record.target(name)
    size = t.square().mean().sqrt()
    wanted = ((s - s.mean(0)) @ standardised_ridge(s, t, info.shrinkage).T + t.mean(0)) / size + info.offset
    g = gate.select(s.float())[2]
    torch.testing.assert_close(g.double(), wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gate.start.double(), t.mean(0) / size + info.offset, rtol=1e-5, atol=1e-6)
    assert found.samples == 24


def test_a_predictor_of_low_rank_is_the_nearest_on_what_the_gate_sees() -> None:
    whole, cut, x = gated(), gated(rank=2), images()
    found = [model.calibrate(x.split(5), rounds=1, temper=False) for model in (whole, cut)]
    assert [f.sites for f in found[:1]] == [f.sites for f in found[1:]]
    record, ranks = dense_record(whole, x), set()
    for name, gate in cut.gates.items():
        full, s = whole.gates[name], record.seen[name]
        saliencies = [(g.predictor.double() @ (s - s.mean(0)).T) for g in (full, gate)]
        left = torch.linalg.svdvals(saliencies[0])[2 if gate.rank else len(s) :].square().sum()
        lost = (saliencies[0] - saliencies[1]).square().sum()
        torch.testing.assert_close(lost, left, rtol=1e-3, atol=1e-6 * float(saliencies[0].square().sum() + 1e-9))
        mean = gate.predictor.double() @ s.mean(0) + gate.bias.double()
        torch.testing.assert_close(mean, gate.start.double(), rtol=1e-4, atol=1e-4)
        ranks.add(gate.rank)
    assert 2 in ranks


def test_contributions_are_what_the_reader_loses() -> None:
    """Removing one channel before a 1×1 convolution changes its output by exactly the contribution, in mean square."""
    model, x = gated(ratio=0.0), images(6)
    site = next(s for s in model.gated_sites if model.get_submodule(s.consumers[0].path).kernel_size == (1, 1))
    record = dense_record(model, x)
    reader, seen = model.get_submodule(site.consumers[0].path), []
    handle = reader.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), suspended(model):
        model(x)
    handle.remove()
    lost = torch.zeros_like(seen[0])
    lost[:, 3] = seen[0][:, 3]
    with torch.no_grad():
        change = torch.nn.functional.conv2d(lost, reader.weight).double().square().sum(1).mean((1, 2)).sqrt()
    torch.testing.assert_close(record.target(site.name)[:, 3], change, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_vit"])
def test_the_gain_stays_one_and_ratio_zero_changes_nothing(name: str) -> None:
    size = 160 if name == "test_vit" else 48
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.nn.functional.interpolate(images(12), size)
    with torch.no_grad():
        dense = model(x)
    model = gatedprune.wrap(model, 0.5, example_inputs=x[:1])
    found = model.calibrate([x[:6], x[6:]], rounds=2, temper=False)  # random weights: static may be as near
    with torch.no_grad():
        model(x)
        for site, gate in model.gates.items():
            assert torch.equal(gate.last_gain, torch.ones_like(gate.last_gain)), site
            assert bool((gate.last_saliency > 0).all()), f"{site}: channels that the rectifier cut off are not ranked"
        assert any((g.last_active != g.last_active[:1]).any() for g in model.gates.values()), (
            "one choice for all images"
        )
        model.set_ratio(0.0)
        torch.testing.assert_close(model(x), dense, rtol=1e-6, atol=1e-6)
    assert set(found.sites) == set(model.gates)
    assert "R²" in str(found)


def test_batch_size_and_labels_do_not_matter() -> None:
    a, b, x = gated(), gated(), images()
    gatedprune.calibrate(a, x.split(3), rounds=2, norms=False)  # matching goes by batches
    gatedprune.calibrate(b, [(x[:20], torch.zeros(20)), [x[20:], None]], rounds=2, norms=False)
    for site, gate in a.gates.items():
        torch.testing.assert_close(gate.weight, b.gates[site].weight, rtol=1e-2, atol=1e-4)
        torch.testing.assert_close(gate.start, b.gates[site].start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "test_coatnet", "test_resnet"])
def test_compact_equals_masked_after_calibration(name: str) -> None:
    """With norms matched before a gain, behind it and among the readers."""
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(images(8), SIZE).double()
    model: Any = gatedprune.wrap(create(name).double(), 0.5, example_inputs=x[:1], signed=True)
    assert model.calibrate(x.split(4), rounds=2, temper=False).norms
    fast = gatedprune.compact(model, x[:1])
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-12)


def test_choosing_per_image_loses_less_than_choosing_once() -> None:
    """On images that calibration has not seen; the oracle loses least."""
    model, x, unseen = gated(signed=True), images(60), images(30, seed=1)
    model.calibrate(x.split(20), temper=False)
    record = dense_record(model, unseen)
    name = next(iter(model.gates))
    gate, energy = model.gates[name], record.costs(name)

    def lost(active: Tensor) -> float:
        return 1 - float((energy.gather(1, active).sum(1) / energy.sum(1)).mean())

    k = gate.active_count
    dynamic = lost(gate.select(record.seen[name].float())[0])
    static = lost(gate.start.topk(k).indices.expand(len(unseen), k))
    assert lost(energy.topk(k).indices) <= dynamic < static


def test_further_rounds_suit_what_gates_see_of_a_gated_model() -> None:
    one, more, x = gated(signed=True), gated(signed=True), images(60)
    fits = one.calibrate(x.split(20), rounds=1, temper=False), more.calibrate(x.split(20), rounds=4, temper=False)
    unseen = [images(40, seed=2)]
    r2 = [held_out_r2(m, f, unseen) for m, f in zip((one, more), fits, strict=True)]
    _, *later = one.gates
    assert sum(r2[1][n] for n in later) > sum(r2[0][n] for n in later)


@pytest.mark.parametrize("rank", [None, 2])
def test_tempering_measures_on_samples_that_predictors_were_not_fitted_to(rank: int | None) -> None:
    """Each share's loss, against predictors fitted by hand to the other folds; without matched norms, in one round."""
    model, x, folds = gated(rank=rank), images(30), 3
    found = model.calibrate(x.split(7), rounds=1, folds=folds, norms=False, temper=True)
    assert tuple(found.losses) == (*SHARES, 0.0)
    hand = gated()
    record, fold = dense_record(hand, x), torch.arange(len(x)) % folds
    with torch.no_grad(), suspended(hand):
        dense = hand(x)
    cut = {name: root(record.seen[name]) for name in hand.gates}
    for share in (*SHARES, 0.0):
        total = 0.0
        for f in range(folds):
            for name, gate in hand.gates.items():
                info, s, t = found.sites[name], record.seen[name][fold != f], record.target(name)[fold != f]
                phi = share * info.scale * standardised_ridge(s, t, info.shrinkage)
                if rank is not None and phi.any():  # as the gate of that rank keeps it
                    u = torch.linalg.svd(phi @ cut[name], full_matrices=False).U[:, :rank]
                    phi = u @ u.T @ phi
                with torch.no_grad():
                    gate.weight.copy_(phi)
                    gate.bias.copy_(info.scale * t.mean(0) + info.offset - phi @ s.mean(0))
                    gate.start.copy_(info.scale * t.mean(0) + info.offset)
                    gate.strength.zero_()
            with torch.no_grad():
                total += float(divergence(dense[fold == f], hand(x[fold == f])).sum())
        assert found.losses[share] == pytest.approx(total / len(x), rel=1e-3), share
    assert len({round(loss, 9) for loss in found.losses.values()}) > 3, "the shares choose alike"


def standardised_ridge(s: Tensor, t: Tensor, shrinkage: float) -> Tensor:
    """φ (C, P)."""
    spread = s.std(0, unbiased=False).clamp_min(1e-12)
    z = (s - s.mean(0)) / spread
    if math.isinf(shrinkage):
        return torch.zeros(t.shape[1], s.shape[1]).double()
    beta = torch.linalg.solve(z.T @ z / len(z) + shrinkage * torch.eye(z.shape[1]), z.T @ (t - t.mean(0)) / len(z))
    return (beta / spread[:, None]).T


def root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((s - s.mean(0)).T @ (s - s.mean(0)) / len(s))
    return vectors * values.clamp_min(0).sqrt()


@pytest.mark.parametrize(("name", "signed"), [("test_efficientnet", True), ("test_resnet", False)])
def test_tempering_shrinks_all_predictors_by_the_best_share(name: str, signed: bool) -> None:
    """Or takes the static choice, which is the best for one of the two here."""
    model, x = gated(name, signed=signed), images(30)
    found = model.calibrate(x.split(10), rounds=2)
    assert found.losses[found.share] == min(found.losses.values())
    assert (0 < found.share < 1) if signed else found.share == 0
    whole = gated(name, signed=signed)
    full = whole.calibrate(x.split(10), rounds=2, dynamic=found.share > 0, temper=False)
    assert full.share == 1 and not full.losses
    assert found.norms == full.norms != ()
    for name, gate in model.gates.items():
        other = whole.gates[name]
        torch.testing.assert_close(gate.weight, found.share * other.weight, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gate.start, other.start)
        shifts = [(g.start - g.bias).detach() for g in (gate, other)]
        torch.testing.assert_close(shifts[0], found.share * shifts[1], rtol=1e-4, atol=1e-5)
    assert f"predictors at {found.share:g} of that" in str(found)
    assert found.to_dict()["losses"][0] == {"share": 1.0, "loss": found.losses[1.0]}


def test_nothing_to_temper() -> None:
    for model, options in ((gated(), {"dynamic": False}), (gated(ratio=0.0), {})):
        found = model.calibrate(images().split(8), rounds=1, **options)
        assert found.share == 1 and not found.losses


def test_training_mode_and_statistics_come_back() -> None:
    model, x = gated().train(), images(8)
    before = copy.deepcopy(model.backbone_state_dict())
    model.calibrate([x])
    assert model.training
    assert not any(g.last_active is not None for g in model.gates.values())
    for key, value in model.backbone_state_dict().items():
        assert torch.equal(value, before[key]), key


def test_training_moves_the_gain_of_a_calibrated_model() -> None:
    model, x = gated(), images(8)
    model.calibrate([x])
    moved = set()
    for direction in (1, -1):  # a strength of 0 can only rise
        model.zero_grad()
        (direction * model.train()(x).square().mean()).backward()
        grads = {name: float(g.strength.grad) for name, g in model.gates.items()}
        assert max(grads.values()) <= 0
        moved |= {name for name, grad in grads.items() if grad < 0}
    assert moved == set(model.gates)


def test_a_start_for_training() -> None:
    """The static choice at gain 1, from which predictors hear of the loss at once."""
    model, x = gated(), images(8)
    static = copy.deepcopy(model)
    static.calibrate([x], dynamic=False)
    model.calibrate([x], dynamic=False, strength=1)
    torch.testing.assert_close(model(x), static(x))
    model.train()(x).square().mean().backward()
    assert all(float(g.weight.grad.abs().sum()) > 0 for g in model.gates.values())
    for wrong in (-1, float("nan"), "much"):
        with pytest.raises(ConfigError, match="`strength` of calibrate"):
            model.calibrate([x], strength=wrong)


def test_reset_gates_undoes_it() -> None:
    model = gated()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.calibrate([images(8)])
    model.reset_gates()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_oracle_chooses_the_largest_contributions() -> None:
    model, x = gated(), images(5)
    oracle, record = OracleChoice(model, rounds=1), dense_record(model, x)
    oracle(x)
    for name, gate in model.gates.items():
        wanted = record.target(name).topk(gate.active_count).indices.sort(1).values
        assert torch.equal(gate.last_active, wanted), name
    model(x)
    assert not torch.equal(model.gates[name].last_active, wanted), "the gates are still overridden"


def test_failures_leave_the_gates_as_they_were() -> None:
    model, x = gated(), images(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def breaks() -> Iterator[Tensor]:
        yield x
        raise OSError("the disk is gone")

    class Loader:
        rounds = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.rounds += 1
            return iter([x]) if self.rounds == 1 else breaks()

    with pytest.raises(OSError, match="the disk is gone"):
        model.calibrate(Loader())
    with pytest.raises(DataError, match="not finite"):
        model.calibrate([x * float("nan")])
    forward = model.forward_head
    model.forward_head = lambda *args, **options: str(forward(*args, **options))
    with pytest.raises(ConfigError, match="temper=False"):
        model.calibrate([x])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_errors_name_cause_and_fix() -> None:
    model, x = gated(), images(4)
    with pytest.raises(DataError, match="are empty"):
        model.calibrate([])
    with pytest.raises(DataError, match="iterator"):
        model.calibrate(iter([x]))
    model.calibrate(iter([x]), rounds=1, norms=False, temper=False)
    with pytest.raises(DataError, match="temper=False"):
        model.calibrate(iter([x]), rounds=1, norms=False)
    with pytest.raises(DataError, match="inputs="):
        model.calibrate([{"image": x}])
    model.calibrate([{"image": x}], rounds=1, inputs=lambda batch: batch["image"])
    for options in ({"rounds": 0}, {"folds": 1}, {"folds": True}):
        with pytest.raises(ConfigError, match="must be an integer of at least"):
            model.calibrate([x], **options)
    with pytest.raises(ModelError, match="not gated"):
        gatedprune.calibrate(torch.nn.Linear(2, 2), [x])
