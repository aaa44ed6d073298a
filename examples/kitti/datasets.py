"""Frames as training samples: resized, augmented, and the same for the same seed, epoch and index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .augment import Augmentation
from .layouts import Frame, load_frame
from .velodyne import resize_sparse

__all__ = ["PAPER_IMAGE_SIZE", "PAPER_INPUT_SIZE", "DepthDataset", "EpochSampler", "network_input"]

PAPER_IMAGE_SIZE = (480, 640)
"""Height and width to which the paper resizes KITTI's images."""
PAPER_INPUT_SIZE = (224, 320)
"""Height and width of the paper's output, and so of the network's input (see docs/kitti.md)."""


SHUFFLE = 2**32 - 1  # an index that no sample has: keeps the order's random numbers apart from the samples'


class DepthDataset(Dataset):
    """Training samples from frames: (image, depth), float32 (3, H, W) RGB in [0, 1] and (1, H, W) in metres.

    Args:
        frames: from `find_frames`.
        image_size: height and width to which a frame is resized, and at which it is augmented.
        input_size: height and width of the samples.
        augmentation: None gives the frames as they are.
        seed: of the augmentation. A sample depends on the seed, the epoch and its index, and on nothing else:
            neither on the number of workers, nor on what was drawn before. That is what makes resuming exact.
        cache: keep the resized frames in memory (2.1 MB each at 640x480).
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        *,
        image_size: tuple[int, int] = PAPER_IMAGE_SIZE,
        input_size: tuple[int, int] = PAPER_INPUT_SIZE,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache: bool = False,
    ) -> None:
        self.frames = list(frames)
        self.image_size, self.input_size = image_size, input_size
        self.augmentation, self.seed = augmentation, seed
        self.epoch = 0
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, depth = self._resized(index)
        image = image.astype(np.float32) / 255
        if self.augmentation is not None:
            random = np.random.default_rng((self.seed, self.epoch, index))
            image, depth = self.augmentation(image, depth, random)
        image = resize_image(image, self.input_size)
        depth = resize_sparse(depth, self.input_size)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(depth)[None].contiguous()

    def _resized(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        image, depth = load_frame(self.frames[index])
        resized = resize_image(image, self.image_size), resize_sparse(depth, self.image_size)
        if self._cache is not None:
            self._cache[index] = resized
        return resized


class EpochSampler(Sampler):
    """A permutation of the samples for each (seed, epoch), from which training can start anywhere."""

    def __init__(self, length: int, *, seed: int = 0, epoch: int = 0, start: int = 0) -> None:
        self.length, self.seed, self.epoch, self.start = length, seed, epoch, start

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch, SHUFFLE)).permutation(self.length)
        return iter(order[self.start :].tolist())

    def __len__(self) -> int:
        return self.length - self.start


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, 3) to height and width `size`: area averages when it shrinks, else bilinear."""
    if image.shape[:2] == tuple(size):
        return image
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def network_input(image: np.ndarray, image_size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    """Return an RGB uint8 image (H, W, 3) as the network's input (1, 3, h, w), resized as in training."""
    resized = resize_image(resize_image(image, image_size).astype(np.float32) / 255, input_size)
    return torch.from_numpy(resized).permute(2, 0, 1)[None].contiguous()
