"""The inputs of a measurement: positional arguments, whose first tensor tells batch size and device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError

__all__ = ["as_arguments", "first_tensor"]


def as_arguments(inputs: Any, where: str) -> tuple[Any, ...]:
    """`inputs` as a tuple of positional arguments, checked to hold a batch.

    Raises:
        DataError: No tensor is among them, or the first has no batch dimension or an empty one.
    """
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not any(isinstance(argument, Tensor) for argument in arguments):
        raise DataError(
            f"The inputs of {where} must be a tensor such as torch.zeros(1, 3, 224, 224), or a tuple of "
            f"the model's arguments with a tensor among them. Got {type(inputs).__name__}."
        )
    tensor = first_tensor(arguments)
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise DataError(
            f"The inputs of {where} must have a batch dimension of at least one sample. "
            f"Got a tensor of shape {tuple(tensor.shape)}."
        )
    return arguments


def first_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """The first tensor among positional arguments that hold one."""
    return next(argument for argument in arguments if isinstance(argument, Tensor))
