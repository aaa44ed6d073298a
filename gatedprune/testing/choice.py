"""Checks of the choice of channels, and of what a model computes from the same input twice."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..functional import active_mask, active_set
from ..gates import Gate
from ..wrapping import GatedModel
from .case import Case, outputs

__all__ = [
    "check_deterministic",
    "check_exactly_k",
    "check_gates_see_channels",
    "check_identity",
    "check_macs_fall",
    "check_samples_independent",
]

# Logic in float64: a few thousand terms a sum and some hundred layers at 1e-16 each. A wrong channel is off
# by far more.
EXACT = 1e-10


def scale_of(values: list[Tensor]) -> float:
    """The largest absolute value, to which differences are compared."""
    return max((float(v.abs().max()) for v in values if v.numel()), default=0.0) or 1.0


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest wanted value; infinite for other shapes or NaN."""
    if [v.shape for v in found] != [v.shape for v in wanted]:
        return math.inf
    worst = max((float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if a.numel()), default=0.0)
    return worst / scale_of(wanted) if worst == worst else math.inf


def check_identity(case: Case) -> None:
    """Ratio 0 changes nothing: outputs are the dense model's bit for bit, in eval and training mode."""
    dense, gated = case.dense(), case.untouched()
    for number, (a, b) in enumerate(zip(outputs(dense, case.inputs()), outputs(gated, case.inputs()), strict=True)):
        assert torch.equal(a, b), (
            f"{case.name}: at ratio 0, output {number} differs by "
            f"{float((a - b).abs().max()):.1e}{_first_changed(case)}"
        )
    for gate_name, gate in gated.gates.items():
        assert gate.last_gain is not None and bool((gate.last_gain == 1).all()), (
            f"{case.name}, site {gate_name}: a gain is not 1 at the start"
        )
    results = []
    for model in (dense, gated):
        torch.manual_seed(0)  # dropout and stochastic depth draw alike
        with torch.no_grad():
            model.train()
            results.append(
                _tensors(model(*case.inputs()))
                + [b for n, b in model.named_buffers() if not n.startswith("gatedprune.")]
            )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b), f"{case.name}: at ratio 0 an output or buffer differs in training mode"


def _tensors(value: object) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_flatten(value)[0] if isinstance(v, Tensor)]


def _first_changed(case: Case) -> str:
    """Which gated site comes first whose gain point is no longer the dense model's."""
    seen: list[dict[str, Tensor]] = []
    gated = case.untouched()
    sites = {at.path: site.name for site in gated.gated_sites for at in site.gain_at if at.side == "output"}
    for model in (case.dense(), gated):
        values: dict[str, Tensor] = {}
        for path in sites:
            model.get_submodule(path).register_forward_hook(
                lambda m, x, y, path=path, values=values: values.__setitem__(path, y)
            )
        outputs(model, case.inputs())
        seen.append(values)
    wrong = [sites[path] for path in sites if path in seen[0] and not torch.equal(seen[0][path], seen[1][path])]
    return f"; first changed at site {wrong[0]}" if wrong else ""


def check_gates_see_channels(case: Case) -> None:
    """Each gate looks at the channels that its site's first layer reads, not at another dimension."""
    gated = case.untouched()
    for site in gated.gated_sites:
        module = gated.get_submodule(site.gate_at.path)
        weight, groups = getattr(module, "weight", None), getattr(module, "groups", 1)
        if site.gate_at.path == site.producers[0].path and isinstance(weight, Tensor) and weight.dim() > 1:
            reads = weight.shape[1] * groups
            assert site.in_channels == reads, (
                f"{case.name}, site {site.name}: the gate looks at {site.in_channels} values in dimension "
                f"{site.gate_at.channel_dim} of the input, the layer reads {reads} channels"
            )


def check_exactly_k(case: Case) -> str:
    """Every sample keeps exactly k channels of each site: ascending, in range, those of largest saliency.

    With ``gate="threshold"``: those above T and the best one, k on average over the samples.
    """
    gated = case.gated()
    outputs(gated, case.inputs())
    samples = next(a for a in case.inputs() if isinstance(a, Tensor)).shape[0]
    differing = 0
    for name, gate in gated.gates.items():
        where = f"{case.name}, site {name}"
        k = _expected(case, gated, name)
        active, g = gate.last_active, gate.last_saliency
        assert active is not None and g is not None, f"{where}: the gate did not run"
        if gate.varies:
            _check_threshold(gate, active, g, k, where)
            differing += bool((active != active[:1]).any())
            continue
        _check_active(active, samples, k, gate.channels, where)
        losers = torch.ones_like(g, dtype=torch.bool).scatter(1, active, False)
        least = g.gather(1, active).amin(1)
        best = g.masked_fill(~losers, -math.inf).amax(1)
        assert bool((least >= best).all()), f"{where}: a suppressed channel has a larger saliency than a winner"
        assert torch.equal(active, active_set(g, k)), f"{where}: a tie did not go to the lower index"
        differing += bool((active != active[:1]).any())
    assert differing or _nothing_to_choose(gated), (
        f"{case.name}: no site chooses differently for different samples, so the checks would say nothing"
    )
    case.compacted(*case.inputs())
    chosen = case.compacted.last_active
    assert set(chosen) == set(gated.gates), (
        f"{case.name}: the compact model misses the sites {sorted(set(gated.gates) - set(chosen))[:5]}"
    )
    for name, active in chosen.items():
        if gated.gates[name].varies:
            _check_filled(active, samples, gated.gates[name].channels, f"{case.name}, site {name} of the compact model")
            continue
        _check_active(
            active,
            samples,
            _expected(case, gated, name),
            gated.gates[name].channels,
            f"{case.name}, site {name} of the compact model",
        )
    return f"{differing} of {len(chosen)} sites differ between samples"


def _check_threshold(gate: Gate, active: Tensor, g: Tensor, k: int, where: str) -> None:
    """The winners are those above T, and the best one where none is; k of them on average."""
    _check_filled(active, len(g), gate.channels, where)
    wins = active_mask(active, gate.channels)
    assert gate.threshold is not None
    if bool(gate.threshold.isinf()):
        assert torch.equal(wins, active_mask(active_set(g, k), gate.channels)), f"{where}: without T, not the k largest"
        return
    wanted = g > gate.threshold
    wanted[torch.arange(len(g)), g.argmax(1)] = True
    assert torch.equal(wins, wanted), f"{where}: the winners are not those above the threshold"
    mean = float(wins.sum(1).double().mean())
    assert mean == k, f"{where}: {mean:g} channels win on average, not {k}"


def _check_filled(active: Tensor, samples: int, channels: int, where: str) -> None:
    assert active.dtype == torch.int64 and tuple(active.shape) == (samples, channels), (
        f"{where}: the active set is {active.dtype} of shape {tuple(active.shape)}, not int64 {(samples, channels)}"
    )
    there = active < channels
    assert int(active.min()) >= 0 and int(active.max()) <= channels, f"{where}: an active channel is out of range"
    rises = (active.diff(dim=1) > 0) | ~there[:, 1:]
    assert bool(there.any(1).all()), f"{where}: a sample has no winner"
    assert bool(rises.all()) and bool((active[~there] == channels).all()), f"{where}: an active set does not ascend"


def _nothing_to_choose(gated: GatedModel) -> bool:
    return all(g.active_count == g.channels for g in gated.gates.values())


def _expected(case: Case, gated: GatedModel, site: str) -> int:
    """k as DESIGN defines it: ceil((1 − ratio)·C), rounded up to round_to, written anew."""
    ratio = (
        gated.gate_config.__class__(ratio=case.ratio).ratio_for(site) if isinstance(case.ratio, Mapping) else case.ratio
    )
    channels = gated.gates[site].channels
    k = max(1, int(case.options.get("min_channels", 1)), math.ceil(round((1 - float(ratio or 0)) * channels, 9)))
    step = int(case.options.get("round_to", 1))
    return min(channels, math.ceil(k / step) * step)


def _check_active(active: Tensor, samples: int, k: int, channels: int, where: str) -> None:
    assert active.dtype == torch.int64, f"{where}: the active set is {active.dtype}, not int64"
    assert tuple(active.shape) == (samples, k), (
        f"{where}: the active set has shape {tuple(active.shape)}, not {(samples, k)}"
    )
    assert bool((active.diff(dim=1) > 0).all()), f"{where}: an active set is not strictly ascending"
    assert int(active.min()) >= 0 and int(active.max()) < channels, (
        f"{where}: an active channel is outside [0, {channels})"
    )


def check_samples_independent(case: Case) -> str:
    """No sample's result depends on its batch-mates: alone, in a batch, and beside NaN.

    Where the dense model itself lets NaN through (a product over the batch does, with a weight of zero), beside
    large values instead.
    """
    args = case.inputs(torch.float64)
    dense = case.dense().double()
    spoilt, spoiler = _spoilt(args, math.nan), "NaN"
    if difference([v[:1] for v in outputs(dense, spoilt)], [v[:1] for v in outputs(dense, args)]) > EXACT:
        spoilt, spoiler = _spoilt(args, 1e3), "large values"
    del dense  # one of them at a time: large models are large in float64
    for what in ("masked", "compact"):
        model: nn.Module = case.gated(torch.float64) if what == "masked" else case.compacted64
        whole = outputs(model, args)
        chosen = _chosen(model)
        samples = next(a for a in args if isinstance(a, Tensor)).shape[0]
        for b in range(samples):
            alone = outputs(model, _pick(args, samples, [b]))
            where = f"{case.name}: sample {b} of the {what} model"
            for name, active in _chosen(model).items():
                assert torch.equal(active[0], chosen[name][b]), f"{where} chooses other channels alone, at site {name}"
            off = difference(alone, [v[b : b + 1] for v in whole])
            assert off <= EXACT, f"{where} is off by {off:.1e} alone (site gains or indices leak between samples)"
        off = difference([v[:1] for v in outputs(model, spoilt)], [v[:1] for v in whole])
        assert off <= EXACT, f"{case.name}: {spoiler} in batch-mates changes sample 0 of the {what} model ({off:.1e})"
        del model
    return "" if spoiler == "NaN" else "the dense model itself lets NaN through to batch-mates: tried large values"


def _spoilt(args: tuple, value: float) -> tuple:
    """Copies of the arguments, all samples but the first filled with that value."""
    samples = next(a for a in args if isinstance(a, Tensor)).shape[0]
    spoilt = _pick(args, samples, list(range(samples)))
    for a in spoilt:
        if isinstance(a, Tensor) and a.dim() and a.shape[0] == samples and a.is_floating_point():
            a[1:] = value
    return spoilt


def _chosen(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, GatedModel):
        return {name: gate.last_active for name, gate in model.gates.items() if gate.last_active is not None}
    return dict(model.last_active)  # type: ignore[arg-type]


def _pick(args: tuple, samples: int, which: list[int]) -> tuple:
    return tuple(a[which] if isinstance(a, Tensor) and a.dim() and a.shape[0] == samples else a for a in args)


def check_deterministic(case: Case) -> None:
    """The same input gives the same bits and the same choice in eval mode, whatever ran in between."""
    args = case.inputs()
    for what, model in (("masked", case.gated()), ("compact", case.compacted)):
        first, chosen = outputs(model, args), _chosen(model)
        outputs(model, tuple(-a if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
        again = outputs(model, args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), (
            f"{case.name}: the {what} model is not deterministic"
        )
        for name, active in _chosen(model).items():
            assert torch.equal(active, chosen[name]), (
                f"{case.name}, site {name}: the {what} model chooses otherwise the second time"
            )


def check_macs_fall(case: Case) -> str:
    """The compact model executes fewer multiply-accumulates than the dense one, predictors included."""
    from ..measure import count_macs  # needs thop, which is optional

    dense, fast = (count_macs(m, case.inputs()).total for m in (case.dense(), case.compacted))
    if not _nothing_to_choose(case.gated()):
        sites = ", ".join(list(case.gated().gates)[:5])
        assert fast < dense, (
            f"{case.name}: the compact model takes {fast:,} MACs, the dense one {dense:,}; sites {sites}, …"
        )
    return f"{fast / dense:.1%} of the MACs left"
