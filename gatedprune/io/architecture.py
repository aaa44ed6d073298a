"""Which call of `timm.create_model` builds a model again, checked by building its structure on the meta device."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..inside import cut_again
from ..wrapping import GATES, GatedModel

__all__ = ["architecture_of", "build", "timm_name"]

# What a module may differ in and still compute the same in eval mode, and what the environment sets.
_IDLE = ("drop", "training", "grad_checkpointing", "fused_attn")


def architecture_of(gated: GatedModel, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The class, and where timm builds the same model again, its name there and the arguments."""
    base = gated._gatedprune_base
    found: dict[str, Any] = {"class": f"{base.__module__}.{base.__qualname__}", "timm": None, "args": None}
    name = timm_name(gated)
    if name is None:
        if model_args is not None:
            raise ConfigError(f"`model_args` are for timm's own models. {base.__name__} is none: leave them out.")
        return found
    wanted = _signature(gated)
    if model_args is not None:
        try:
            args = json.loads(json.dumps(dict(model_args)))
        except TypeError as error:
            raise ConfigError(f"The `model_args` of save() must be JSON values: {error}.") from error
        difference = _difference(gated, wanted, name, args)
        if difference:
            raise ConfigError(f"timm.create_model({name!r}, **model_args) does not build this model: {difference}.")
        return {**found, "timm": name, "args": args}
    for args in ({}, _guess(gated)):
        difference = _difference(gated, wanted, name, args)
        if not difference:
            return {**found, "timm": name, "args": args}
    if base.__module__.split(".")[0] == "timm":
        warnings.warn(
            f"The arguments that this {name!r} was created with could not be found out ({difference}): load() will "
            "need the model. Give save() the arguments as model_args=dict(...) to have it built again.",
            stacklevel=4,
        )
    return found


def timm_name(model: nn.Module) -> str | None:
    """``architecture.tag`` of a timm model, without the tag where timm does not know it."""
    cfg = getattr(model, "pretrained_cfg", None)
    name, tag = (cfg.get("architecture"), cfg.get("tag")) if isinstance(cfg, dict) else (None, None)
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    return f"{name}.{tag}" if tag and timm.models.is_model_pretrained(f"{name}.{tag}") else name


def _guess(model: nn.Module) -> dict[str, Any]:
    """The arguments of timm.create_model that leave traces in the model."""
    out: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        out["num_classes"] = model.num_classes
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.in_channels != 3:
        out["in_chans"] = first.in_channels
    pool = getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if isinstance(pool, str):
        out["global_pool"] = pool
    info = getattr(model, "feature_info", None)
    if getattr(info, "out_indices", None) and "feature" in type(model).__name__.lower():
        out = {k: v for k, v in out.items() if k == "in_chans"}
        out.update(features_only=True, out_indices=list(info.out_indices))  # type: ignore[union-attr]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, (tuple, list)):
        out["img_size"] = list(size)
    return out


def build(name: str, args: Mapping[str, Any], device: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model: nn.Module = timm.create_model(name, pretrained=False, **args)
    return model.eval()


def _difference(gated: GatedModel, wanted: dict[str, Any], name: str, args: Mapping[str, Any]) -> str:
    """How the model that timm builds differs from the gated one, whose signature is ``wanted``; "" where it does not.

    Of a model that `prune_dead` made smaller, the same channels are removed before the two are compared.
    """
    built: nn.Module | None = None
    for device in ("meta", "cpu"):  # some constructors read values, which the meta device does not have
        try:
            built = build(name, args, device)
            if gated._gatedprune_pruned:
                inputs = tuple(a.to(device) if isinstance(a, Tensor) else a for a in _zeros(gated))
                cut_again(built, gated._gatedprune_pruned, inputs, gated.gate_config.stream)
            break
        except Exception as error:  # noqa: BLE001 (any constructor of timm's, any arguments)
            reason = f"{type(error).__name__}: {error}"
    if built is None:
        return reason
    found = _signature(built)
    for path in {**wanted, **found}:
        if wanted.get(path) != found.get(path):
            return f"{path} differs"
    return ""


def _zeros(gated: GatedModel) -> tuple[Any, ...]:
    """What the model was wrapped for, in the type that a fresh model has."""
    return tuple(
        torch.zeros(a.shape, dtype=torch.float32 if a.is_floating_point() else a.dtype) if isinstance(a, Tensor) else a
        for a in gated._gatedprune_inputs
    )


def _signature(model: nn.Module) -> dict[str, Any]:
    """What decides a model's numbers in eval mode, but for its weights: classes, plain attributes, shapes."""
    out: dict[str, Any] = {}
    for path, module in _own_modules(model):
        kind = module._gatedprune_base if isinstance(module, GatedModel) else type(module)
        if "drop" in kind.__name__.lower() or kind is nn.Identity:
            continue
        out[path or "the model"] = kind, {
            k: _plain(v) for k, v in vars(module).items()
            if not k.startswith("_") and not any(idle in k for idle in _IDLE) and _plain(v) is not None
        }  # fmt: skip
    for name, value in model.state_dict().items():
        if not name.startswith(GATES + "."):
            out[name] = tuple(value.shape)
    return out


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        if path.split(".")[0] != GATES:
            yield path, module


def _plain(value: Any) -> Any:
    """Numbers, strings, and tuples of them; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v) for v in value)
    return None
