"""Weights for a model: from a file, without unpickling anything but tensors, or timm's own from the hub."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import read_tensors

__all__ = ["load_weights", "pretrained"]

_SHOWN = 3  # keys named in an error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of the whole model; every key and every shape must fit. Returns the model.

    Args:
        model: Changed in place; on any error it stays as it is.
        path: A .safetensors file, or one of `torch.save` that holds tensors only: a state dict, or timm's checkpoint
            with one inside.

    Raises:
        CheckpointError: The file is missing, damaged, holds other things than tensors, or belongs to another model.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise CheckpointError(f"The weights {name} are not there, or are no file.")
    found = read_tensors(name) if name.endswith(".safetensors") else _unpickled(name)
    if isinstance(found, Mapping):
        # As timm does: a checkpoint of training, averaged weights first; wrappers' prefixes are taken off.
        inside = next((k for k in ("state_dict_ema", "model_ema", "state_dict", "model") if found.get(k)), None)
        found = found if inside is None else found[inside]
    if isinstance(found, Mapping) and all(isinstance(k, str) for k in found):
        found = clean_state_dict(dict(found))
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{name} holds no state dict: names and tensors.")
    difference = _difference(model.state_dict(), found)
    if difference:
        raise CheckpointError(f"{name} does not fit this {type(model).__name__}: {difference}.")
    model.load_state_dict(dict(found))
    return model


def _unpickled(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            return torch.load(name, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} is damaged, or holds more than tensors, which is not loaded because unpickling it could run any "
            "program. Save the state dict alone, as safetensors."
        ) from error
    # A zip archive cut off, an empty file: torch raises whatever comes.
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{name} cannot be read ({_first_line(error)}): it is cut off, or no checkpoint. Copy it again."
        ) from error


def pretrained(name: str, **options: Any) -> nn.Module:
    """`timm.create_model` with timm's weights, which are downloaded unless they were before; in eval mode.

    Raises:
        CheckpointError: There are none, or the hub cannot be reached.
    """
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # timm, the hub's client and its transport have each their own
        raise CheckpointError(
            f"The pretrained weights of {name} cannot be had from the Hugging Face hub ({_first_line(error)}). "
            "Check the connection; without network, give a file of weights."
        ) from error
    return model.eval()


def _difference(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting; "" where it fits."""
    parts = []
    for what, keys in (
        ("lacks", [k for k in own if k not in found]),
        ("has unknown", [k for k in found if k not in own]),
    ):
        if keys:
            parts.append(f"it {what} {_listed(keys)}")
    wrong = [k for k in own if k in found and own[k].shape != found[k].shape]
    if wrong:
        k = wrong[0]
        parts.append(f"the shape of {_listed(wrong)} differs ({k}: {tuple(found[k].shape)} in the file, "
                     f"{tuple(own[k].shape)} in the model; a head of other classes needs their number)")  # fmt: skip
    return "; ".join(parts)


def _listed(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
