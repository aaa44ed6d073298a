"""Evaluation on frames at their own resolution, with the protocol named beside every number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from gatedprune.adapters.depth import MetricAverage, depth_metrics
from gatedprune.errors import ConfigError

from .datasets import network_input
from .layouts import Frame, ground_truth_source, load_frame

__all__ = ["CROPS", "Evaluation", "Protocol", "evaluate", "predict_depth"]

CROPS: dict[str, tuple[float, float, float, float]] = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "none": (0.0, 1.0, 0.0, 1.0),
}
"""Crop -> first and last row, first and last column, as shares of the image (Garg et al. 2016, Eigen et al.
2014).
"""


@dataclass(frozen=True)
class Protocol:
    """What is compared with what. Numbers of different protocols must not stand in one table.

    Args:
        crop: "garg", "eigen" or "none".
        cap: ground truth beyond this many metres is left out, and predictions are limited to it.
        floor: likewise for ground truth nearer than this.
    """

    crop: str = "garg"
    cap: float = 80.0
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ConfigError(f"The crop must be one of {', '.join(CROPS)}. Got {self.crop!r}.")
        if not 0 < self.floor < self.cap:
            raise ConfigError(f"The cap must be more than {self.floor} metres. Got {self.cap}.")

    def mask(self, depth: np.ndarray) -> np.ndarray:
        """Return which pixels of a ground-truth map (H, W) count."""
        height, width = depth.shape
        top, bottom, left, right = CROPS[self.crop]
        inside = np.zeros_like(depth, bool)
        inside[int(top * height) : int(bottom * height), int(left * width) : int(right * width)] = True
        return inside & (depth > self.floor) & (depth <= self.cap)


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and everything that must be said with them."""

    metrics: dict[str, float]
    images: int
    without_ground_truth: int
    """Images left out because no pixel of theirs counts."""
    source: str
    resolution: str
    protocol: Protocol

    def describe(self) -> str:
        """Return the protocol in words."""
        left_out = f", {self.without_ground_truth} more left out (no valid pixel)" if self.without_ground_truth else ""
        return (
            f"{self.images} images{left_out}; ground truth: {self.source}; crop: {self.protocol.crop}; "
            f"cap: {self.protocol.cap:g} m; compared at the ground truth's resolution ({self.resolution}), "
            "predictions "
            "resized bilinearly; no median scaling, no flip averaging; metrics per image, then averaged"
        )

    def __str__(self) -> str:
        names = "  ".join(f"{name:>8}" for name in self.metrics)
        values = "  ".join(f"{value:8.3f}" for value in self.metrics.values())
        return f"{names}\n{values}\nProtocol: {self.describe()}."


def predict_depth(
    model: nn.Module,
    image: np.ndarray,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Predict the depth of an RGB uint8 image (H, W, 3): float32 (H, W) in metres, at the image's own
    size.
    """
    with torch.inference_mode():
        depth = model(network_input(image, image_size, input_size).to(device))
        return F.interpolate(depth, size=image.shape[:2], mode="bilinear", align_corners=False)[0, 0].cpu().numpy()


def evaluate(
    model: nn.Module,
    frames: Sequence[Frame],
    *,
    image_size: tuple[int, int],
    input_size: tuple[int, int],
    protocol: Protocol | None = None,
    device: torch.device | str = "cpu",
    label: str = "evaluating",
    progress: bool = True,
    see: Callable[[int, np.ndarray, np.ndarray, np.ndarray], object] | None = None,
) -> Evaluation:
    """Evaluate a model, one image at a time. The model is switched to evaluation and stays so.

    Args:
        model: maps (1, 3, h, w) to metres (1, 1, h, w).
        frames: what to evaluate on.
        image_size, input_size: as in training.
        protocol: default: Garg crop, 80 m.
        device: where the model is.
        see: called with index, image, ground truth and prediction of every frame, e.g. to keep some for a
            picture.

    Raises:
        DataError: a file is damaged, or no frame has a pixel that counts.
    """
    protocol = protocol or Protocol()
    model.eval()
    average, empty, sizes = MetricAverage(), 0, set()
    for index, frame in enumerate(tqdm(frames, desc=label, unit="frame", disable=not progress)):
        image, truth = load_frame(frame)
        prediction = predict_depth(model, image, image_size, input_size, device)
        if see is not None:
            see(index, image, truth, prediction)
        mask = protocol.mask(truth)
        sizes.add(f"{truth.shape[1]}x{truth.shape[0]}")
        if not mask.any():
            empty += 1
            continue
        limited = np.clip(prediction, protocol.floor, protocol.cap)
        average.add(depth_metrics(*map(torch.from_numpy, (limited, truth, mask))))
    return Evaluation(
        average.result(),
        average.count,
        empty,
        ground_truth_source(frames),
        ", ".join(sorted(sizes)),
        protocol,
    )
