"""Training samples: sizes, units, and the same sample for the same seed, epoch and index."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gatedprune.examples.kitti.augment import AUGMENTATIONS
from gatedprune.examples.kitti.datasets import DepthDataset, EpochSampler, network_input
from gatedprune.examples.kitti.layouts import find_frames, load_frame
from gatedprune.examples.kitti.synthetic import SyntheticSample


@pytest.fixture(scope="module")
def frames(sample: SyntheticSample) -> list:
    return find_frames(sample.root, split=sample.train)


def test_the_papers_sizes_are_the_default(frames: list) -> None:
    image, depth = DepthDataset(frames)[0]
    assert image.shape == (3, 224, 320) and depth.shape == (1, 224, 320)
    assert image.dtype == depth.dtype == torch.float32
    assert 0 <= image.min() < 0.2 and 0.8 < image.max() <= 1


def test_no_depth_is_invented_and_the_nearest_stays(frames: list) -> None:
    _, depth = DepthDataset(frames, image_size=(96, 320), input_size=(96, 320))[0]
    original = load_frame(frames[0])[1]
    assert set(np.unique(depth.numpy())) <= set(np.unique(original))
    assert depth[depth > 0].min().item() == original[original > 0].min()
    assert (depth > 0).float().mean() > 0.2  # each cell takes what falls into it: far denser than the scan


def test_a_sample_depends_on_seed_epoch_and_index_alone(frames: list) -> None:
    def make(seed: int, epoch: int, cache: bool = False) -> DepthDataset:
        dataset = DepthDataset(
            frames, image_size=(48, 96), input_size=(32, 64), augmentation=AUGMENTATIONS["paper"],
            seed=seed, cache=cache,
        )  # fmt: skip
        dataset.epoch = epoch
        return dataset

    first = make(1, 2)
    expected = first[3]
    first[0], first[1]
    for again in (first[3], make(1, 2, cache=True)[3]):
        torch.testing.assert_close(again, expected, rtol=0, atol=0)
    cached = make(1, 2, cache=True)
    cached[3]
    torch.testing.assert_close(cached[3], expected, rtol=0, atol=0)
    for other in (make(2, 2)[3], make(1, 3)[3], make(1, 2)[2]):
        assert not torch.equal(other[0], expected[0])


def test_the_order_is_a_permutation_that_can_be_entered_anywhere() -> None:
    order = list(EpochSampler(20, seed=3, epoch=1))
    assert sorted(order) == list(range(20)) and order != list(range(20))
    assert list(EpochSampler(20, seed=3, epoch=1, start=8)) == order[8:]
    assert len(EpochSampler(20, seed=3, epoch=1, start=8)) == 12
    assert list(EpochSampler(20, seed=3, epoch=2)) != order


def test_evaluation_resizes_as_training_does(frames: list) -> None:
    image = load_frame(frames[0])[0]
    sizes = (48, 96), (32, 64)
    expected = DepthDataset(frames, image_size=sizes[0], input_size=sizes[1])[0][0]
    torch.testing.assert_close(network_input(image, *sizes)[0], expected)
