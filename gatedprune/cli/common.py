"""What the commands share: how MODEL is found, sizes and lists of numbers, options, errors, printing."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

from ..config import GateConfig
from ..errors import GatedPruneError
from ..io import find_imported, is_saved, load, load_weights
from ..io import pretrained as load_pretrained
from ..sites import normalise_inputs
from ..wrapping import is_gated, unwrap, wrap

__all__ = [
    "NO_GATES",
    "Build",
    "Chosen",
    "Gating",
    "Model",
    "Numbers",
    "Size",
    "batch_option",
    "data_option",
    "dense",
    "either_budget",
    "explained",
    "gate_options",
    "image",
    "json_option",
    "labels_option",
    "limit_option",
    "model_argument",
    "model_options",
    "printed",
    "refuse",
    "rank_option",
    "size_option",
    "written",
]

# Why some options are refused.
NO_GATES = "for a model without gates. The gates of a saved model stay; give --ratio"

# Written by `finetune` beside weights for which gatedprune.load() alone could not build a model. Not imported from
# there: that needs the extra `train`.
_FINETUNED = "finetuned.json"
Gating = Callable[[nn.Module, "torch.Tensor | None"], nn.Module]  # (model, example images) → gated model in eval mode


@dataclass(frozen=True)
class Build:
    """MODEL: call it with a device, a size in pixels, and options of `timm.create_model`; a model in eval mode."""

    text: str
    kind: str  # "timm", "own" or "saved" (then gated)
    make: Callable[..., nn.Module]

    def __call__(self, device: str, size: tuple[int, int] | None, **options: Any) -> nn.Module:
        if options and self.kind != "timm":
            names = ", ".join("--" + name.replace("_", "-") for name in options)
            raise click.UsageError(f"{names}: only for a name that timm knows, which {self.text} is not.")
        return self.make(device, size, **options)


@dataclass(frozen=True)
class Chosen:
    """MODEL and its weights: call it with a size in pixels; gives a model in eval mode."""

    build: Build
    weights: Path | None
    options: dict[str, Any]

    @property
    def random(self) -> bool:
        """Whether nobody gave it weights."""
        return self.build.kind == "timm" and self.weights is None and not self.options.get("pretrained")

    def __call__(self, size: tuple[int, int] | None) -> nn.Module:
        if self.options.get("pretrained") and self.weights is not None:
            raise click.UsageError("Give either --weights or --pretrained.")
        if self.weights is not None and self.build.kind == "saved":
            raise click.UsageError(f"--weights: {self.build.text} is a saved model, which has its weights.")
        torch.manual_seed(0)
        network = self.build("cpu", size, **self.options)
        return network if self.weights is None else load_weights(network, self.weights)

    def warn(self) -> None:
        """Say so on stderr where weights are random and accuracies will be too."""
        if self.random:
            click.echo(f"{self.build.text} has random weights: give --weights or --pretrained.", err=True)


class Size(click.ParamType):
    name = "HxW|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            self.fail(f"{value!r} is no size in pixels such as 192x640 (height x width) or 224", param, ctx)
        return int(parts[0]), int(parts[-1])


class Model(click.ParamType):
    """A `Build`, from a timm name, ``module:callable`` or a saved folder."""

    name = "MODEL"

    def convert(self, value: Any, param: Any, ctx: Any) -> Build:
        if isinstance(value, Build):
            return value
        if is_saved(value) or (Path(value) / _FINETUNED).is_file():
            return Build(value, "saved", lambda device, size: _restored(Path(value)))
        if ":" in value:
            return Build(value, "own", self._imported(value, param, ctx))
        if value.split(".")[0] not in timm.list_models():
            near = difflib.get_close_matches(value, timm.list_models(), n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            self.fail(f"timm {timm.__version__} has no model {value!r}.{hint} "
                      "Name your own as module:callable, a saved one by its folder.", param, ctx)  # fmt: skip

        def build(device: str, size: tuple[int, int] | None, pretrained: bool = False, **options: Any) -> nn.Module:
            if size is not None and timm.get_pretrained_cfg(value).fixed_input_size:
                options["img_size"] = size
            if pretrained:
                return load_pretrained(value, **options)
            with torch.device(device):
                return timm.create_model(value, pretrained=False, **options).eval()

        return Build(value, "timm", build)

    def _imported(self, value: str, param: Any, ctx: Any) -> Callable[..., nn.Module]:
        try:
            target = find_imported(value)
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


def _restored(folder: Path) -> nn.Module:
    """A saved model; one that `finetune` wrote may be pruned, dense or of one's own, and needs the extra `train`."""
    if not (folder / _FINETUNED).is_file():
        return load(folder)
    from ..finetune import load_finetuned

    model: nn.Module = load_finetuned(folder)
    return model


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
_FILE: Any = click.Path(dir_okay=False, path_type=Path)
rank_option = click.option("--rank", type=click.IntRange(1), help="Of predictors; fewer weights to read.  [default: "
                           "whole matrices]")  # fmt: skip
size_option = click.option("--size", type=Size(), help="Image size in pixels; default: the one timm configures.")
json_option = click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write all of it to a file; with -, print it instead of the table.",
)
batch_option = click.option("--batch", type=click.IntRange(1), default=32, show_default=True, help="Images in a batch.")
labels_option = click.option("--labels", type=_FILE, help="CSV with the columns file and class_index.")
limit_option = click.option("--limit", type=click.IntRange(1), help="Take this many images, evenly spread.")


def data_option(*names: str, help: str, required: bool = False) -> Any:
    """An option for a folder or a tar of images."""
    return click.option(*names, type=click.Path(path_type=Path), required=required, metavar="DIR|TAR", help=help)


def model_options(command: Callable[..., Any]) -> Any:
    """MODEL, --weights, --pretrained and --num-classes; the command gets ``model``, a `Chosen`."""

    @model_argument
    @click.option("--weights", type=_FILE, help="Load this checkpoint: .safetensors, or a state dict of torch.save.")
    @click.option("--pretrained", is_flag=True, help="Load timm's weights, from the Hugging Face hub.")
    @click.option("--num-classes", type=click.IntRange(0), help="Classes of the head.  [default: timm's]")
    @functools.wraps(command)
    def with_model(model: Build, weights: Path | None, pretrained: bool, num_classes: int | None, **rest: Any) -> Any:
        options: dict[str, Any] = {"pretrained": True} if pretrained else {}
        if num_classes is not None:
            options["num_classes"] = num_classes
        return command(model=Chosen(model, weights, options), **rest)

    return with_model


def gate_options(command: Callable[..., Any]) -> Any:
    """The options of gating; the command gets ``gated``, a `Gating`."""

    @click.option("--ratio", type=float, help="Share of suppressed channels at each site.  [default: 0.5, or as saved]")
    @click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
    @click.option("--include", multiple=True, metavar="PATTERN", help="Gate only sites that fit; several times.")
    @click.option("--exclude", multiple=True, metavar="PATTERN", help="Never gate sites that fit; several times.")
    @click.option("--signed", is_flag=True, help="Gates look at means, not at means of absolute values.")
    @rank_option
    @functools.wraps(command)
    def with_gates(ratio: float | None, macs: float | None, include: tuple[str, ...], exclude: tuple[str, ...],
                   signed: bool, rank: int | None, **rest: Any) -> Any:  # fmt: skip
        def gated(network: nn.Module, images: torch.Tensor | None) -> nn.Module:
            if not is_gated(network):
                config = GateConfig(ratio=ratio, macs=macs, include=include, exclude=exclude, signed=signed, rank=rank)
                new: nn.Module = wrap(network, config=config, example_inputs=images).eval()
                return new
            refuse(NO_GATES, macs=macs is not None, include=include, exclude=exclude, signed=signed,
                   rank=rank is not None)  # fmt: skip
            if ratio is not None:
                network.set_ratio(ratio)  # type: ignore[operator]
            return network

        return command(gated=gated, **rest)

    return with_gates


def refuse(why: str, **options: Any) -> None:
    """Options that were given and mean nothing here become a usage error."""
    given = [name for name, value in options.items() if value]
    if given:
        raise click.UsageError(f"--{', --'.join(given)}: {why}.")


def either_budget(ratios: Any, macs: Any) -> None:
    """--ratio and --macs together become a usage error."""
    if ratios is not None and macs is not None:
        raise click.UsageError("Give either --ratio or --macs.")


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
        written(result.to_json, file)
    click.echo(str(result))


def written(write: Callable[[Path], Any], path: Path) -> None:
    """Call ``write`` with a path; where it cannot be written, a message and exit code 1."""
    try:
        write(path)
    except OSError as error:
        raise click.ClickException(
            f"{path} cannot be written ({error.strerror or error}). Nothing was changed. Give a file in a folder that "
            "can be written to and has the room."
        ) from error


def image(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
    """(C, H, W)"""
    channels, *configured = normalise_inputs(model, None)[0].shape[1:]
    return (channels, *(size or configured))
