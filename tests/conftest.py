"""What all tests share: seeds, the hypothesis profile, the folder of real data, poisoned memory."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from .exports import RememberedExports

ROOT = Path(__file__).resolve().parent.parent
TRACING = importlib.import_module("gatedprune.sites.capture")  # its package has a function of this name

# Shared machines stall now and then, and emulated ones are slow: a deadline, or a check of how long examples take to
# draw, would turn that into a failure that says nothing about the code.
settings.register_profile("gatedprune", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gatedprune")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' tensors are small: on a machine that does other work, a second thread makes them slower."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state, so that a failure comes back when it is run alone."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def exports() -> RememberedExports:
    """What this process has traced so far."""
    return RememberedExports(TRACING._exported)


@pytest.fixture(autouse=True)
def remembered_exports(exports: RememberedExports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are built alike are traced once; tests of tracing itself have another fixture of this name."""
    monkeypatch.setattr(TRACING, "_exported", exports)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; without it the test is skipped, naming the folder."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data: the folder ../shared/data (seen from the project's root) is missing")
    return folder


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN inside the test: memory nobody wrote cannot pass as zeros."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
    torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
