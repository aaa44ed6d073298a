"""A runner of commands, and a saved model that every command takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image

import gatedprune
from gatedprune.cli import main

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """``run("inspect", "resnet18")``, in this process."""
    return lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = timm.create_model("test_resnet")
    gated = gatedprune.wrap(small, 0.25, example_inputs=torch.zeros(1, 3, 64, 64))
    return gatedprune.save(gated, tmp_path_factory.mktemp("cli") / "my_model")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images in folders a, b and c: noise of different colours, coarseness and contrast."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in "abc":
        (folder / name).mkdir()
        for i in range(4):
            small = random.normal(random.uniform(60, 200, 3), 12 + 15 * i, (6 + 4 * i, 8, 3))
            pixels = np.clip(small, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((48, 40)).save(folder / name / f"{i}.png")
    return folder
