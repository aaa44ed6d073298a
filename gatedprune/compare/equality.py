"""Does the compact model compute what the masked reference computes? Asked before anything is timed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import CompactModel
from ..errors import ModelError
from ..precision import ROUNDING_FACTOR, in_float64, nearby
from ..sites import evaluating
from ..wrapping import GatedModel

__all__ = ["Equality", "check_equality"]

# Both paths in float64 differ by rounding only, in another order of summation: 2⁻⁵³ ≈ 1e-16 a step, a few
# thousand terms a sum, some hundred layers. A wrong channel is off by the size of the output itself.
LOGIC_TOLERANCE = 1e-9
# Rounding is judged over this many outputs at least, which a small head at batch 1 needs several inputs for.
ENOUGH_VALUES = 64


@dataclass(frozen=True)
class Equality:
    """How far compact and masked outputs are apart; differences relative to the largest masked output.

    Args:
        float64: Largest difference when both run in float64: the logic.
        native: Largest difference when both run in the model's own precision.
        native_compact: Root mean square error of the compact model against the float64 reference.
        native_masked: The same of the masked model: what plain PyTorch loses by rounding.
        same_channels: Whether both chose the same channels in the model's own precision. Where two saliencies
            are equal up to rounding they may not, and then the differences in that precision say nothing
            about the engine.
    """

    float64: float
    native: float
    native_compact: float
    native_masked: float
    same_channels: bool

    @property
    def green(self) -> bool:
        """Whether the two agree, as far as their precision allows."""
        rounding = self.native_compact <= ROUNDING_FACTOR * self.native_masked + LOGIC_TOLERANCE
        return self.float64 <= LOGIC_TOLERANCE and (rounding or not self.same_channels)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**dataclasses.asdict(self), "green": self.green}


@dataclass
class _Outputs:
    """Of both models, in float64 and in their own precision, on all inputs so far."""

    reference: list[Tensor] = dataclasses.field(default_factory=list)
    exact: list[Tensor] = dataclasses.field(default_factory=list)
    masked: list[Tensor] = dataclasses.field(default_factory=list)
    compacted: list[Tensor] = dataclasses.field(default_factory=list)
    same: bool = True

    def judged(self) -> Equality:
        scale = max((float(value.abs().max()) for value in self.reference if value.numel()), default=0.0) or 1.0
        return Equality(
            float64=_largest(self.exact, self.reference) / scale,
            native=_largest(self.compacted, self.masked) / scale,
            native_compact=_rms(self.compacted, self.reference) / scale,
            native_masked=_rms(self.masked, self.reference) / scale,
            same_channels=self.same,
        )


def check_equality(gated: GatedModel, fast: CompactModel, inputs: tuple[Any, ...]) -> Equality:
    """Compare the compact model with the masked one on `inputs`, in float64 and in the model's precision.

    Args:
        gated: The masked model, from `wrap`.
        fast: `compact(gated)`: the very model that is to be timed.
        inputs: Positional arguments.

    Raises:
        ModelError: They do not agree.
    """
    exact_gated, exact_fast = copy.deepcopy(gated).double(), copy.deepcopy(fast).double()
    seen = _Outputs()
    with torch.no_grad():
        for one in nearby(inputs):
            exact_one = in_float64(one)
            seen.reference += _outputs(exact_gated, exact_one)
            seen.exact += _outputs(exact_fast, exact_one)
            seen.masked += _outputs(gated, one)
            chosen = {name: gate.last_active for name, gate in gated.gates.items()}
            seen.compacted += _outputs(fast, one)
            seen.same = seen.same and _same_channels(chosen, fast.last_active)
            found = seen.judged()
            enough = sum(value.numel() for value in seen.reference) >= ENOUGH_VALUES
            if found.float64 > LOGIC_TOLERANCE or (enough and found.green):
                break
    if not found.green:
        raise ModelError(
            "The compact model does not compute what the gated model computes, so it was not timed. "
            f"Relative difference in float64: {found.float64:.1e} (at most {LOGIC_TOLERANCE:.0e}). "
            f"Error in the model's precision: {found.native_compact:.1e}; "
            f"of the masked model: {found.native_masked:.1e}. "
            "Please report this with the model's name."
        )
    return found


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with evaluating(model):
        return [value.double() for value in _tensors(model(*inputs))]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((_finite(float((a - b).abs().max())) for a, b in _pairs(found, wanted) if a.numel()), default=0.0)


def _rms(found: list[Tensor], wanted: list[Tensor]) -> float:
    errors: dict[tuple[int, ...], list[Tensor]] = {}  # outputs of one kind, from all inputs, count together
    for a, b in _pairs(found, wanted):
        if a.numel():
            errors.setdefault(tuple(a.shape), []).append((a - b).square().mean())
    return max((_finite(float(torch.stack(group).mean().sqrt())) for group in errors.values()), default=0.0)


def _pairs(found: list[Tensor], wanted: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    shapes = [[tuple(value.shape) for value in values] for values in (found, wanted)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ModelError(f"The compact model returns tensors of shapes {shapes[0]}, the gated model {shapes[1]}.")
    return list(zip(found, wanted, strict=True))


def _finite(difference: float) -> float:
    return difference if difference == difference else float("inf")  # NaN must not pass as small


def _same_channels(chosen: Mapping[str, Tensor | None], others: Mapping[str, Tensor | None]) -> bool:
    for name, channels in chosen.items():
        other = others.get(name)
        if channels is None or other is None or not torch.equal(channels, other):
            return False
    return True
