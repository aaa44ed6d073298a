"""Calibration: every gate's predictor in closed form, from unlabelled batches, in a few passes over them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..gates import Gate
from ..wrapping import bake
from .moments import Moments
from .passes import Inputs, Passes, check_gated
from .ridge import SHRINKAGES, Ridge, fit, squared_errors
from .tempering import LeftOut, temper

__all__ = ["Calibration", "SiteFit", "bake_norms", "calibrate", "count_passes", "held_out_r2", "match_norms"]

# Saliencies are shifted up until this many standard deviations below its mean a channel's is still at this floor: what
# the rectifier cuts off would no longer be ranked.
MARGIN, FLOOR = 8.0, 0.01


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
        norms: Paths of the batch norms that were matched.
        share: What predictors were multiplied by; 0 where the static choice was best.
        losses: With `temper`, share → mean `divergence`, each sample with predictors that its fold had no part in.
    """

    samples: int
    sites: Mapping[str, SiteFit]
    norms: tuple[str, ...] = ()
    share: float = 1.0
    losses: Mapping[float, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; an infinite shrinkage, a static ranking, is None."""
        sites = {name: dataclasses.asdict(site) for name, site in self.sites.items()}
        for site in sites.values():
            site["shrinkage"] = site["shrinkage"] if math.isfinite(site["shrinkage"]) else None
        losses = [{"share": share, "loss": loss} for share, loss in self.losses.items()]
        return {"samples": self.samples, "share": self.share, "losses": losses, "sites": sites}

    def __str__(self) -> str:
        width = max([len(name) for name in self.sites] + [4])
        lines = [f"calibrated {len(self.sites)} gates on {self.samples} samples; {len(self.norms)} batch norms matched",
                 f"{'site':<{width}}  channels  gate sees  shrinkage      R²"]  # fmt: skip
        for name, site in self.sites.items():
            r2 = "–" if site.r2 is None else f"{site.r2:.2f}"
            lines.append(f"{name:<{width}}  {site.channels:>8}  {site.in_channels:>9}  {site.shrinkage:>9.2g}  {r2:>6}")
        if self.losses:
            found = ", ".join(f"{share:g}: {loss:.3g}" for share, loss in self.losses.items())
            lines.append(f"predictors at {self.share:g} of that; divergence from the dense model at {found}")
        return "\n".join(lines)


def calibrate(gated: Any, batches: Iterable[Any], *, rounds: int = 4, folds: int = 5, norms: bool = True,
              dynamic: bool = True, temper: bool = True, strength: float = 0.0,
              inputs: Inputs | None = None) -> Calibration:  # fmt: skip
    """Fit every gate's predictor, in closed form: from what the gate sees to what each channel contributes.

    A ridge regression from s(x) to each channel's contribution in the dense model (`Contributions`), with the shrinkage
    that predicts best on the folds left out, the constant term alone among the candidates: that is a static ranking by
    mean contribution. Eval mode, no labels, no training; memory does not grow with the data. The gain of every winner
    stays exactly 1 (`Gate.strength` becomes 0).

    To train the network afterwards, start with ``dynamic=False, strength=1``: the best static choice, at gain 1, from
    which training learns gains and the choice by image (FBS's own start, with a better ranking). A network trained with
    predictors that choose by image from the first step learns less well: see the page on fine-tuning.

    Two things change once channels are suppressed: what later gates see, and what a channel is worth beside those that
    are left. So the first round looks at the dense model alone, with all channels there; in each further one gates see
    the gated model, at its present ratios, with the predictors found so far, and contributions are what each channel
    adds to those that win. The moments of these further rounds are added up.

    A layer that reads fewer channels gives another mean and variance than the batch norm behind it was made for, and so
    does every layer after it. A scale and a shift for each channel of each norm's input, kept with the gates, match
    them to the dense model's on the same samples (`norms`), a gated site's channels on those for which they win; on the
    way, batch by batch: give batches of a few dozen. They hold for the present ratios: `set_ratio` takes them out.
    `compact`, `save` and `export` carry them; the norm's statistics and the backbone's state dict stay as they were.

    Gates with a threshold (``gate="threshold"``) choose the k largest meanwhile; at last their T is set by
    `fit_thresholds`, in a few passes more.

    Args:
        gated: A model from `gatedprune.wrap`.
        batches: A few hundred samples: an iterable, such as a data loader, of tensors (B, …), or of tuples or lists
            that begin with one (labels are ignored).
        rounds: Passes over the data; 1 looks at the dense model alone.
        folds: K ≥ 2 of the cross-validation. Sample i belongs to fold i mod K: keep the order from pass to pass.
        norms: Match the batch norms, in one more pass.
        dynamic: False: the constant term alone. The model is then a statically pruned one, chosen and matched with the
            same care: what to compare with, and what to train from.
        temper: Also choose how far all predictors together may move saliencies by image: φ is multiplied by 1, 0.7,
            0.5, 0.35 or 0.25, or the choice is that of ``dynamic=False``, whichever gives outputs nearest to the dense
            model's (`divergence`), each sample's with predictors fitted to the other folds. The regression of one site
            cannot know what choosing by image costs: layers behind were made for all channels, and other gates choose
            as well. Half of the time; False: whole predictors.
        strength: σ of every gate afterwards (see `Gate`), not negative. With ``dynamic=False`` the gain is 1 whatever
            σ is; otherwise a σ above 0 rescales winners at once.
        inputs: From an element of ``batches`` to the model's argument, or to a tuple of them.

    Returns:
        The shrinkage and the cross-validated R² of each site, and the batch norms that were matched.

    Raises:
        ConfigError: ``rounds``, ``folds`` or ``strength`` out of its domain, or with `temper` an output without
            tensors. ModelError: the model is not gated.
        DataError: no batches, batches that can be gone through only once, or activations that are not finite. The gates
            are then as they were.

    Source: gatedprune's own. Contributions are gradients of the squared error of what readers give, by the gates;
    rounds that average them are those of a Frank-Wolfe method (Jaggi, ICML 2013).
    """
    for name, value, least in (("rounds", rounds, 1), ("folds", folds, 2)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ConfigError(f"`{name}` of calibrate() must be an integer of at least {least}. Got {value!r}.")
    if not (isinstance(strength, Real) and math.isfinite(strength) and strength >= 0):
        raise ConfigError(f"`strength` of calibrate() must be a number of at least 0. Got {strength!r}.")
    check_gated(gated, "calibrate()")
    thresholds = any(gate.varies for gate in gated.gates.values())
    if (rounds > 1 or norms or (temper and dynamic) or thresholds) and isinstance(batches, Iterator):
        raise DataError(
            "The `batches` of calibrate() are an iterator, which is used up after one of the rounds: give it a list "
            "or a data loader, or rounds=1, norms=False, temper=False."
        )
    before = {k: v.clone() for k, v in gated.gate_modules.state_dict().items()}
    try:
        gated.gate_modules.clear_matches()
        found = _calibrate(Passes(gated, batches, inputs, "calibrate()", norms), int(rounds), int(folds), dynamic,
                           temper)  # fmt: skip
        if thresholds:
            gated.fit_thresholds(batches, inputs=inputs)
        with torch.no_grad():
            for gate in gated.gates.values():
                gate.strength.fill_(float(strength))
    except BaseException:
        gated.gate_modules.load_state_dict(before)
        raise
    return found


def count_passes(rounds: int = 4, *, norms: bool = True, temper: bool = True) -> int:
    """How often `calibrate` goes through the data; less often where no channel is suppressed."""
    return rounds + norms + (rounds if temper else 0)


def _calibrate(passes: Passes, rounds: int, folds: int, dynamic: bool, tempering: bool) -> Calibration:
    gated = passes.gated
    suppressed = any(gate.active_count < gate.channels for gate in gated.gates.values())
    rounds = rounds if suppressed else 1
    first = dict[str, Moments]()
    samples = passes.accumulate(first, folds, gate=False)
    chosen = _fit(passes, first, rounds, dynamic)
    share, losses = 1.0, dict[float, float]()
    if tempering and suppressed and any(ridge.weight.any() for ridge, _ in chosen.plans.values()):
        static = _fit(passes, first, rounds, False)
        share, losses = temper(passes, chosen.left_out(gated), static.left_out(gated))
        chosen = chosen if share else static
    chosen.install(gated, share)
    matched = _set_matches(gated, passes.match()) if suppressed and passes.matched else ()
    return Calibration(samples, {name: info for name, (_, info) in chosen.plans.items()}, matched, share, losses)


@dataclass(frozen=True)
class _Fit:
    """Predictors for all gates: site → the regression and how it was found, and → the moments that it is of."""

    plans: Mapping[str, tuple[Ridge, SiteFit]]
    moments: Mapping[str, Moments]

    @torch.no_grad()
    def install(self, gated: Any, share: float = 1.0) -> None:
        for name, (ridge, info) in self.plans.items():
            _install(gated.gates[name], ridge, info, self.moments[name], share)

    def left_out(self, gated: Any) -> dict[str, LeftOut]:
        return {name: LeftOut.of(gated.gates[name], ridge, self.moments[name].folds, info.scale, info.offset,
                                 _seen(gated.gates[name], self.moments[name].total()))
                for name, (ridge, info) in self.plans.items()}  # fmt: skip


def _fit(passes: Passes, first: Mapping[str, Moments], rounds: int, dynamic: bool) -> _Fit:
    """Predictors, in each round after the first fitted to the model with those of the round before; not installed.

    Args:
        first: Of contributions among all channels, in the dense model; later rounds begin anew, as theirs are others.
    """
    gates, later, folds = passes.gated.gates, dict[str, Moments](), next(iter(first.values())).folds
    found = _Fit({name: _plan(gates[name], m, dynamic) for name, m in first.items()}, first)
    for _ in range(1, rounds):
        found.install(passes.gated)
        passes.accumulate(later, folds, gate=True)
        found = _Fit({name: _plan(gates[name], m, dynamic) for name, m in later.items()}, later)
    return found


def match_norms(gated: Any, batches: Iterable[Any], inputs: Inputs | None = None) -> tuple[str, ...]:
    """Match the batch norms to the dense model's for the gates as they are; `calibrate` does so by itself.

    Args:
        gated: A gated model. batches, inputs: As for `calibrate`; gone through once.

    Returns:
        Paths of the norms that were matched: those whose input is another than in the dense model.
    """
    check_gated(gated, "match_norms()")
    passes = Passes(gated, batches, inputs, "match_norms()", True)
    before = {path: gated.gate_modules.match(path) for path in gated.gate_modules.matched}
    gated.gate_modules.clear_matches()
    try:
        return _set_matches(gated, passes.match())
    except BaseException:
        for path, found in before.items():
            gated.gate_modules.set_match(path, *found)
        raise


def bake_norms(gated: Any) -> tuple[str, ...]:
    """Put what batch norms were matched by into their own statistics: call it before you train a calibrated model.

    In training a norm takes the statistics of the batch, whatever its input was multiplied by and shifted, so that the
    matches of `calibrate` only cost time. The model computes what it did; the backbone's statistics are others now, and
    `set_ratio` and `unwrap` no longer bring the old ones back.

    Args:
        gated: A gated model, changed in place.

    Returns:
        Paths of the norms that were matched.
    """
    check_gated(gated, "bake_norms()")
    paths: tuple[str, ...] = gated.gate_modules.matched
    bake(gated, gated.gate_modules)
    return paths


def _set_matches(gated: Any, matches: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    for path, (scale, shift) in matches.items():
        kind = gated.get_submodule(path).running_mean
        gated.gate_modules.set_match(path, scale.to(kind), shift.to(kind))
    return tuple(matches)


def held_out_r2(gated: Any, calibration: Calibration, batches: Iterable[Any],
                inputs: Inputs | None = None) -> dict[str, float]:  # fmt: skip
    """R² of calibrated predictors on other data: 1 − their squared errors / those of the calibration's constant term.

    What the gates see is taken from the gated model at its present ratios; contributions are those of the
    dense model's channels beside the winners.

    Args:
        gated: The calibrated model, its gates as `calibrate` left them. calibration: what it returned.
        batches, inputs: As for `calibrate`.

    Returns:
        Site name → R², over all channels of the site; negative where a static ranking's values are nearer.
    """
    check_gated(gated, "held_out_r2()")
    found: dict[str, float] = {}
    moments: dict[str, Moments] = {}
    Passes(gated, batches, inputs, "held_out_r2()", False).accumulate(moments, 1, gate=True)
    for name, m in moments.items():
        gate, info = gated.gates[name], calibration.sites[name]
        scaled = m.scaled(info.scale)
        weight, bias = gate.predictor.to(m.x), gate.bias.detach().to(m.x) - info.offset
        constant = gate.start.to(m.x) - info.offset
        errors = [float(squared_errors(scaled, w, b).sum()) for w, b in
                  ((weight, bias), (torch.zeros_like(weight), constant))]  # fmt: skip
        found[name] = 1 - errors[0] / errors[1] if errors[1] > 0 else 0.0
    return found


def _plan(gate: Gate, moments: Moments, dynamic: bool) -> tuple[Ridge, SiteFit]:
    total = moments.total()
    size = float((total.yy / total.count).mean().sqrt())
    # Saliencies of about 1, as before calibration; a site that gives nothing at all keeps its zeros.
    scale = 1 / size if size > 0 else 1.0
    ridge = fit(moments, SHRINKAGES if dynamic else SHRINKAGES[-1:])
    mx = total.x[0] / total.count
    cov = total.xx[0] / total.count - mx[:, None] * mx
    spread = ((ridge.weight @ cov) * ridge.weight).sum(1).clamp_min(0).sqrt()
    lowest = (total.y[0] / total.count - MARGIN * spread).min()
    offset = max(0.0, FLOOR - scale * float(lowest))
    return ridge, SiteFit(gate.channels, gate.in_channels, ridge.shrinkage, ridge.r2, scale, offset)


def _seen(gate: Gate, total: Moments) -> Tensor | None:
    """A with A·Aᵀ = the covariance of what a gate sees, where its predictor has to be cut to a low rank."""
    if gate.rank is None:
        return None
    mx = total.x[0] / total.count
    values, vectors = torch.linalg.eigh(total.xx[0] / total.count - mx[:, None] * mx)
    return vectors * values.clamp_min(0).sqrt()


def _install(gate: Gate, ridge: Ridge, info: SiteFit, moments: Moments, share: float) -> None:
    total = moments.total()
    mx, start = total.x[0] / total.count, info.scale * total.y[0] / total.count + info.offset
    gate.set_predictor(share * info.scale * ridge.weight, _seen(gate, total))
    gate.bias.copy_(start - gate.predictor.to(mx) @ mx)  # the mean saliency stays what it was, cut or not
    gate.start.copy_(start)
    gate.strength.zero_()
    gate.forget_threshold()
    gate.clear()
