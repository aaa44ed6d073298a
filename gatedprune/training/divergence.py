"""How far an output is from the dense model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError

__all__ = ["divergence"]


def divergence(dense: Any, output: Any) -> Tensor:
    """How far an output is from the dense model's, for each sample, (B,).

    Of logits (B, classes) the Kullback-Leibler divergence of their softmax; of any other tensor the squared error as a
    share of the dense output's squares; of tuples, lists and dictionaries of tensors, the mean over these.

    Raises:
        ConfigError: There is no tensor of floating-point numbers (B, …) in the output.
    """
    each = [_of_tensors(a, b) for a, b in zip(tree_leaves(dense), tree_leaves(output), strict=True)
            if isinstance(a, Tensor) and a.dim() and a.is_floating_point()]  # fmt: skip
    if not each:
        raise ConfigError(
            f"Outputs that are a {type(output).__name__} cannot be compared with the dense model's: allocate() takes a "
            "`loss` for that, of the dense output and the gated one, (B,); calibrate() does with `temper=False`."
        )
    return torch.stack(each).mean(0)


def _of_tensors(dense: Tensor, output: Tensor) -> Tensor:
    dense, output = dense.double(), output.double()
    if dense.dim() == 2:
        p, q = dense.log_softmax(1), output.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)
    return (output - dense).flatten(1).square().sum(1) / dense.flatten(1).square().sum(1).clamp_min(1e-300)
