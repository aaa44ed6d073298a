"""Choosing with hindsight: what a gate that knew every channel's contribution would choose, as a yardstick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from ..functional import active_set
from ..gates import Gate
from ..sites import suspended
from ..wrapping import GatedModel
from .contribution import Contributions
from .matching import Matching, following_norms

__all__ = ["OracleChoice"]


class OracleChoice(nn.Module):
    """A gated model whose gates choose by the true contributions of the sample's channels in the dense model.

    Each call runs the model twice: dense, to learn them, and masked. The gain is 1. Batch norms that follow readers are
    matched to the dense pass on the same batch where calibration matched them.

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
        matched = {reader: path for reader, path in norms.items() if path in gated.gate_modules.matched}
        with Matching(gated, matched) as matching:
            with Contributions(gated, norms) as seen, suspended(gated):
                gated(*args)
            matching.dense = False
            scores = {site.name: self._scores(seen, site.name) for site in gated.gated_sites}
            with _unmatched(gated), _Overriding(gated, scores):
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


class _Overriding:
    """While entered, gates choose by known scores."""

    def __init__(self, gated: GatedModel, scores: dict[str, Tensor]) -> None:
        self.gated, self.scores = gated, scores
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, gate in self.gated.gates.items():
            self.handles.append(gate.register_forward_hook(_Override(self.scores[name])))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()


class _Override:
    def __init__(self, target: Tensor) -> None:
        self.target = target

    def __call__(self, gate: Gate, args: tuple, output: Tensor) -> Tensor:
        gate.last_active = active_set(self.target, gate.active_count).to(output.device)
        assert gate.last_gain is not None
        gate.last_gain = torch.ones_like(gate.last_gain)
        return gate.last_active
