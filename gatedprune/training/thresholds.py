"""Thresholds: one T per site, so that k channels win on average, and easy inputs cost less than hard ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ModelError
from ..gates import Gate
from ..sites import evaluating
from ..wrapping import GatedModel
from .passes import model_arguments

__all__ = ["SiteThreshold", "ThresholdFit", "fit_thresholds"]

_CLOSE = 0.01  # of k: nearer than this the mean need not come


@dataclass(frozen=True)
class SiteThreshold:
    """How the threshold of one gate was set.

    Attributes:
        channels: C. wanted: k. threshold: T; infinite where exactly k win.
        mean: Winners of a sample on average over the data, with all thresholds in force.
        p20, p80: 20 % and 80 % of the samples have at most so many. least, most: over all samples.
    """

    channels: int
    wanted: int
    threshold: float
    mean: float
    p20: float
    p80: float
    least: int
    most: int


@dataclass(frozen=True)
class ThresholdFit:
    """What `fit_thresholds` returns; prints as a table.

    Attributes:
        samples: How many samples were seen.
        sites: Site name → how its threshold was set.
    """

    samples: int
    sites: Mapping[str, SiteThreshold]

    def __str__(self) -> str:
        width = max([len(name) for name in self.sites] + [4])
        lines = [f"thresholds of {len(self.sites)} gates from {self.samples} samples",
                 f"{'site':<{width}}  channels     k      T  winners  p20–p80  least–most"]  # fmt: skip
        for name, s in self.sites.items():
            lines.append(
                f"{name:<{width}}  {s.channels:>8}  {s.wanted:>4}  {s.threshold:>5.2f}  {s.mean:>7.1f}  "
                f"{f'{s.p20:.0f}–{s.p80:.0f}':>7}  {f'{s.least}–{s.most}':>10}"
            )
        return "\n".join(lines)


def fit_thresholds(gated: Any, batches: Iterable[Any], *, rounds: int = 4,
                   inputs: Callable[[Any], Any] | None = None) -> ThresholdFit:  # fmt: skip
    """Set the T of every gate so that k channels win on average over the data (equation 4's threshold). Eval mode.

    T stands between the N·k largest saliencies that N samples show at a site and the others. Where these tie (a site
    whose channels are all worth nothing, say) nothing stands between them: T stays infinite, and exactly k win.
    What a gate sees depends on what the gates before it let through, so the data is gone through again with the
    thresholds found, and these are set anew, until every mean is within a hundredth of k, or ``rounds`` are over.

    Args:
        gated: A gated model, wrapped with ``gate="threshold"``.
        batches: A few hundred samples or more, as for `calibrate`. Kept meanwhile: N·C saliencies for each site.
        rounds: How often thresholds are set, at most; each takes a pass over the data, and one more counts.
        inputs: As for `calibrate`.

    Returns:
        The thresholds, and how many channels win with them.

    Raises:
        ConfigError: ``rounds`` is out of its domain.
        ModelError: The model is not gated, or its gates have no thresholds.
        DataError: No batches, batches that can be gone through only once, or saliencies that are not finite. The
            thresholds are then as they were.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1:
        raise ConfigError(f"`rounds` of fit_thresholds() must be an integer of at least 1. Got {rounds!r}.")
    if not isinstance(gated, GatedModel):
        raise ModelError(f"fit_thresholds() takes a model that wrap() returned. {type(gated).__name__} is not gated.")
    gates = gated.gates
    if not all(gate.varies for gate in gates.values()):
        raise ModelError("The gates have no thresholds: wrap the model with gate='threshold'.")
    if isinstance(batches, Iterator):
        raise DataError(
            "The `batches` of fit_thresholds() are an iterator, which is used up after one pass: give it a list or a "
            "data loader."
        )
    before = {name: _threshold(gate).clone() for name, gate in gates.items()}
    for gate in gates.values():
        gate.forget_threshold()
    try:
        for i in range(int(rounds) + 1):
            saliencies, winners = _observe(gated, batches, inputs)
            means = {name: float(counts.double().mean()) for name, counts in winners.items()}
            close = all(abs(means[n] - g.active_count) <= _CLOSE * g.active_count for n, g in gates.items())
            if i == rounds or (i and close):
                break
            with torch.no_grad():
                for name, gate in gates.items():
                    if gate.active_count < gate.channels:
                        _threshold(gate).fill_(_between(saliencies[name], gate.active_count, name))
    except BaseException:
        for name, gate in gates.items():
            _threshold(gate).copy_(before[name])
        raise
    samples = len(next(iter(winners.values())))
    return ThresholdFit(samples, {name: _described(gates[name], winners[name]) for name in gates})


def _threshold(gate: Gate) -> Tensor:
    assert gate.threshold is not None
    return gate.threshold


def _observe(gated: Any, batches: Iterable[Any], inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Site → saliencies (N, C), and numbers of winners (N,), over one pass."""
    saliencies: dict[str, list[Tensor]] = {name: [] for name in gated.gates}
    winners: dict[str, list[Tensor]] = {name: [] for name in gated.gates}
    with torch.no_grad(), evaluating(gated):
        for args in model_arguments(gated, batches, inputs, "fit_thresholds()"):
            gated(*args)
            for name, gate in gated.gates.items():
                saliencies[name].append(gate.last_saliency.cpu())
                winners[name].append((gate.last_active < gate.channels).sum(1).cpu())
                gate.clear()
    if not any(len(counts) for found in winners.values() for counts in found):
        raise DataError("The `batches` of fit_thresholds() are empty: give it a few hundred samples.")
    return tuple({n: torch.cat(v) for n, v in d.items()} for d in (saliencies, winners))  # type: ignore[return-value]


def _between(g: Tensor, k: int, site: str) -> float:
    """Halfway between the N·k-th largest saliency and the next; infinite where they tie. g is (N, C) with k < C."""
    if not bool(g.isfinite().all()):
        raise DataError(f"The saliencies of the site {site} are not finite: no threshold can be set.")
    order = g.double().flatten().sort(descending=True).values
    last, next_ = order[len(g) * k - 1 : len(g) * k + 1].tolist()
    return (last + next_) / 2 if last > next_ else float("inf")


def _described(gate: Gate, winners: Tensor) -> SiteThreshold:
    counts = winners.numpy()
    p20, p80 = np.percentile(counts, [20, 80])
    return SiteThreshold(gate.channels, gate.active_count, float(_threshold(gate)), float(counts.mean()), float(p20),
                         float(p80), int(counts.min()), int(counts.max()))  # fmt: skip
