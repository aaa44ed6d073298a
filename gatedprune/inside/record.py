"""Run a gated or compact model and take down what its gates chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import CompactModel
from ..errors import DataError, ModelError
from ..functional import active_mask
from ..gates import Gate
from ..sites import evaluating
from ..wrapping import GatedModel

__all__ = ["arguments_and_labels", "chosen_channels", "class_name", "gates_of", "is_untouched"]


def gates_of(model: nn.Module, where: str) -> Mapping[str, Gate]:
    """The gates of a gated or a compact model."""
    if not isinstance(model, (GatedModel, CompactModel)):
        raise ModelError(
            f"{where} takes a model that wrap() or compact() returned. {type(model).__name__} is not gated."
        )
    if isinstance(model, CompactModel) and model.share == "batch":
        raise ModelError(
            f"{where} asks what each sample chooses, but compact(share='batch') chooses once for the batch."
        )
    return model.gates


def class_name(model: nn.Module) -> str:
    """The name of the class that the model was made from."""
    source: Any = model.__dict__["_source"] if isinstance(model, CompactModel) else model
    name: str = source._gatedprune_base.__name__
    return name


def is_untouched(gates: Mapping[str, Gate]) -> bool:
    """Whether no gate looks at its input: before calibration and training all choose by their constant term."""
    return not any(bool(gate.weight.any()) for gate in gates.values())


def chosen_channels(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Site → (B, C), bool, on the CPU: which channels win for each sample of these arguments. In eval mode."""
    assert isinstance(model, (GatedModel, CompactModel))
    with evaluating(model), torch.no_grad():
        model(*args)
    if isinstance(model, CompactModel):
        active: Mapping[str, Tensor | None] = model.last_active
    else:
        active = {name: gate.last_active for name, gate in model.gates.items()}
    masks = {}
    for name, gate in model.gates.items():
        indices = active.get(name)
        if indices is None:
            raise ModelError(f"The forward pass did not come by the gate of the site {name}: nothing was chosen there.")
        masks[name] = active_mask(indices, gate.channels).cpu()
        gate.clear()
    return masks


def arguments_and_labels(
    batch: Any, device: torch.device, inputs: Callable[[Any], Any] | None, where: str
) -> tuple[tuple[Any, ...], Tensor | None]:
    """A batch as the model's positional arguments on its device, and its labels, (B,), where it has integer ones."""
    labels = None
    if inputs is not None:
        value = inputs(batch)
    elif isinstance(batch, (tuple, list)) and batch:
        value = batch[0]
        second = batch[1] if len(batch) > 1 else None
        if isinstance(second, Tensor) and second.dim() == 1 and not second.is_floating_point():
            labels = second.long().cpu()
    else:
        value = batch
    args = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None:
        raise DataError(
            f"The `batches` of {where} must hold tensors, or tuples that begin with one. Got "
            f"{type(batch).__name__}: say with `inputs=` how to get the model's arguments from it."
        )
    if labels is not None and len(labels) != first.shape[0]:
        raise DataError(f"A batch of {where} has {first.shape[0]} samples and {len(labels)} labels.")
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args), labels
