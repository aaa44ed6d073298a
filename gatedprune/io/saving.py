"""`save`: a folder that is written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .._version import __version__
from ..errors import CheckpointError, ModelError
from ..files import atomic_folder, write_tensors
from ..wrapping import GatedModel
from .architecture import architecture_of

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "digest", "save", "sites_of"]

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "gatedprune.json"


def save(gated: nn.Module, directory: str | os.PathLike[str], *, model_args: Mapping[str, Any] | None = None) -> Path:
    """Write a gated model as a folder: ``model.safetensors`` and ``gatedprune.json``.

    The folder is there whole or not at all: an interrupted save leaves the one that was there. Other files in it stay.

    Args:
        gated: What `gatedprune.wrap` returned, on any device.
        directory: The folder; made or replaced.
        model_args: What the timm model was created with beside its name (``dict(num_classes=10)``), as JSON values.
            Default: found out, and checked by building the model's structure again. What acts in training only
            (dropout, stochastic depth) is kept only if it is named here.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder cannot be written.
        ConfigError: ``model_args`` are no JSON values, or do not build this model.
        ModelError: The model is not gated.

    Warns:
        A timm model that neither its name nor the arguments found out build again: `load` then needs the model.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(f"save() takes a model that gatedprune.wrap() returned. {type(gated).__name__} is not gated.")
    state = gated.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise ModelError(f"save() stores tensors only. In the state dict, {', '.join(odd[:3])} is none.")
    described = _describe(gated, model_args)

    def write(folder: Path) -> None:
        write_tensors(folder / WEIGHTS, state, {"format": "pt"})
        described["weights"] = {"file": WEIGHTS, "sha256": digest(folder / WEIGHTS)}
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    try:
        atomic_folder(directory, write)
    except OSError as error:
        raise CheckpointError(
            f"The folder {os.fspath(directory)} cannot be written ({error}). Nothing was changed. Give a "
            "new folder, inside one that can be written to and has the room."
        ) from error
    return Path(directory)


def _describe(gated: GatedModel, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "architecture": architecture_of(gated, model_args),
        "gates": gated.gate_config.to_dict(),
        "sites": sites_of(gated),
        "pruned": {name: [count, list(kept)] for name, (count, kept) in gated._gatedprune_pruned.items()},
        "macs": gated.site_report.macs,
        "inputs": [
            {"shape": list(a.shape), "dtype": str(a.dtype).removeprefix("torch.")} if isinstance(a, Tensor) else None
            for a in gated._gatedprune_inputs
        ],
        "versions": {"gatedprune": __version__, "torch": torch.__version__, "timm": timm.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip


def sites_of(gated: GatedModel) -> list[dict[str, Any]]:
    return [
        {"name": name, "channels": gate.channels, "gate_sees": gate.in_channels, "active": gate.active_count}
        for name, gate in gated.gates.items()
    ]


def digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
