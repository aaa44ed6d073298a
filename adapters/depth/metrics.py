"""Depth metrics: equations 9-12 of the depth-pruning paper, plus the squared relative and scale-invariant
errors.

Each metric takes the valid pixels of *one image* as flat tensors in metres. A data set's number is the mean
over its images (`MetricAverage`), so an image with few ground-truth pixels counts as much as one with many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gatedprune.errors import DataError

__all__ = ["METRICS", "MetricAverage", "depth_metrics"]


def rms(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean squared error in metres (equation 9)."""
    return (prediction - target).square().mean().sqrt()


def rel(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of |error| / ground truth (equation 10)."""
    return ((prediction - target).abs() / target).mean()


def sq_rel(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of error² / ground truth, in metres."""
    return ((prediction - target).square() / target).mean()


def rms_log(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean squared error of the natural logarithms (equation 11).

    The equation is printed with log10; the numbers it is compared with in the literature (0.282 for Eigen et
    al. and so on) are natural logarithms, and so is this. Divide by ln 10 = 2.3026 for the printed form.
    """
    return (prediction.log() - target.log()).square().mean().sqrt()


def silog(prediction: Tensor, target: Tensor) -> Tensor:
    """KITTI's scale-invariant logarithmic error: 100 times the standard deviation of the log ratio."""
    return 100 * (prediction.log() - target.log()).std(correction=0)


def delta(prediction: Tensor, target: Tensor, power: int) -> Tensor:
    """Share of the pixels whose ratio max(p/t, t/p) stays under 1.25^power (equation 12)."""
    ratio = torch.maximum(prediction / target, target / prediction)
    return (ratio < 1.25**power).to(prediction.dtype).mean()


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms": rms,
    "rel": rel,
    "rms_log": rms_log,
    "sq_rel": sq_rel,
    "silog": silog,
    "delta1": lambda prediction, target: delta(prediction, target, 1),
    "delta2": lambda prediction, target: delta(prediction, target, 2),
    "delta3": lambda prediction, target: delta(prediction, target, 3),
}
"""Metric name -> function of (prediction, target), both flat and in metres."""


def depth_metrics(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Compute every metric of one image.

    Args:
        prediction: positive depth in metres, any shape, e.g. (H, W).
        target: ground truth in metres, the same shape.
        mask: boolean, the same shape: the pixels that count. Default: where `target` is positive.

    Returns:
        Metric name -> value, in the order of `METRICS`. Computed in float64.

    Raises:
        DataError: shapes differ, no pixel counts, a depth that counts is not positive and finite.
    """
    if prediction.shape != target.shape:
        raise DataError(
            f"depth_metrics() compares maps of one shape. Got prediction {tuple(prediction.shape)} and "
            "target "
            f"{tuple(target.shape)}: resize the prediction to the ground truth's size first."
        )
    mask = target > 0 if mask is None else mask
    prediction, target = prediction[mask].double(), target[mask].double()
    if target.numel() == 0:
        raise DataError("depth_metrics() got an image without a valid ground-truth pixel: leave it out and count it.")
    for name, depth in (("prediction", prediction), ("target", target)):
        if not bool((torch.isfinite(depth) & (depth > 0)).all()):
            raise DataError(
                f"The {name} of depth_metrics() must be positive and finite at every pixel that counts. "
                f"Got values from {depth.min().item():g} to {depth.max().item():g}: clamp or mask it first."
            )
    return {name: float(metric(prediction, target)) for name, metric in METRICS.items()}


class MetricAverage:
    """The mean of per-image metrics: every image weighs the same."""

    def __init__(self) -> None:
        self.count = 0
        self._sums = dict.fromkeys(METRICS, 0.0)

    def add(self, metrics: dict[str, float]) -> None:
        """Add the metrics of one image, as returned by `depth_metrics`."""
        self.count += 1
        for name in self._sums:
            self._sums[name] += metrics[name]

    def result(self) -> dict[str, float]:
        """Return metric name -> mean over the images added so far.

        Raises:
            DataError: no image was added.
        """
        if self.count == 0:
            raise DataError("There is no image to average over: none had a valid ground-truth pixel.")
        return {name: total / self.count for name, total in self._sums.items()}
