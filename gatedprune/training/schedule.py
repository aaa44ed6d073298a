"""Ratios that rise while a model trains: all channels first, the target's number at the end (FBS, section 4)."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from ..errors import ConfigError, ModelError
from ..wrapping import GatedModel

__all__ = ["RatioSchedule", "rise"]

KINDS = ("constant", "step", "cosine")


def rise(progress: float, kind: str, levels: int | None = None) -> float:
    """The share of the target ratio at ``progress``, from 0 (nothing is suppressed yet) to 1 (the target).

    Args:
        progress: Share of the rise that is over; clamped to [0, 1]. From 1 on the target holds.
        kind: "constant": the target from the start. "step": in equal steps, each as long as the others. "cosine": half
            a cosine, slow at both ends.
        levels: How many values lie above 0; None: a continuous rise, and for "step" 10.
    """
    progress = min(1.0, max(0.0, progress))
    if kind == "constant" or progress == 1.0:
        return 1.0
    if kind == "step":
        levels = levels or 10
        # As many values below the target as levels, each for the same time, 0 first.
        return math.floor(progress * levels + 1e-9) / levels
    smooth = (1 - math.cos(math.pi * progress)) / 2
    return smooth if levels is None else math.floor(smooth * levels + 1e-9) / levels


class RatioSchedule:
    """Takes a gated model from ratio 0 to the ratios it has now, over the first ``length`` epochs or steps.

    What `wrap` or `set_ratio` chose is the target, each site's own where they differ, also where `wrap` found them for
    a budget of MACs. The ratio is a function of the position alone, so that a resumed training has only to ask for it.

        schedule = RatioSchedule(gated, length=20)
        for epoch in range(30):
            schedule.set(epoch)
            ...

    Args:
        gated: What `gatedprune.wrap` returned. Its ratios go to those of position 0.
        length: Where the target is reached, in whatever unit `set` is given.
        kind: "step", "cosine", or "constant" (no schedule): see `rise`.
        levels: How many different ratios above 0; see `rise`. A model that is compiled is compiled again for each.

    Raises:
        ConfigError: An option out of its domain. ModelError: the model is not gated.

    Source: Gao et al., arXiv 1810.05331, section 4: density is lowered step by step, with training between.
    """

    gated: GatedModel
    length: float
    kind: str
    levels: int | None
    target: dict[str, int]

    def __init__(self, gated: Any, length: float, kind: str = "cosine", levels: int | None = None) -> None:
        if not isinstance(gated, GatedModel):
            raise ModelError(
                f"RatioSchedule() takes a model that gatedprune.wrap() returned. {type(gated).__name__} is not gated."
            )
        if isinstance(length, bool) or not isinstance(length, Real) or not 0 <= float(length) < math.inf:
            raise ConfigError(f"The `length` of RatioSchedule() must be a number of at least 0. Got {length!r}.")
        if kind not in KINDS:
            raise ConfigError(f"The `kind` of RatioSchedule() must be one of {', '.join(KINDS)}. Got {kind!r}.")
        if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 1):
            raise ConfigError(f"The `levels` of RatioSchedule() must be an integer of at least 1. Got {levels!r}.")
        self.gated, self.length, self.kind, self.levels = gated, float(length), kind, levels
        self.target = {name: gate.active_count for name, gate in gated.gates.items()}
        """Site → k at the end."""
        self.set(0)

    def share(self, position: float) -> float:
        """The share of each site's target ratio at ``position``."""
        return rise(position / self.length if self.length else 1.0, self.kind, self.levels)

    def active(self, position: float) -> dict[str, int]:
        """Site → k at ``position``."""
        share, config = self.share(position), self.gated.gate_config
        found = {}
        for name, gate in self.gated.gates.items():
            k = self.target[name]
            ratio = share * (1 - k / gate.channels)
            found[name] = k if share == 1 else max(k, config.active_count(gate.channels, ratio))
        return found

    def set(self, position: float, *others: Any) -> float:
        """Give every gate its k at ``position``; also those of ``others``, copies such as a moving average.

        Returns:
            The mean ratio over the gates.
        """
        wanted = self.active(position)
        for model in (self.gated, *others):
            for name, gate in model.gates.items():
                gate.active_count = wanted[name]
        gates = self.gated.gates.values()
        return sum(gate.ratio for gate in gates) / len(gates)
