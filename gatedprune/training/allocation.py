"""Allocation: a ratio for each site, by how sensitive the model is to it, under one budget of MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import check_ratio
from ..errors import ConfigError, DataError
from ..sites import evaluating, suspended
from .divergence import divergence
from .matching import Matching, batch_norms
from .passes import Inputs, check_gated, model_arguments

__all__ = ["Allocation", "allocate", "share_out"]

LEVELS = (0.1, 0.25, 0.5, 0.75)
STEPS = 40  # counts of channels that are considered for each site

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Allocation:
    """What `allocate` returns; prints as a table.

    Attributes:
        ratios: Site name → ratio, as `set_ratio` takes it.
        macs: The share of the dense MACs that is left, predictors included.
        sensitivity: Site name → (ratio, loss) where that site alone is gated.
    """

    ratios: Mapping[str, float]
    macs: float
    sensitivity: Mapping[str, tuple[tuple[float, float], ...]]

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.ratios, "site"))
        levels = [f"{ratio:g}" for ratio, _ in next(iter(self.sensitivity.values()))]
        lines = [f"{self.macs:.1%} of the MACs are left", f"{'site':<{width}}  ratio  loss at {', '.join(levels)}"]
        for name, ratio in self.ratios.items():
            losses = ", ".join(f"{loss:.3g}" for _, loss in self.sensitivity[name])
            lines.append(f"{name:<{width}}  {ratio:>5.2f}  {losses}")
        return "\n".join(lines)


def allocate(gated: Any, batches: Iterable[Any], *, macs: float, levels: Sequence[float] = LEVELS,
             loss: Loss = divergence, inputs: Inputs | None = None) -> Allocation:  # fmt: skip
    """Give each site a ratio of its own, so that the model stays nearest to the dense one within a budget of MACs.

    Each site is gated alone at a few ratios, by its gate as it is, and the output's distance from the dense model's is
    averaged over the samples; batch norms are matched to the dense pass of the same batch, as `calibrate` does. Then
    channels are given up where they cost least for the MACs that they save, until the budget is met. Calibrate before,
    at ratio 0, so that gates rank well, and after, at the ratios found.

    Args:
        gated: A model from `gatedprune.wrap`. Its ratios are set.
        batches, inputs: As for `gatedprune.calibrate`; some ten to a hundred samples do. Gone through once, with one
            pass for each site and level.
        macs: The share of the dense MACs that may be left, predictors included.
        levels: Ratios to measure at, ascending; losses between them are interpolated, and beyond the last none is
            considered.
        loss: From the dense output and the gated one to a loss for each sample, (B,); default: `divergence`.

    Raises:
        ConfigError: An option is out of its domain, or the budget cannot be met. DataError: no batches.
        ModelError: the model is not gated. The ratios are then as they were.
    """
    check_gated(gated, "allocate()")
    if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not 0 < macs < math.inf:
        raise ConfigError(f"`macs` of allocate() must be a number above 0: a share of the dense MACs. Got {macs!r}.")
    asked = [check_ratio(level, "allocate(), `levels`,") for level in levels]
    if not asked or asked[0] <= 0 or any(b <= a for a, b in zip(asked, asked[1:], strict=False)):
        raise ConfigError(f"`levels` of allocate() must be ratios above 0, ascending. Got {levels!r}.")
    before = {name: gate.active_count for name, gate in gated.gates.items()}
    matches = {path: gated.gate_modules.match(path) for path in gated.gate_modules.matched}
    try:
        gated.gate_modules.clear_matches()
        found = _sensitivity(gated, batches, inputs, asked, loss)
    finally:
        for name, gate in gated.gates.items():
            gate.active_count = before[name]
            gate.clear()
        for path, match in matches.items():
            gated.gate_modules.set_match(path, *match)
    report, config = gated.site_report, gated.gate_config
    curves: dict[str, dict[int, float]] = {}
    for site in gated.gated_sites:
        points = {site.channels: 0.0}
        points.update((config.active_count(site.channels, ratio), value) for ratio, value in found[site.name])
        curves[site.name] = _interpolated(points, config.round_to)
    left = partial(report.macs_with, rank=config.rank)
    counts = share_out(curves, left, math.floor(macs * report.macs))
    ratios = {site.name: 1 - counts[site.name] / site.channels for site in gated.gated_sites}
    gated.set_ratio(ratios)
    return Allocation(ratios, left(counts) / report.macs, {n: tuple(v) for n, v in found.items()})


def _sensitivity(gated: Any, batches: Iterable[Any], inputs: Inputs | None, levels: list[float],
                 loss: Loss) -> dict[str, list[tuple[float, float]]]:  # fmt: skip
    """Site name → (ratio, mean loss) with that site alone gated."""
    totals: dict[tuple[str, float], float] = {}
    samples = 0
    with torch.no_grad(), evaluating(gated), Matching(gated, batch_norms(gated)) as matching:
        for args in model_arguments(gated, batches, inputs, "allocate()"):
            with suspended(gated):
                matching.dense = True
                dense = gated(*args)
            matching.dense = False
            for name, gate in gated.gates.items():
                for level in levels:
                    for other in gated.gates.values():
                        other.active_count = other.channels
                    gate.active_count = gated.gate_config.active_count(gate.channels, level)
                    value = float(loss(dense, gated(*args)).double().sum())
                    totals[name, level] = totals.get((name, level), 0.0) + value
            samples += next(a.shape[0] for a in args if isinstance(a, Tensor))
    if not samples:
        raise DataError("The `batches` of allocate() are empty: give it some ten to a hundred samples.")
    return {name: [(level, totals[name, level] / samples) for level in levels] for name in gated.gates}


def _interpolated(points: Mapping[int, float], round_to: int) -> dict[int, float]:
    """Losses at up to `STEPS` counts of channels, linear between those measured; never less with fewer channels."""
    known = sorted(points.items(), reverse=True)
    most, least = known[0][0], known[-1][0]
    stride = max(round_to, math.ceil((most - least) / STEPS / round_to) * round_to)
    curve, worst = {most: known[0][1]}, known[0][1]
    for count in sorted({*range(least, most, stride), *points}, reverse=True):
        for (a, high), (b, low) in zip(known, known[1:], strict=False):
            if b <= count <= a:
                worst = max(worst, high + (low - high) * (a - count) / (a - b))
                break
        curve[count] = worst
    return curve


def share_out(curves: Mapping[str, Mapping[int, float]], cost: Callable[[Mapping[str, int]], int],
              budget: int) -> dict[str, int]:  # fmt: skip
    """How many channels each site keeps: the least loss for the saving, step by step, until the cost is within budget.

    Args:
        curves: Site → count → loss; the largest count is where it starts.
        cost: From a count for each site to MACs. budget: what they may be.

    Raises:
        ConfigError: Even the smallest counts cost more.
    """
    counts = {name: max(curve) for name, curve in curves.items()}
    least = cost({name: min(curve) for name, curve in curves.items()})
    if least > budget:
        raise ConfigError(
            f"`macs` of allocate() cannot be met: with all sites at the last of the `levels`, {least:,} MACs are left. "
            f"The budget is {budget:,}. Give a larger `macs`, or add a larger ratio to `levels`."
        )
    spent = cost(counts)
    while spent > budget:
        best: tuple[float, str, int] | None = None
        for name, curve in curves.items():
            for count in curve:
                if count < counts[name]:
                    saved = spent - cost({**counts, name: count})
                    # Once the budget is met, further savings win nothing.
                    useful = min(saved, spent - budget)
                    if useful > 0:
                        slope = (curve[count] - curve[counts[name]]) / useful
                        if best is None or slope < best[0]:
                            best = slope, name, count
        assert best is not None  # the smallest counts are within the budget
        counts[best[1]] = best[2]
        spent = cost(counts)
    return counts
