"""Winograd's minimal filtering F(2×2, 3×3): 3×3 convolutions with 16 products where there were 36.

Source: Lavin and Gray 2016, arXiv:1509.09308, section 4.1. Every channel is transformed by itself, so that choosing
channels commutes with it: the weights are transformed once, for all channels, and the kernels read those that win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pays", "restore_weight", "transform_weight"]

# G of the paper: of three taps to four positions.
_G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


def transform_weight(weight: Tensor) -> Tensor:
    """G g Gᵀ of each kernel g, computed in float64: (C_out, C_in, 3, 3) → (16, C_out, C_in)."""
    g = _G.to(weight.device)
    found = torch.einsum("ai,ocij,bj->aboc", g, weight.double(), g)
    return found.flatten(0, 1).to(weight.dtype).contiguous()


def restore_weight(transformed: Tensor) -> Tensor:
    """The kernels g that `transform_weight` was given, up to rounding: (16, C_out, C_in) → (C_out, C_in, 3, 3)."""
    g = torch.linalg.pinv(_G).to(transformed.device)
    found = torch.einsum("ia,aboc,jb->ocij", g, transformed.double().unflatten(0, (4, 4)), g)
    return found.to(transformed.dtype).contiguous()


def pays(weight: Tensor, options: Mapping[str, Any], size: Sequence[int]) -> bool:
    """Whether a convolution is computed faster so, and its weights, 16/9 as many, do not make the model too large.

    Measured (AVX-512, one thread, half the channels): 0.52 to 0.73 of the direct time on maps of 14×14 and larger, as
    much on 8×8, more on 7×7, where the weights take longer to fetch than to multiply by. With many channels on small
    maps little time is won for much memory: in all its layers, the peak of ResNet-50 would exceed the dense model's.

    Args:
        weight: (C_out, C_in/groups, kh, kw). options: stride, padding, dilation and groups.
        size: (H', W') of the output.
    """
    (rows, columns), (height, width) = weight.shape[:2], size
    tiles = -(-height // 2) * -(-width // 2)
    return (
        tuple(weight.shape[2:]) == (3, 3)
        and options["groups"] == 1
        and tuple(options["stride"]) == tuple(options["dilation"]) == (1, 1)
        and min(rows, columns) >= 16
        and tiles >= 32
        and 16 * rows * columns <= 1.5 * height * width * (rows + columns)
    )
