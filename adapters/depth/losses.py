"""Training losses for depth in metres."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedprune.errors import DataError

__all__ = ["berhu"]


def berhu(prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, share: float = 0.2) -> Tensor:
    """Return the reverse Huber loss of equation 3 of the depth-pruning paper (after Laina et al., 2016).

    An error e costs |e| up to the threshold c, and (e² + c²) / 2c beyond it. c is `share` times the largest
    absolute error among the valid pixels of this batch; it is recomputed at every call and carries no
    gradient.

    Args:
        prediction: predicted depth in metres, (B, 1, H, W) or any other shape.
        target: ground truth in metres, the same shape; a pixel of 0 has no ground truth.
        mask: boolean, the same shape: the valid pixels. Default: where `target` is positive.
        share: c as a share of the largest error (0.2 in the paper).

    Returns:
        The mean over the valid pixels, a scalar.

    Raises:
        DataError: the shapes differ, or no pixel is valid.
    """
    if prediction.shape != target.shape:
        raise DataError(
            f"berhu() compares maps of one shape. Got prediction {tuple(prediction.shape)} and target "
            f"{tuple(target.shape)}: resize one to the other first."
        )
    mask = target > 0 if mask is None else mask
    error = (prediction - target)[mask].abs()
    if error.numel() == 0:
        raise DataError(
            "berhu() got a batch without a single valid ground-truth pixel: check the depth maps and the mask."
        )
    threshold = share * error.detach().max()
    # At a perfect fit the threshold is 0 and its branch is never taken; the clamp keeps 0/0 out of the
    # gradient.
    quadratic = (error.square() + threshold.square()) / (2 * threshold.clamp_min(torch.finfo(error.dtype).tiny))
    return torch.where(error <= threshold, error, quadratic).mean()
