"""A tiny synthetic sample in KITTI's raw layout, and a tiny trained-for-nothing model, shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gatedprune.examples.kitti.checkpoint import ModelSpec, save_model
from gatedprune.examples.kitti.synthetic import SyntheticSample, write_sample

TINY_SIZE = (32, 96)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SyntheticSample:
    """Two training streets and one test street of two frames each."""
    return write_sample(tmp_path_factory.mktemp("streets"), train_streets=2, test_streets=1, frames=2, progress=False)


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    """Of a model that is small enough to train in a test."""
    return ModelSpec("test_resnet", decoder_channels=16, image_size=TINY_SIZE, input_size=TINY_SIZE)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec) -> Path:
    """A dense model's checkpoint, untrained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_model(path, spec.build(), spec)
    return path
