"""How far an output is from the dense model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ConfigError

__all__ = ["divergence"]


def divergence(dense: Any, output: Any) -> Tensor:
    """How far an output is from the dense model's, for each sample, (B,).

    Of logits (B, classes) the Kullback-Leibler divergence of their softmax; of any other tensor the squared error as a
    share of the dense output's squares.

    Raises:
        ConfigError: The model's output is no tensor.
    """
    if not isinstance(dense, Tensor) or not isinstance(output, Tensor):
        raise ConfigError(
            f"Outputs that are a {type(output).__name__} cannot be compared with the dense model's: allocate() takes a "
            "`loss` for that, of the dense output and the gated one, (B,); calibrate() does without `temper`."
        )
    dense, output = dense.double(), output.double()
    if dense.dim() == 2:
        p, q = dense.log_softmax(1), output.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)
    return (output - dense).flatten(1).square().sum(1) / dense.flatten(1).square().sum(1).clamp_min(1e-300)
