"""Which channels a gated model uses most over some data: what a static model would best be left with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, ModelError
from ..sites import evaluating
from ..wrapping import GatedModel

__all__ = ["most_used"]


def most_used(gated: Any, batches: Iterable[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a gated model over data and count.

    Args:
        gated: What `gatedprune.wrap` returned. Left as it is.
        batches: Tensors (B, …), or tuples that begin with one, such as a data loader gives.

    Returns:
        Site name → (k,) int64, the k channels that were active most often, ascending (ties go to the lower index); and
        site name → (k,) their mean gain where they were active. `gatedprune.engine.freeze` takes both.

    Raises:
        ModelError: The model is not gated. DataError: there are no batches.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(f"most_used() takes a model that wrap() returned. {type(gated).__name__} is not gated.")
    counts = {name: torch.zeros(gate.channels, dtype=torch.float64) for name, gate in gated.gates.items()}
    sums = {name: torch.zeros_like(count) for name, count in counts.items()}
    device, seen = next(gated.parameters()).device, 0
    with torch.no_grad(), evaluating(gated):
        for batch in batches:
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            gated(images.to(device))
            seen += len(images)
            for name, gate in gated.gates.items():
                assert gate.last_active is not None and gate.last_gain is not None
                active, gain = gate.last_active.flatten().cpu(), gate.last_gain.flatten().double().cpu()
                counts[name].index_add_(0, active, torch.ones_like(gain))
                sums[name].index_add_(0, active, gain)
    for gate in gated.gates.values():
        gate.clear()
    if not seen:
        raise DataError("The `batches` of most_used() are empty: give it some hundred samples.")
    kept = {}
    for name, gate in gated.gates.items():
        order = torch.sort(counts[name], descending=True, stable=True).indices
        kept[name] = order[: gate.active_count].sort().values
    return kept, {name: (sums[name] / counts[name].clamp_min(1))[indices] for name, indices in kept.items()}
