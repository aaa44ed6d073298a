"""Checkpoints: a model with what is needed to rebuild it, and the whole state of a training run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import gatedprune
from gatedprune.adapters.depth import DepthModel
from gatedprune.errors import CheckpointError, GatedPruneError
from gatedprune.files import atomic_write, read_metadata, read_tensors, write_tensors

from .datasets import PAPER_IMAGE_SIZE, PAPER_INPUT_SIZE

__all__ = ["ModelSpec", "load_model", "load_state", "read_spec", "save_model", "save_state"]

SPEC_KEY = "gatedprune.kitti.model"
FORMAT = 1


@dataclass(frozen=True)
class ModelSpec:
    """What a depth model is made of, apart from its weights. Travels in every checkpoint as JSON."""

    backbone: str = "resnet50"
    decoder_channels: int | tuple[int, ...] = 256
    min_depth: float = 1.0
    max_depth: float = 80.0
    image_size: tuple[int, int] = PAPER_IMAGE_SIZE
    """Height and width to which images are resized first."""
    input_size: tuple[int, int] = PAPER_INPUT_SIZE
    """Height and width of the network's input and output."""
    gates: Mapping[str, Any] | None = None
    """The gates' configuration (`GateConfig.to_dict`), None for a dense model."""

    def build(self, *, pretrained: bool = False, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        """Build the model, gated where the spec says so; the arguments are those of `DepthModel`."""
        model = DepthModel(
            self.backbone,
            pretrained=pretrained,
            weights=weights,
            decoder_channels=self.decoder_channels,
            min_depth=self.min_depth,
            max_depth=self.max_depth,
        )
        if self.gates is None:
            return model
        config = gatedprune.GateConfig.from_dict(self.gates)
        return gatedprune.wrap(model, config=config, example_inputs=self.example())

    def example(self, batch: int = 1) -> torch.Tensor:
        """Return an input of the right shape, (batch, 3, H, W)."""
        return torch.rand(batch, 3, *self.input_size, generator=torch.Generator().manual_seed(0))

    def to_json(self) -> str:
        """Return the spec as JSON; `from_json` reads it back."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        values.pop("format")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    def differences(self, other: ModelSpec) -> list[str]:
        """Name the fields in which two models differ in their weights' shapes, as `field: mine, not
        theirs`.
        """
        fields = ("backbone", "decoder_channels", "gates")
        return [
            f"{field}: {getattr(self, field)}, not {getattr(other, field)}"
            for field in fields
            if getattr(self, field) != getattr(other, field)
        ]


def save_model(path: str | os.PathLike[str], model: nn.Module, spec: ModelSpec) -> None:
    """Write weights and spec as one safetensors file, atomically."""
    write_tensors(path, model.state_dict(), {SPEC_KEY: spec.to_json()})


def read_spec(path: str | os.PathLike[str], *, backbone: str | None = None) -> ModelSpec:
    """Read what model a checkpoint holds, without its weights.

    Args:
        path: a file written by `save_model`.
        backbone: refuse a checkpoint with another backbone.

    Raises:
        CheckpointError: no such file, not a checkpoint of this program, or another backbone.
    """
    try:
        text = read_metadata(path).get(SPEC_KEY)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Give a model.safetensors written by `train`.") from error
    try:
        spec = ModelSpec.from_json(text or "")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say which depth model it holds. Give a model.safetensors written by `train`; "
            "weights "
            "of a backbone alone go to --weights."
        ) from error
    if backbone is not None and backbone != spec.backbone:
        raise CheckpointError(
            f"The checkpoint {path} holds a depth model on {spec.backbone!r}, but {backbone!r} was asked "
            "for. "
            f"Leave out --backbone, or use a checkpoint of {backbone!r}."
        )
    return spec


def load_model(path: str | os.PathLike[str], *, backbone: str | None = None) -> tuple[nn.Module, ModelSpec]:
    """Rebuild the model that a checkpoint holds; see `read_spec` for the arguments and errors."""
    spec = read_spec(path, backbone=backbone)
    model = spec.build()
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise CheckpointError(
            f"The weights in {path} do not fit the {spec.backbone!r} depth model that it says it holds: "
            f"{error}. "
            "It was written by another version, or damaged."
        ) from error
    return model.eval(), spec


def save_state(path: str | os.PathLike[str], state: Mapping[str, Any], spec: ModelSpec) -> None:
    """Write the state of a training run (tensors, numbers, strings and containers of them), atomically."""
    atomic_write(path, lambda temporary: torch.save({"spec": spec.to_json(), **state}, temporary))


def load_state(path: str | os.PathLike[str], spec: ModelSpec) -> dict[str, Any]:
    """Read the state of a training run back; only plain data is unpickled (`weights_only`).

    Raises:
        CheckpointError: the file is damaged, or of a model other than `spec`.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = ModelSpec.from_json(state.pop("spec"))
    except GatedPruneError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The training state {path} cannot be read ({type(error).__name__}). Delete it to start again."
        ) from error
    if differences := saved.differences(spec):
        raise CheckpointError(
            f"The training state {path} is of another model ({'; '.join(differences)}). Resume with the "
            "options it "
            "was started with, or give another output folder."
        )
    return state
