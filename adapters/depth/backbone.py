"""Feature maps from any timm backbone, with its weights from the hub, from a file, or fresh."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gatedprune.errors import CheckpointError, ModelError

__all__ = ["build_backbone", "feature_layout", "is_channels_last"]

UNLIKELY_SEED = 0x9E3779B97F4A7C15  # nobody's weights were drawn with it: a coincidence would look like a gap


def build_backbone(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the timm model `name` as a feature extractor (`features_only=True`: no pool, no classifier).

    Args:
        name: a timm model name, with or without a pretrained tag.
        pretrained: fetch timm's weights from the Hugging Face hub.
        weights: a local checkpoint of the *classification* model (.pth, .safetensors, .npz), instead of the
            hub.
        options: further keywords of `timm.create_model`, e.g. `{"img_size": (224, 320)}` for a fixed-size
            model.

    Raises:
        ModelError: timm has no such model, or it cannot give feature maps.
        CheckpointError: the weights cannot be had, or belong to another architecture.
    """
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "see timm.list_models()"
        raise ModelError(f"timm has no model named {name!r}. Similar names: {close}.")
    keywords = {"features_only": True, **(options or {})}
    if weights is not None:
        return _load_from_file(name, os.fspath(weights), keywords)
    if not pretrained:
        return _create(name, keywords)
    try:
        return timm.create_model(name, pretrained=True, **keywords)
    except Exception as error:
        _create(name, keywords)  # raises ModelError where the model itself is the problem, not its weights
        raise CheckpointError(
            f"The pretrained weights of {name!r} cannot be had from the hub ({_first_line(error)}). "
            "Check the connection, or give a local checkpoint (weights=FILE, on the command line --weights "
            "FILE), "
            "or start from random weights (pretrained=False, on the command line --no-pretrained)."
        ) from error


def _create(name: str, keywords: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, **keywords)
    except Exception as error:
        raise ModelError(
            f"timm cannot build {name!r} as a feature extractor (features_only=True): {_first_line(error)}. "
            "Choose a backbone that gives feature maps."
        ) from error


def _load_from_file(name: str, path: str, keywords: Mapping[str, Any]) -> nn.Module:
    if not os.path.isfile(path):
        raise CheckpointError(f"The weights file {path} does not exist. Give the path of a checkpoint of {name!r}.")
    overlay: dict[str, Any] = {"file": path}
    if not path.endswith(".npz"):
        overlay["custom_load"] = False
    # timm loads feature extractors non-strictly: a file of another architecture would be accepted in silence.
    # Weights that still equal the same seed's fresh ones were not in the file.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNLIKELY_SEED)
        fresh = _create(name, keywords)
        torch.manual_seed(UNLIKELY_SEED)
        try:
            loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **keywords)
        except Exception as error:
            raise CheckpointError(
                f"{path} is not a checkpoint of {name!r}: {_first_line(error)}. Give a file saved from that timm model."
            ) from error
    untouched = [key for key, value in fresh.named_parameters() if _same_random(value, loaded.get_parameter(key))]
    if untouched:
        raise CheckpointError(
            f"{path} is not a checkpoint of {name!r}: it holds no values for {len(untouched)} of its weights "
            f"({', '.join(untouched[:3])}, ...). Give a file saved from that timm model."
        )
    return loaded


def _same_random(fresh: Tensor, loaded: Tensor) -> bool:
    constant = fresh.numel() < 2 or bool((fresh == fresh.flatten()[0]).all())
    return not constant and torch.equal(fresh, loaded)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def feature_layout(backbone: nn.Module) -> tuple[list[int], list[int]]:
    """Return the channels and the reductions (strides) of the backbone's feature maps, finest first.

    Raises:
        ModelError: the backbone does not tell (it has no `feature_info` in timm's sense).
    """
    info: Any = getattr(backbone, "feature_info", None)
    if not (callable(getattr(info, "channels", None)) and callable(getattr(info, "reduction", None))):
        raise ModelError(
            f"The backbone {type(backbone).__name__} has no feature_info with channels() and reduction(). "
            "Build it with timm.create_model(name, features_only=True)."
        )
    return list(info.channels()), list(info.reduction())


def is_channels_last(backbone: nn.Module) -> bool:
    """Whether the backbone's maps are (B, H, W, C), as some transformers' are, and not (B, C, H, W).

    This is asked of the backbone, and not read off the maps: their channels become fewer when it is pruned.
    """
    return str(getattr(getattr(backbone, "output_fmt", None), "value", "NCHW")) == "NHWC"
