"""The state of a training on the disk: written whole or not at all, read without unpickling anything but tensors."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import atomic_write

__all__ = ["read_state", "write_state"]

FORMAT = 2
KEYS = ("config", "classes", "samples", "kept", "rates", "model", "ema", "optimizer", "scaler", "epoch", "step", "loss",
        "log")  # fmt: skip


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, and lists and dictionaries of them, atomically.

    Raises:
        OSError: The file cannot be written. What stood there before still does.
    """
    atomic_write(path, lambda temporary: torch.save({"format": FORMAT, **state}, temporary))


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU.

    Raises:
        CheckpointError: The file is damaged, or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"The training state {path} cannot be read ({type(error).__name__}): it is damaged, or no state. Start "
            "anew in another output folder."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or any(key not in state for key in KEYS):
        raise CheckpointError(f"{path} is no training state of this gatedprune: start anew in another output folder.")
    return state


def sweep(path: Path) -> None:
    """Remove what a killed process left of a state that it was writing."""
    for rest in path.parent.glob(f".{path.name}.*"):
        if rest.is_file():
            os.unlink(rest)
