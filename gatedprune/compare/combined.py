"""Dynamic after static: some channels go for good, and of those that are left each input chooses its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..errors import ModelError
from ..sites import find_sites
from ..wrapping import GatedModel, wrap
from .static import StaticResult

__all__ = ["gate_after_static"]

Prune = Callable[[dict[str, int]], StaticResult]


def gate_after_static(gated: GatedModel, prune: Prune, inputs: tuple[Any, ...]) -> GatedModel:
    """Prune half of what the gates suppress, and gate the rest: as many channels are active as in ``gated``.

    Args:
        gated: Says sites and k.
        prune: From the number of channels that stay at each inner site to the pruned model.
        inputs: Positional arguments to trace the pruned model with.

    Raises:
        ModelError: The model cannot be pruned by torch-pruning, or has no site left to gate.
    """
    inner = [site for site in gated.gated_sites if site.kind == "inner"]
    final = {site.name: gated.gates[site.name].active_count for site in inner}
    between = {site.name: math.ceil((site.channels + final[site.name]) / 2) for site in inner}
    pruned = _by_torch_pruning(prune(between))
    sites = {site.name for site in find_sites(pruned, inputs)}
    if not set(final) <= sites:
        # A narrower site may not be worth a gate any more: such ones are pruned all the way.
        pruned = _by_torch_pruning(prune({name: between[name] if name in sites else final[name] for name in final}))
    names = tuple(name for name in final if name in sites)
    if not names:
        raise ModelError("no site of the pruned model is worth a gate")
    config = dataclasses.replace(gated.gate_config, ratio=0.0, macs=None, include=names, exclude=(), min_channels=1,
                                 round_to=1, stream=False)  # fmt: skip
    combined: GatedModel = wrap(pruned, config=config, example_inputs=inputs).eval()
    for name, gate in combined.gates.items():
        gate.active_count = final[name]
    return combined


def _by_torch_pruning(result: StaticResult) -> Any:
    if result.by != "torch-pruning":
        raise ModelError(f"torch-pruning could not prune it first: {result.why}")
    return result.model
