"""The paper's augmentation (section 2.2): geometry on image and depth alike, colour on the image only."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["AUGMENTATIONS", "Augmentation"]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Augmentation:
    """Random flip, rotation, zoom and colour; the defaults are the paper's.

    Calling it maps an image, RGB float32 (H, W, 3) in [0, 1], and its depth in metres, float32 (H, W) with 0
    for no value, to a pair of the same sizes. All randomness comes from the generator it is given.
    """

    flip: float = 0.6
    """Probability of mirroring."""
    rotation: float = 15.0
    """Largest angle in degrees, either way."""
    scale: tuple[float, float] = (1.0, 2.0)
    """Range of the zoom. What is seen s times as large is s times as near: depth is divided by s."""
    jitter: float = 0.5
    """Brightness, contrast and saturation are each multiplied by a factor in [1 - jitter, 1 + jitter]."""
    rgb: tuple[float, float] = (0.7, 1.2)
    """Range of the factor of each colour channel."""

    def __call__(
        self, image: np.ndarray, depth: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        flip = random.random() < self.flip
        angle = random.uniform(-self.rotation, self.rotation)
        image, depth = transform(image, depth, flip=flip, angle=angle, scale=random.uniform(*self.scale))
        brightness, contrast, saturation = random.uniform(1 - self.jitter, 1 + self.jitter, 3).astype(np.float32)
        image = image * brightness
        image = _blend(image, np.float32((image @ LUMA).mean()), contrast)
        image = _blend(image, (image @ LUMA)[..., None], saturation)
        image = image * random.uniform(*self.rgb, 3).astype(np.float32)
        return np.clip(image, 0, 1), depth


def transform(
    image: np.ndarray, depth: np.ndarray, *, flip: bool, angle: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror, then rotate by `angle` degrees and zoom by `scale` about the centre; sizes stay.

    The image is interpolated and reflected at the border. Depth takes the nearest value, has none beyond the
    border, and is divided by `scale`.
    """
    if flip:
        image, depth = image[:, ::-1], depth[:, ::-1]
    height, width = depth.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    image = cv2.warpAffine(
        np.ascontiguousarray(image),
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    depth = cv2.warpAffine(np.ascontiguousarray(depth), matrix, (width, height), flags=cv2.INTER_NEAREST)
    return image, depth / np.float32(scale)


def _blend(image: np.ndarray, other: np.ndarray | np.float32, amount: np.float32) -> np.ndarray:
    return other + amount * (image - other)


AUGMENTATIONS: dict[str, Augmentation | None] = {
    "paper": Augmentation(),
    "mild": Augmentation(flip=0.5, rotation=2.0, scale=(1.0, 1.2), jitter=0.2, rgb=(0.9, 1.1)),
    "none": None,
}
"""By name. "mild" is for short training on few frames, where the paper's is more than can be learnt."""
