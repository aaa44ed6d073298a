"""Choosing with hindsight: what a gate that knew every channel's contribution would choose, as a yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..functional import active_set, subsample, winners
from ..gates import Gate
from ..sites import suspended
from ..wrapping import GatedModel
from .contribution import Contributions
from .matching import Matching, following_norms

__all__ = ["OracleChoice", "choosing"]


class OracleChoice(nn.Module):
    """A gated model whose gates choose by the true contributions of the sample's channels in the dense model.

    Each call runs the model twice: dense, to learn them, and masked. The gain is 1. Batch norms that calibration
    matched are matched to the dense pass on the same batch.

    Args:
        gated: A gated model; its k are used.
        rounds: How often the contributions beside the chosen channels are looked at again; 1: beside all.
    """

    def __init__(self, gated: Any, rounds: int = 4) -> None:
        super().__init__()
        if not isinstance(gated, GatedModel):
            raise ModelError(f"OracleChoice takes a model that wrap() returned. {type(gated).__name__} is not gated.")
        self.gated, self.rounds = gated, rounds

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        """The model's output with the oracle's choice, for its positional arguments."""
        gated = self.gated
        with suspended(gated):
            norms = following_norms(gated, *args)
        with Matching(gated, gated.gate_modules.matched) as matching:
            with Contributions(gated, norms) as seen, suspended(gated):
                gated(*args)
            matching.dense = False
            scores = {site.name: self._scores(seen, site.name) for site in gated.gated_sites}
            with _unmatched(gated), choosing(gated, lambda name, s: scores[name]):
                return gated(*args)

    def _scores(self, seen: Contributions, site: str) -> Tensor:
        k, costs = self.gated.gates[site].active_count, seen.costs(site)
        scores, total = costs, torch.zeros_like(costs)
        for _ in range(self.rounds - 1):
            total += seen.costs(site, active_set(scores, k))
            scores = total
        return scores


@contextmanager
def _unmatched(gated: GatedModel) -> Iterator[None]:
    """Without the matches that belong to the gates' own choice."""
    modules = gated.gate_modules
    before = {path: modules.match(path) for path in modules.matched}
    modules.clear_matches()
    try:
        yield
    finally:
        for path, found in before.items():
            assert found is not None
            modules.set_match(path, *found)


@contextmanager
def choosing(gated: GatedModel, scores: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """While entered, gates choose the k channels of the largest score, and the gain is 1.

    Args:
        scores: From a gate's name and what it sees, (B, C_in), to (B, C); called once for each time that a gate runs.
    """

    def override(name: str) -> Any:
        def hook(gate: Gate, args: tuple, output: Tensor) -> Tensor:
            found = scores(name, subsample(args[0], gate.channel_dim, gate.signed, gate.bias.dtype))
            gate.last_wins = winners(found, gate.active_count).to(output.device)
            gate.last_gains = gate.bias.new_ones(gate.last_wins.shape)
            return gate.last_wins

        return hook

    handles = [gate.register_forward_hook(override(name)) for name, gate in gated.gates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
