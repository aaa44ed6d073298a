"""MACs that gates leave; and from a budget of them to a ratio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..config import GateConfig
from ..errors import ConfigError
from ..sites import Site, SiteReport

__all__ = ["fit_ratio", "macs_left"]

STEPS = 10_000  # ratios are looked for in ten-thousandths: no site of timm's has more channels


def fit_ratio(report: SiteReport, config: GateConfig, sites: Sequence[Site]) -> GateConfig:
    """The configuration with the smallest uniform ratio that meets its ``macs``, predictors included.

    Args:
        report: The sites, with the costs of every layer.
        config: Its ``macs`` is the share of the dense MACs that may be left.
        sites: Those of the report's sites that are to be gated.

    Raises:
        ConfigError: Even one channel a site costs more.
    """
    assert config.macs is not None
    budget = math.floor(config.macs * report.macs)

    def left(step: int) -> int:
        return report.macs_with({s.name: config.active_count(s.channels, step / STEPS) for s in sites}, config.rank)

    low, high = 0, STEPS - 1
    least = left(high)
    if least > budget:
        raise ConfigError(
            f"The `macs` of wrap() cannot be {config.macs}: the sites chosen in {report.model} let at best "
            f"{math.ceil(1e4 * least / report.macs) / 1e4} of its MACs be left. Ask for that much or more, gate more "
            "sites (`include`, `exclude`, `stream=True`), or lower `min_channels` and `round_to`."
        )
    while low < high:  # MACs never rise with the ratio
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= budget else (middle + 1, high)
    return dataclasses.replace(config, macs=None, ratio=high / STEPS)


def macs_left(gated: Any) -> int:
    """MACs per sample of a gated model at its present numbers of channels, predictors included."""
    active = {name: gate.active_count for name, gate in gated.gates.items()}
    found: int = gated.site_report.macs_with(active, gated.gate_config.rank)
    return found
