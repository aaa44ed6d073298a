"""A runner of commands, and a saved model that every command takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result

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
