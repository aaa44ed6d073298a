"""Winograd's minimal filtering: convolutions with fewer products, 16 for 36 by F(2×2, 3×3).

Source: Lavin and Gray 2016, arXiv:1509.09308, section 4.1. Every channel is transformed by itself, so that choosing
channels commutes with it: the kernels transform the weights that win, in each run (`native/src/winograd.inl`). A 7×7
kernel of stride 2, with which many networks begin, consists of nine smaller ones of stride 1 on every other row and
column of the input, with 100 products for 196 (`native/src/phases.inl`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["pays"]


def pays(weight: Tensor, options: Mapping[str, Any], size: Sequence[int]) -> bool:
    """Whether a convolution is computed faster so.

    Measured (AVX-512, one thread, half the channels): 3×3 takes 0.54 to 0.65 of the direct time on maps of 14×14 and
    larger, 0.8 on 8×8 and 0.93 on 7×7, where transforming the weights takes what the products save. 7×7 of stride 2
    takes 0.65 to 0.8 with 3 to 64 channels, and wins nothing with one channel or on outputs of 16×16.

    Args:
        weight: (C_out, C_in/groups, kh, kw). options: stride, padding, dilation and groups.
        size: (H', W') of the output.
    """
    (rows, columns), (height, width) = weight.shape[:2], size
    tiles = -(-height // 2) * -(-width // 2)
    if options["groups"] != 1 or tuple(options["dilation"]) != (1, 1) or rows < 16:
        return False
    match tuple(weight.shape[2:]), tuple(options["stride"]):
        case (3, 3), (1, 1):
            return columns >= 16 and tiles >= 32
        case (7, 7), (2, 2):
            return 2 <= columns <= 64 and tiles >= 512
    return False
