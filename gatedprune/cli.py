"""The command line: `gatedprune inspect`, `compare`, `bench` and `export`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

from ._version import __version__
from .cli_finetune import command as finetune
from .config import GateConfig
from .errors import GatedPruneError, ModelError
from .io import is_saved, load
from .measure.macs import format_macs
from .sites import SiteReport, find_sites, normalise_inputs
from .wrapping import is_gated, unwrap, wrap

__all__ = ["main"]

_WIDEST = 60  # characters of a list of layers; --json has them all


class _Size(click.ParamType):
    name = "HxW|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        parts = str(value).lower().split("x")
        if len(parts) > 2 or not all(p.isdigit() and int(p) > 0 for p in parts):
            self.fail(f"{value!r} is no size in pixels such as 192x640 (height x width) or 224", param, ctx)
        return int(parts[0]), int(parts[-1])


class _Model(click.ParamType):
    """A function (device, size) → model, from a timm name, ``module:callable`` or a saved folder (then gated)."""

    name = "MODEL"

    def convert(self, value: Any, param: Any, ctx: Any) -> Callable[..., nn.Module]:
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

    def _imported(self, value: str, param: Any, ctx: Any) -> Callable[..., nn.Module]:
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gatedprune")
def main() -> None:
    """Channels chosen per image: see what a model offers, and what it gains.

    \b
      gatedprune inspect resnet50                     what can be gated, and why the rest cannot
      gatedprune inspect vit_small_patch16_224        attention heads and hidden units of a transformer
      gatedprune inspect mypackage.models:build       a model of your own: what build() returns
      gatedprune compare resnet18 --ratio 0.5         dense, static and dynamic: MACs, parameters, ms
      gatedprune bench resnet50 --ratio 0.3,0.5       the same over ratios, sizes, batches and threads, as a plot
      gatedprune export my_model                      a saved model as an ONNX file, gates included
    """


@main.command()
@click.argument("model", type=_Model())
@click.option("--size", type=_Size(), help="Image size in pixels; default: the one timm configures.")
@click.option("--stream", is_flag=True, help="Also list the producers of the residual stream.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: Callable[..., nn.Module], size: tuple[int, int] | None, stream: bool, as_json: bool) -> None:
    """What of MODEL can be gated, what share of its MACs that is, and for every other layer why not.

    \b
      gatedprune inspect resnet50
      gatedprune inspect convnext_tiny --size 192x640
      gatedprune inspect mobilenetv3_small_050 --stream --json

    MODEL is a name that timm knows, module:callable, or a folder that gatedprune.save() wrote. No weights are loaded.
    """
    report = _explained(lambda: _look(model, size, stream))
    click.echo(json.dumps(_as_dict(report), indent=2) if as_json else _as_text(report))


@main.command()
@click.argument("model", type=_Model())
@click.option("--ratio", type=float, help="Share of each site's channels that is suppressed.  [default: 0.5]")
@click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
@click.option("--size", type=_Size(), help="Image size in pixels; default: the one timm configures.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads for one operator.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write all of it to a file; with -, print it instead of the table.",
)
def compare(model: Callable[..., nn.Module], ratio: float | None, macs: float | None, size: tuple[int, int] | None,
            batch: int, threads: int, repeats: int, file: Path | None) -> None:  # fmt: skip
    """Dense, static and dynamic side by side: MACs, parameters, milliseconds.

    \b
      gatedprune compare resnet18
      gatedprune compare resnet50 --ratio 0.7 --size 192x640 --batch 4 --json result.json
      gatedprune compare resnet50 --macs 0.5

    Weights are random: this shows cost, not accuracy. Needs the extra `compare` (torch-pruning and thop).
    """
    from .compare import compare as run  # torch-pruning is optional

    def work() -> Any:
        torch.manual_seed(0)
        network = model("cpu", size)
        images = torch.randn(batch, *_image(network, size))
        if is_gated(network) and macs is None:
            if ratio is not None:
                network.set_ratio(ratio)  # type: ignore[operator]
            return run(network, images, threads=threads, repeats=repeats)
        network, config = _dense(network), GateConfig(ratio=ratio, macs=macs)
        return run(network, images, config=config, threads=threads, repeats=repeats)

    _printed(_explained(work), file)


class _Numbers(click.ParamType):
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


@main.command()
@click.argument("model", type=_Model())
@click.option("--size", "sizes", type=_Size(), multiple=True, help="Image size in pixels; may be given several times.")
@click.option(
    "--ratio",
    "ratios",
    type=_Numbers(float, 0, 0.99),
    default="0.5",
    show_default=True,
    help="Shares of each site's channels that are suppressed.",
)
@click.option("--batch", "batches", type=_Numbers(int, 1, 4096), default="1", show_default=True, help="Images a call.")
@click.option(
    "--threads", type=_Numbers(int, 1, 1024), default="1", show_default=True, help="Threads for one operator."
)
@click.option(
    "--against",
    "runtimes",
    multiple=True,
    type=click.Choice(["compile", "onnxruntime", "openvino"]),
    help="Also time the static model in this runtime; may be given several times.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "native", "torch"]),
    default="auto",
    show_default=True,
    help="What computes the dynamic model.",
)
@click.option("--tune", is_flag=True, help="Choose each layer's backend by timing it.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@click.option(
    "--json",
    "file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="Write all of it to a file; with -, print it instead of the table.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw ms over MACs to a .png, .svg or .pdf."
)
def bench(model: Callable[..., nn.Module], sizes: tuple[tuple[int, int], ...], ratios: list[float],
          batches: list[int], threads: list[int], runtimes: tuple[str, ...], backend: str, tune: bool,
          repeats: int, file: Path | None, plot: Path | None) -> None:  # fmt: skip
    """How fast: dense, static and dynamic timed together, over sizes, ratios, batches and threads.

    \b
      gatedprune bench resnet50 --size 480x640 --size 224 --threads 1,2
      gatedprune bench resnet50 --ratio 0,0.1,0.3,0.5,0.7,0.9 --plot resnet50.svg --json resnet50.json
      gatedprune bench mobilenetv2_100 --batch 1,8 --against onnxruntime --against compile

    Equality of the dynamic model with the masked reference is checked first. "realised" is the share of the theoretical
    speed-up: time saved over MACs saved. Weights are random. Needs the extra `compare`, a plot the extra `bench`.
    """
    from .compare.bench import bench as run  # torch-pruning is optional

    def work() -> Any:
        torch.manual_seed(0)
        size = sizes[0] if sizes else None
        network = _dense(model("cpu", size))
        shapes = list(sizes) or [(_image(network, None)[1], _image(network, None)[2])]
        count = len(shapes) * len(ratios) * len(batches) * len(threads)
        with click.progressbar(length=count, label="timing", file=sys.stderr) as bar:
            return run(network, shapes, ratios=ratios, batches=batches, threads=threads, runtimes=runtimes,
                       backend=backend, tune=tune, repeats=repeats, on_cell=lambda _: bar.update(1))  # fmt: skip

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--plot needs matplotlib: pip install 'gatedprune[bench]'.")
    result = _explained(work)
    if plot is not None:
        result.plot(plot)
    _printed(result, file)


@main.command()
@click.argument("model", type=_Model())
@click.option("--format", "form", type=click.Choice(["onnx", "torch-export"]), default="onnx", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="[default: model.onnx, model.pt2]")
@click.option("--ratio", type=float, help="Share of suppressed channels.  [default: 0.5, or as saved]")
@click.option("--macs", type=float, help="Instead: the share of the dense MACs that may be left.")
@click.option("--size", type=_Size(), help="Image size in pixels; default: as saved, or the one timm configures.")
@click.option("--batch", type=click.IntRange(1), help="Images in each call; faster than the default, any number.")
@click.option("--check/--no-check", default=True, show_default=True, help="Run the file and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def export(model: Callable[..., nn.Module], form: str, output: Path | None, ratio: float | None, macs: float | None,
           size: tuple[int, int] | None, batch: int | None, check: bool, as_json: bool) -> None:  # fmt: skip
    """The compact model as an ONNX file or a torch.export program, its choice of channels for each image included.

    \b
      gatedprune export my_model --output my_model.onnx
      gatedprune export my_model --format torch-export --size 192x640
      gatedprune export mypackage.models:build --ratio 0.3 --batch 1 --json

    my_model is a folder that gatedprune.save() wrote. Of a name that timm knows, weights are random. ONNX needs the
    extra `export` (onnx, onnxscript, onnxruntime).
    """
    from .export import export as run

    def work() -> Any:
        torch.manual_seed(0)
        network = model("cpu", size)
        images = torch.zeros(2, *_image(network, size)) if size is not None or not is_gated(network) else None
        if not is_gated(network):
            network = wrap(network, config=GateConfig(ratio=ratio, macs=macs), example_inputs=images).eval()
        elif macs is not None:
            raise click.UsageError("--macs is for a model without gates. Give --ratio: the trained gates stay.")
        elif ratio is not None:
            network.set_ratio(ratio)  # type: ignore[operator]
        path = output or Path("model.onnx" if form == "onnx" else "model.pt2")
        return run(network, path, form, example_inputs=images, batch=batch, check=check)

    result = _explained(work)
    click.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


main.add_command(finetune)


def _explained(work: Callable[[], Any]) -> Any:
    """What ``work`` returns; errors that are meant for users become a message and exit code 1."""
    try:
        return work()
    except (GatedPruneError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def _dense(model: nn.Module) -> nn.Module:
    """Without the gates that a saved folder came with."""
    dense: nn.Module = unwrap(model) if is_gated(model) else model
    return dense


def _printed(result: Any, file: Path | None) -> None:
    """A result as a table, with JSON in a file where asked for; JSON alone where that file is "-"."""
    if file is not None and str(file) == "-":
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    if file is not None:
        result.to_json(file)
    click.echo(str(result))


def _image(model: nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
    """(C, H, W)"""
    channels, *configured = normalise_inputs(model, None)[0].shape[1:]
    return (channels, *(size or configured))


def _look(build: Callable[..., nn.Module], size: tuple[int, int] | None, stream: bool) -> SiteReport:
    """On the meta device, where no weight is ever made; for real where a model cannot be built or traced there."""
    for device in ("meta", "cpu"):
        try:
            model = _dense(build(device, size))
            parameter = next(model.parameters(), torch.empty(0))
            return find_sites(model, torch.zeros(2, *_image(model, size), device=parameter.device), stream=stream)
        except (ModelError, RuntimeError, NotImplementedError):
            if device == "cpu":
                raise
    raise AssertionError("unreachable")


def _narrowed(report: SiteReport) -> dict[str, list[str]]:
    """Site → the layers whose MACs it narrows."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for layer in report.layers:
        for site in (*layer.writes, *layer.reads):
            found[site][layer.path] = None
    return {site: list(paths) for site, paths in found.items()}


def _as_dict(report: SiteReport) -> dict[str, Any]:
    narrowed = _narrowed(report)
    return {
        "model": report.model,
        "macs": report.macs,
        "macs_in_sites": report.macs_in_sites,
        "macs_left": {"0.5": report.macs_left(0.5)},
        "sites": [
            {"name": s.name, "kind": s.kind, "channels": s.channels, "gate_sees": s.in_channels, "macs": s.macs,
             "share": s.share, "narrows": narrowed.get(s.name, [])}
            for s in report
        ],
        "not_gated": report.skipped,
    }  # fmt: skip


def _as_text(report: SiteReport) -> str:
    narrowed = _narrowed(report)
    costs: dict[str, int] = defaultdict(int)
    for layer in report.layers:
        costs[layer.path] += layer.macs
    total = max(report.macs, 1)
    rows = [["site", "kind", "channels", "MACs", "narrows"]]
    rows += [[s.name, s.kind, str(s.channels), f"{s.share:.1%}", _listed(narrowed.get(s.name, []))] for s in report]
    lines = _aligned(rows, right=(2, 3)) if len(report) else []
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, reason in report.skipped.items():
        reasons[reason].append(path)
    if reasons:
        lines += ["", "not gated, because …"]
        for reason, paths in sorted(reasons.items(), key=lambda item: -sum(costs[p] for p in item[1])):
            lines.append(f"  {reason}:")
            lines += [f"    {path}  {costs[path] / total:.1%}" for path in paths]
    left = report.macs_left(0.5)
    lines += [
        "",
        f"{report.model}: {format_macs(report.macs)} per image; {len(report)} sites; "
        f"{report.macs_in_sites / total:.1%} of the MACs lie in layers that they narrow",
        f"left at ratio 0.5: {format_macs(left)} ({left / total:.1%}), predictors included",
    ]
    return "\n".join(lines)


def _listed(paths: list[str]) -> str:
    """Layers, without what they have in common, cut to a width."""
    parts = [p.split(".") for p in paths]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    text = ", ".join(".".join(p[common:]) for p in parts)
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST].rpartition(',')[0]}, … ({len(paths)})"


def _aligned(rows: list[list[str]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if column in right else text.ljust(widths[column])

    return ["  ".join(cell(text, i) for i, text in enumerate(row)).rstrip() for row in rows]
