"""Choosing with hindsight: what a gate that knew every channel's contribution would choose, as a yardstick."""

from __future__ import annotations

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

__all__ = ["OracleChoice"]


class OracleChoice(nn.Module):
    """A gated model whose gates choose by the true contributions of the sample's channels in the dense model.

    Each call runs the model twice: dense, to learn them, and masked. The gain is 1.

    Args:
        gated: A gated model; its k are used.
    """

    def __init__(self, gated: Any) -> None:
        super().__init__()
        if not isinstance(gated, GatedModel):
            raise ModelError(f"OracleChoice takes a model that wrap() returned. {type(gated).__name__} is not gated.")
        self.gated = gated

    @torch.no_grad()
    def forward(self, *args: Any) -> Any:
        """The model's output with the oracle's choice, for its positional arguments."""
        with Contributions(self.gated) as seen, suspended(self.gated):
            self.gated(*args)
        with _Overriding(self.gated, seen):
            return self.gated(*args)


class _Overriding:
    """While entered, gates return the active sets of known contributions."""

    def __init__(self, gated: GatedModel, seen: Contributions) -> None:
        self.gated, self.seen = gated, seen
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, gate in self.gated.gates.items():
            self.handles.append(gate.register_forward_hook(_Override(self.seen.target(name))))

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
