"""`prune_dead`: channels that never win are removed for good, and the model stays gated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..config import check_ratio
from ..engine.layout import Layouts
from ..errors import ConfigError, ModelError
from ..functional import active_mask
from ..gates import Gate
from ..sites import analyse, capture, evaluating, two_samples
from ..wrapping import GatedModel, macs_left, unwrap, wrap
from .counts import Usage, usage
from .cutting import cut_sites
from .table import aligned

__all__ = ["DeadPruning", "prune_dead"]

# Both models in float64 differ by rounding only; a wrong channel is off by the size of the output itself.
_TOLERANCE = 1e-9
_RAISE = 1e3  # saliencies are raised by this in the check, so that the rectifier makes no ties with removed channels
_LEAST = 2  # channels that a site keeps: with one there is nothing to choose, and no site


@dataclass(frozen=True, eq=False)
class DeadPruning:
    """What `prune_dead` returns; prints as a table.

    Attributes:
        model: The smaller gated model.
        kept: Site name → (C',) the channels that stayed, int64, ascending; sites that stayed whole included.
        channels: Site name → C, how many there were.
        left: Site name → why its dead channels stayed.
        parameters: Numbers in the parameters before and after, gates included.
        macs: MACs per sample of the dense model before and after.
        macs_left: The same of what a compact model executes at its k, predictors included.
    """

    model: Any
    kept: Mapping[str, Tensor]
    channels: Mapping[str, int]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    macs_left: tuple[int, int]
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """How many channels went."""
        return sum(self.channels.values()) - sum(len(kept) for kept in self.kept.values())

    def __str__(self) -> str:
        rows = [["site", "channels", "removed", "left", "active"]]
        for name, kept in self.kept.items():
            total, gate = self.channels[name], self.model.gates[name]
            rows.append([name, *map(str, (total, total - len(kept), len(kept), gate.active_count))])
        lines = [f"{self.removed} of {sum(self.channels.values())} channels removed", *aligned(rows)]
        lines += [f"{name}: its dead channels stay, {reason}" for name, reason in self.left.items()]
        for what, (before, after) in (("parameters", self.parameters), ("dense MACs", self.macs),
                                      ("MACs left by the gates", self.macs_left)):  # fmt: skip
            lines.append(f"{what}: {before:,} → {after:,} ({after / before:.1%})")
        return "\n".join(lines)


def prune_dead(gated: Any, batches: Iterable[Any] | None = None, *, found: Usage | None = None, below: float = 0.0,
               inputs: Callable[[Any], Any] | None = None) -> DeadPruning:  # fmt: skip
    """Remove the channels that never win over a data set, for good; on a copy, which stays gated. Labels are ignored.

    For every input for which no removed channel wins, the smaller model gives what the gated one gives, up to rounding:
    a suppressed channel does not exist. The gates lose the rows of the removed channels, and the columns of those that
    they no longer see; k stays, or becomes C' where fewer than k are left. At least two channels stay at each site.
    Before anything is returned, each cut is checked: the narrower model must equal, in float64, the old one with those
    channels suppressed. A site that does not pass stays whole, and `DeadPruning.left` says why.

    Args:
        gated: A gated model. Left as it is.
        batches: As for `usage`: the more inputs, the surer that a channel is dead.
        found: Instead: what `usage` returned for this model.
        below: Also remove the channels that win for at most this share of the inputs, in [0, 1); for those inputs the
            result changes, as others win in their place.
        inputs: As for `usage`.

    Raises:
        ConfigError: Not exactly one of ``batches`` and ``found``, ``found`` of other sites, or ``below`` out of its
            domain. ModelError: The model is not gated, or no longer has its sites once it is narrower.
        DataError: As `usage`.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(f"prune_dead() takes a model that wrap() returned. {type(gated).__name__} is not gated.")
    if (batches is None) == (found is None):
        raise ConfigError("prune_dead() needs either `batches` to look for dead channels, or the `found` of usage().")
    share = check_ratio(below, "prune_dead(), `below`,")
    if found is None:
        assert batches is not None
        found = usage(gated, batches, inputs=inputs or _first)
    channels = {name: gate.channels for name, gate in gated.gates.items()}
    if {name: site.channels for name, site in found.sites.items()} != channels:
        raise ConfigError("`found` of prune_dead() counts other sites than this model has: run usage() on it.")
    kept = {name: _stays(found[name].counts, found[name].dead(share)) for name in channels}
    plan = {name: stays for name, stays in kept.items() if len(stays) < channels[name]}
    left = {s.name: "it is on the residual stream" for s in gated.gated_sites if s.name in plan and s.kind != "inner"}
    plan = {name: stays for name, stays in plan.items() if name not in left}
    plan = _passing(gated, plan, left)
    model = _rebuilt(gated, plan, left)
    _confirm(gated, model, plan)
    everything = {name: plan.get(name, torch.arange(count)) for name, count in channels.items()}
    return DeadPruning(
        model=model, kept=everything, channels=channels, left=left,
        parameters=(_count(gated), _count(model)), macs=(gated.site_report.macs, model.site_report.macs),
        macs_left=(macs_left(gated), macs_left(model)),
    )  # fmt: skip


def _first(batch: Any) -> Any:
    """The images of (images, labels)."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _stays(counts: Any, dead: Any) -> Tensor:
    alive = torch.ones(len(counts), dtype=torch.bool)
    alive[torch.from_numpy(dead)] = False
    best = torch.sort(torch.from_numpy(counts), descending=True, stable=True).indices
    alive[best[:_LEAST]] = True
    return alive.nonzero()[:, 0]


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _passing(gated: GatedModel, plan: dict[str, Tensor], left: dict[str, str]) -> dict[str, Tensor]:
    """The sites that can be cut: all together, or where that fails those that can be cut alone."""
    if not plan or not _fault(gated, plan):
        return plan
    good = {}
    for name, stays in plan.items():
        fault = _fault(gated, {name: stays})
        if fault:
            left[name] = fault
        else:
            good[name] = stays
    if good and (fault := _fault(gated, good)):
        raise ModelError(
            f"Sites of {type(gated).__name__} that can be cut alone cannot be cut together ({', '.join(good)}): {fault}"
        )
    return good


def _fault(gated: GatedModel, plan: Mapping[str, Tensor]) -> str:
    """Why the model cut to ``plan`` is not the gated model with just those channels suppressed; "" where it is."""
    reference = copy.deepcopy(gated).double()
    reference.gate_modules.clear_matches()  # of the gated model, not of its layers
    for name, gate in reference.gates.items():
        _always(gate, plan.get(name, torch.arange(gate.channels)))
    narrow = unwrap(copy.deepcopy(gated)).double()
    args = _probe(gated)
    wanted = _outputs(reference, args)
    try:
        cut_sites(narrow, gated.gated_sites, plan)
        found = _outputs(narrow, args)
    except Exception as error:  # noqa: BLE001 (a forward pass of anybody's)
        first = (str(error).strip().splitlines() or [""])[0]
        return f"since the narrower model does not run ({type(error).__name__}: {first})"
    scale = max((float(v.abs().max()) for v in wanted if v.numel()), default=0.0) or 1.0
    if [v.shape for v in found] != [v.shape for v in wanted]:
        return "since the narrower model returns other shapes"
    off = max((float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True) if a.numel()), default=0.0)
    return (
        "" if off / scale <= _TOLERANCE else f"since the narrower model computes something else (by {off / scale:.0e})"
    )


def _confirm(gated: GatedModel, model: GatedModel, plan: Mapping[str, Tensor]) -> None:
    """Raise unless the smaller model chooses and computes as the old one does when removed channels cannot win."""
    old, new, args = copy.deepcopy(gated).double(), copy.deepcopy(model).double(), _probe(gated)
    gone = {}
    for name, gate in old.gates.items():
        gone[name] = torch.ones(gate.channels, dtype=torch.bool, device=gate.weight.device)
        gone[name][plan.get(name, torch.arange(gate.channels)).to(gate.weight.device)] = False
        gate.active_count = new.gates[name].active_count
        with torch.no_grad():
            gate.weight[gone[name]] = 0
            for one in (gate, new.gates[name]):  # gains stay: what they are measured from is raised as well
                for value in (one.bias, one.start, one.threshold):
                    if value is not None:
                        value += _RAISE
            gate.bias[gone[name]] = 0
    wanted, found = _outputs(old, args), _outputs(new, args)
    chosen = {name: active_mask(gate.last_active, gate.channels) for name, gate in old.gates.items()}  # type: ignore[arg-type]
    alike = ~torch.stack([(mask & gone[name]).any(1) for name, mask in chosen.items()]).any(0)
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a.dim() and len(a) == len(alike)]
    off = max((float((a[alike] - b[alike]).abs().max()) / (float(b.abs().max()) or 1.0)
               for a, b in pairs if a[alike].numel()), default=0.0)  # fmt: skip
    if not off <= _TOLERANCE:
        raise ModelError(
            f"Without its dead channels this {type(gated).__name__} computes something else (by {off:.0e}), although "
            "each site passed its check: it holds more than gates and layers. Please report this with the model's name."
        )


def _always(gate: Gate, stays: Tensor) -> None:
    """Make the gate choose these channels for every input, unscaled."""
    gate.active_count, gate.boost = len(stays), False
    gate.forget_threshold()
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.zero_()
        gate.bias[stays.to(gate.bias.device)] = 1


def _probe(gated: GatedModel) -> tuple[Any, ...]:
    """Arguments as the model was wrapped for, two random samples in float64."""
    device = next(gated.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn((2, *a.shape[1:]), generator=generator, dtype=torch.float64).to(device)
        if isinstance(a, Tensor) and a.is_floating_point()
        else torch.zeros((2, *a.shape[1:]), dtype=a.dtype, device=device) if isinstance(a, Tensor) and a.dim() else a
        for a in gated._gatedprune_inputs
    )  # fmt: skip


def _outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [v for v in tree_flatten(model(*args))[0] if isinstance(v, Tensor) and v.is_floating_point()]


def _rebuilt(gated: GatedModel, plan: dict[str, Tensor], left: dict[str, str]) -> Any:
    """The narrower model, gated again, with what the gates had learnt."""
    device, kind = next((p.device, p.dtype) for p in gated.parameters() if p.is_floating_point())
    example = tuple(
        torch.zeros(a.shape, dtype=kind if a.is_floating_point() else a.dtype, device=device)
        if isinstance(a, Tensor) else a for a in gated._gatedprune_inputs
    )  # fmt: skip
    while True:
        model = unwrap(copy.deepcopy(gated))
        cut_sites(model, gated.gated_sites, plan)
        new = wrap(model, config=gated.gate_config, example_inputs=example)
        lost = [name for name in gated.gates if name not in new.gates]
        if not lost:
            break
        reasons = new.site_report.skipped
        if not any(name in plan for name in lost):
            raise ModelError(
                f"Narrower, the model no longer has the site {lost[0]}: {reasons.get(lost[0], 'unknown')}."
            )
        for name in lost:
            if plan.pop(name, None) is not None:
                left[name] = f"since the site would be none: {reasons.get(name, 'unknown')}"
    columns = _columns(gated, plan, example)
    with torch.no_grad():
        for name, gate in gated.gates.items():
            rows = plan.get(name, torch.arange(gate.channels))
            _copy_gate(gate, new.gates[name], rows.to(device), columns[name].to(device), name)
    _copy_matches(gated, new, plan)
    new.__dict__["_gatedprune_pruned"] = _composed(gated, plan)
    for source, target in zip(gated.modules(), new.modules(), strict=True):
        target.training = source.training
    return new


def _columns(gated: GatedModel, plan: Mapping[str, Tensor], example: tuple[Any, ...]) -> dict[str, Tensor]:
    """Site → which of the channels that its gate sees are still there."""
    analysis = analyse("", capture(gated, two_samples(example)), stream=gated.gate_config.stream)
    names = list(gated.gates)
    layouts = Layouts(analysis, names)
    found = {}
    for name, gate in gated.gates.items():
        there = torch.ones(gate.in_channels, dtype=torch.bool)
        layout = layouts.of(analysis.sites[name].gate_input)
        if layout is not None and layout.channels == gate.in_channels:
            for number in layouts.sites_in(layout):
                if names[number] in plan:
                    alive = torch.zeros(gated.gates[names[number]].channels, dtype=torch.bool)
                    alive[plan[names[number]]] = True
                    own = torch.from_numpy(layout.site == number)
                    there[own] = alive[torch.from_numpy(layout.unit)[own]]
        found[name] = there.nonzero()[:, 0]
    return found


def _copy_gate(old: Gate, new: Gate, rows: Tensor, columns: Tensor, name: str) -> None:
    if (new.channels, new.in_channels) != (len(rows), len(columns)):
        raise ModelError(
            f"The site {name} has {new.channels} channels and its gate sees {new.in_channels} in the narrower model; "
            f"{len(rows)} and {len(columns)} were expected. Please report this with the model's name."
        )
    new.active_count = old.active_count  # before T, which it would forget
    mine = new.state_dict(keep_vars=True)
    for key, value in old.state_dict().items():
        if key in ("weight", "reduce"):
            continue
        mine[key].copy_(value.index_select(0, rows) if value.dim() else value)
    if new.rank == old.rank and old.reduce is not None:
        mine["weight"].copy_(old.weight.index_select(0, rows))
        mine["reduce"].copy_(old.reduce.index_select(1, columns))
    else:  # one matrix: so it was, or so few channels are left that it takes less than two
        new.set_predictor(old.predictor.index_select(0, rows).index_select(1, columns))
    new.active_count = min(old.active_count, len(rows))


def _copy_matches(gated: GatedModel, new: GatedModel, plan: Mapping[str, Tensor]) -> None:
    """What calibration matched batch norms by, without the channels that are gone."""
    for path in gated.gate_modules.matched:
        match = gated.gate_modules.match(path)
        assert match is not None
        stays = torch.ones(len(match[0]), dtype=torch.bool)
        for site in gated.gated_sites:
            for edge in site.carriers if site.name in plan else ():
                if edge.path == path:
                    alive = torch.zeros(site.channels + 1, dtype=torch.bool)
                    alive[plan[site.name]] = True
                    alive[-1] = True  # index −1: channels that are not of this site
                    stays &= alive[edge.units.cpu()]
        scale, shift = (value[stays.to(value.device)].clone() for value in match)
        new.gate_modules.set_match(path, scale, shift)


def _composed(gated: GatedModel, plan: Mapping[str, Tensor]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Site → channels of the model that was never pruned, and which of them are left."""
    out = dict(gated._gatedprune_pruned)
    for name, stays in plan.items():
        total, before = out.get(name) or (gated.gates[name].channels, tuple(range(gated.gates[name].channels)))
        out[name] = total, tuple(before[i] for i in stays.tolist())
    return out
