"""What the commands share: how MODEL is found, sizes and lists of numbers, options, errors, printing."""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

from ..errors import GatedPruneError
from ..io import is_saved, load
from ..sites import normalise_inputs
from ..wrapping import is_gated, unwrap

__all__ = ["Build", "Model", "Numbers", "Size", "dense", "explained", "image", "json_option", "model_argument",
           "printed", "size_option"]  # fmt: skip

Build = Callable[[str, "tuple[int, int] | None"], nn.Module]  # (device, size in pixels) → model in eval mode


class Size(click.ParamType):
    name = "HxW|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            self.fail(f"{value!r} is no size in pixels such as 192x640 (height x width) or 224", param, ctx)
        return int(parts[0]), int(parts[-1])


class Model(click.ParamType):
    """A function (device, size) → model, from a timm name, ``module:callable`` or a saved folder (then gated)."""

    name = "MODEL"

    def convert(self, value: Any, param: Any, ctx: Any) -> Build:
        if is_saved(value):
            return lambda device, size: load(value)
        if ":" in value:
            return self._imported(value, param, ctx)
        if value.split(".")[0] not in timm.list_models():
            near = difflib.get_close_matches(value, timm.list_models(), n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            self.fail(f"timm {timm.__version__} has no model {value!r}.{hint} "
                      "Name your own as module:callable, a saved one by its folder.", param, ctx)  # fmt: skip

        def build(device: str, size: tuple[int, int] | None) -> nn.Module:
            options: dict[str, Any] = {}
            if size is not None and timm.get_pretrained_cfg(value).fixed_input_size:
                options["img_size"] = size
            with torch.device(device):
                return timm.create_model(value, pretrained=False, **options).eval()

        return build

    def _imported(self, value: str, param: Any, ctx: Any) -> Build:
        module, _, name = value.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` has it: modules in the current folder count
        try:
            target = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError, ValueError) as error:
            self.fail(f"{value!r} cannot be imported: {error}", param, ctx)
        if not callable(target):
            self.fail(f"{value!r} is a {type(target).__name__}, not something that can be called", param, ctx)

        def build(device: str, size: tuple[int, int] | None) -> nn.Module:
            model = target()
            if not isinstance(model, nn.Module):
                raise click.ClickException(f"{value}() returns a {type(model).__name__}, not a torch.nn.Module.")
            return model.eval()

        return build


class Numbers(click.ParamType):
    """A comma-separated list of numbers."""

    def __init__(self, kind: type, low: float, high: float) -> None:
        self.kind, self.low, self.high = kind, low, high
        self.name = "N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            numbers = [self.kind(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 0.3,0.5", param, ctx)
        if not all(self.low <= n <= self.high for n in numbers):
            self.fail(f"{value!r} has numbers outside [{self.low:g}, {self.high:g}]", param, ctx)
        return numbers


model_argument = click.argument("model", type=Model())
size_option = click.option("--size", type=Size(), help="Image size in pixels; default: the one timm configures.")
json_option = click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write all of it to a file; with -, print it instead of the table.",
)


def explained(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; errors that are meant for users become a message and exit code 1."""
    try:
        return work()
    except (GatedPruneError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def dense(model: nn.Module) -> nn.Module:
    """Without the gates that a saved folder came with."""
    plain: nn.Module = unwrap(model) if is_gated(model) else model
    return plain


def printed(result: Any, file: Path | None) -> None:
    """A result as a table, with JSON in a file where asked for; JSON alone where that file is "-"."""
    if file is not None and str(file) == "-":
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    if file is not None:
        result.to_json(file)
    click.echo(str(result))


def image(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
    """(C, H, W)"""
    channels, *configured = normalise_inputs(model, None)[0].shape[1:]
    return (channels, *(size or configured))
