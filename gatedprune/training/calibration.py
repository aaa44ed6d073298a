"""Calibration: every gate's predictor in closed form, from unlabelled batches, in a few passes over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ModelError
from ..gates import Gate
from ..sites import evaluating, suspended
from ..wrapping import GatedModel
from .contribution import Contributions
from .moments import Moments
from .ridge import Ridge, fit, squared_errors

__all__ = ["Calibration", "SiteFit", "calibrate", "held_out_r2"]

# Saliencies are shifted up until this many standard deviations below its mean a channel's is still positive: what the
# rectifier cuts off would no longer be ranked.
MARGIN = 8.0

Inputs = Callable[[Any], Any]


@dataclass(frozen=True)
class SiteFit:
    """How one gate was calibrated.

    Attributes:
        channels: C. in_channels: C_in.
        shrinkage: The ridge regression's λ, in variances of a standardised feature; infinite: a static ranking.
        r2: Share of the contributions' variance over inputs that the predictor explains on folds left out.
        scale, offset: A saliency is scale · (predicted contribution) + offset; both are the same for all channels.
    """

    channels: int
    in_channels: int
    shrinkage: float
    r2: float | None
    scale: float
    offset: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` returns; prints as a table.

    Attributes:
        samples: How many samples were seen.
        sites: Site name → how its gate was fitted.
    """

    samples: int
    sites: Mapping[str, SiteFit]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; an infinite shrinkage, a static ranking, is None."""
        sites = {name: dataclasses.asdict(site) for name, site in self.sites.items()}
        for site in sites.values():
            site["shrinkage"] = site["shrinkage"] if math.isfinite(site["shrinkage"]) else None
        return {"samples": self.samples, "sites": sites}

    def __str__(self) -> str:
        width = max([len(name) for name in self.sites] + [4])
        lines = [f"calibrated {len(self.sites)} gates on {self.samples} samples",
                 f"{'site':<{width}}  channels  gate sees  shrinkage      R²"]  # fmt: skip
        for name, site in self.sites.items():
            r2 = "–" if site.r2 is None else f"{site.r2:.2f}"
            lines.append(f"{name:<{width}}  {site.channels:>8}  {site.in_channels:>9}  {site.shrinkage:>9.2g}  {r2:>6}")
        return "\n".join(lines)


def calibrate(gated: Any, batches: Iterable[Any], *, rounds: int = 4, folds: int = 5,
              inputs: Inputs | None = None) -> Calibration:  # fmt: skip
    """Fit every gate's predictor, in closed form: from what the gate sees to what each channel contributes.

    A ridge regression from s(x) to each channel's contribution in the dense model (`Contributions`), with the shrinkage
    that predicts best on the folds left out, the constant term alone among the candidates: that is a static ranking by
    mean activation times the norm of the reading weights. Eval mode, no labels, no gradients; memory does not grow with
    the data. The gain of every winner stays exactly 1 (`Gate.strength` becomes 0).

    What a gate sees changes when the gates before it suppress channels, and a predictor fitted to the dense model's
    values alone misses more with every layer. So the first round looks at the dense model, and each further one at the
    gated model, at its present ratios, with the predictors found so far; the moments of all rounds are added up.

    Args:
        gated: A model from `gatedprune.wrap`.
        batches: A few hundred samples: an iterable, such as a data loader, of tensors (B, …), or of tuples or lists
            that begin with one (labels are ignored).
        rounds: Passes over the data; 1 looks at the dense model alone.
        folds: K ≥ 2 of the cross-validation. Sample i belongs to fold i mod K: keep the order from pass to pass.
        inputs: From an element of ``batches`` to the model's argument, or to a tuple of them.

    Returns:
        The shrinkage and the cross-validated R² of each site.

    Raises:
        ConfigError: ``rounds`` or ``folds`` out of its domain. ModelError: the model is not gated.
        DataError: no batches, batches that can be gone through only once, or activations that are not finite. The gates
            are then as they were.

    Source: gatedprune's own; the statistic is that of static ranking by activations times weights.
    """
    for name, value, least in (("rounds", rounds, 1), ("folds", folds, 2)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ConfigError(f"`{name}` of calibrate() must be an integer of at least {least}. Got {value!r}.")
    _check_gated(gated, "calibrate()")
    if rounds > 1 and isinstance(batches, Iterator):
        raise DataError(
            "The `batches` of calibrate() are an iterator, which is used up after one of the rounds: give it a list "
            "or a data loader, or rounds=1."
        )
    before = {name: {k: v.clone() for k, v in gate.state_dict().items()} for name, gate in gated.gates.items()}
    moments: dict[str, Moments] = {}
    samples = 0
    try:
        for i in range(rounds):
            if i and all(gate.active_count == gate.channels for gate in gated.gates.values()):
                break  # nothing is suppressed: the gated model is the dense one
            samples = _accumulate(gated, batches, moments, int(folds), inputs, "calibrate()", dense=i == 0)
            plans = {name: _plan(gated.gates[name], m) for name, m in moments.items()}
            with torch.no_grad():
                for name, (ridge, info) in plans.items():
                    _install(gated.gates[name], ridge, info, moments[name])
    except BaseException:
        for name, gate in gated.gates.items():
            gate.load_state_dict(before[name])
        raise
    return Calibration(samples, {name: info for name, (_, info) in plans.items()})


def held_out_r2(gated: Any, calibration: Calibration, batches: Iterable[Any],
                inputs: Inputs | None = None) -> dict[str, float]:  # fmt: skip
    """R² of calibrated predictors on other data: 1 − their squared errors / those of the calibration's constant term.

    What the gates see is taken from the gated model at its present ratios, the contributions from the dense one.

    Args:
        gated: The calibrated model, its gates as `calibrate` left them. calibration: what it returned.
        batches, inputs: As for `calibrate`.

    Returns:
        Site name → R², over all channels of the site; negative where a static ranking's values are nearer.
    """
    _check_gated(gated, "held_out_r2()")
    found: dict[str, float] = {}
    moments: dict[str, Moments] = {}
    _accumulate(gated, batches, moments, 1, inputs, "held_out_r2()", dense=False)
    for name, m in moments.items():
        gate, info = gated.gates[name], calibration.sites[name]
        scaled = m.scaled(info.scale)
        weight, bias = gate.weight.detach().to(m.x), gate.bias.detach().to(m.x) - info.offset
        constant = gate.start.to(m.x) - info.offset
        errors = [float(squared_errors(scaled, w, b).sum()) for w, b in
                  ((weight, bias), (torch.zeros_like(weight), constant))]  # fmt: skip
        found[name] = 1 - errors[0] / errors[1] if errors[1] > 0 else 0.0
    return found


def _check_gated(gated: Any, where: str) -> None:
    if not isinstance(gated, GatedModel):
        raise ModelError(f"{where} takes a model that wrap() returned. {type(gated).__name__} is not gated.")


def _accumulate(gated: Any, batches: Iterable[Any], moments: dict[str, Moments], folds: int, inputs: Inputs | None,
                where: str, *, dense: bool) -> int:  # fmt: skip
    """Add one pass over the data to every site's moments; returns the number of samples.

    Targets are the dense model's contributions; features what the gates see, in the dense model or in the gated one.
    """
    samples = 0
    for moment in moments.values():
        moment.seen = 0  # the same samples in the same folds
    with torch.no_grad(), evaluating(gated), Contributions(gated) as record:
        for args in _arguments(gated, batches, inputs, where):
            record.clear()
            with suspended(gated):
                gated(*args)
            targets = {site.name: record.target(site.name) for site in gated.gated_sites}
            if not dense:
                record.clear()
                gated(*args)
            for site in gated.gated_sites:
                s = record.seen[site.name]
                if site.name not in moments:
                    moments[site.name] = Moments(site.in_channels, site.channels, folds, s.device)
                moments[site.name].add(s, targets[site.name])
            samples += len(s)
    for gate in gated.gates.values():
        gate.clear()
    if not samples:
        raise DataError(f"The `batches` of {where} are empty: give it a few hundred samples.")
    return samples


def _arguments(gated: Any, batches: Iterable[Any], inputs: Inputs | None, where: str) -> Iterator[tuple[Any, ...]]:
    """The model's arguments for each batch, on the model's device."""
    device = next(gated.parameters()).device
    for batch in batches:
        value = batch if inputs is None else inputs(batch)
        if inputs is None and isinstance(value, (tuple, list)) and value:
            value = value[0]  # (images, labels)
        args = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not any(isinstance(a, Tensor) for a in args):
            raise DataError(
                f"The `batches` of {where} must hold tensors, or tuples that begin with one. Got "
                f"{type(batch).__name__}: say with `inputs=` how to get the model's arguments from it."
            )
        yield tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def _plan(gate: Gate, moments: Moments) -> tuple[Ridge, SiteFit]:
    total = moments.total()
    mean = float((total.y / total.count).mean())
    # Saliencies of mean 1, as before calibration; a site that gives nothing at all keeps its zeros.
    scale = 1 / mean if mean > 0 else 1.0
    ridge = fit(moments)
    mx = total.x[0] / total.count
    cov = total.xx[0] / total.count - mx[:, None] * mx
    spread = ((ridge.weight @ cov) * ridge.weight).sum(1).clamp_min(0).sqrt()
    lowest = (total.y[0] / total.count - MARGIN * spread).min()
    offset = max(0.0, -scale * float(lowest))
    return ridge, SiteFit(gate.channels, gate.in_channels, ridge.shrinkage, ridge.r2, scale, offset)


def _install(gate: Gate, ridge: Ridge, info: SiteFit, moments: Moments) -> None:
    total = moments.total()
    gate.weight.copy_(info.scale * ridge.weight)
    gate.bias.copy_(info.scale * ridge.bias + info.offset)
    gate.start.copy_(info.scale * total.y[0] / total.count + info.offset)
    gate.strength.zero_()
    gate.clear()
