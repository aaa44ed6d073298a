"""`gatedprune inspect`: what can be gated, and for every other layer why not."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import torch

from ..errors import ModelError
from ..measure.macs import format_macs
from ..sites import SiteReport, find_sites
from .common import Build, dense, explained, image, model_argument, size_option
from .images import image_options, show_choices

__all__ = ["command"]

_WIDEST = 60  # characters of a list of layers; --json has them all


@click.command("inspect")
@model_argument
@size_option
@click.option("--stream", is_flag=True, help="Also list the producers of the residual stream.")
@image_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: Build, size: tuple[int, int] | None, stream: bool, paths: tuple[Path, ...], more: tuple[Path, ...],
            plot: Path | None, as_json: bool) -> None:  # fmt: skip
    """What of MODEL can be gated, what share of its MACs that is, and for every other layer why not.

    \b
      gatedprune inspect resnet50
      gatedprune inspect convnext_tiny --size 192x640
      gatedprune inspect mobilenetv3_small_050 --stream --json
      gatedprune inspect my_model --image a.jpg b.jpg --plot channels.png

    MODEL is a name that timm knows, module:callable, or a folder that gatedprune.save() wrote. No weights are loaded.
    With --image: which channels of each site the images use, and which they share.
    """
    if paths or more:
        return show_choices(model, size, (*paths, *more), plot, as_json)
    if plot is not None:
        raise click.UsageError("--plot draws what the images of --image use: give it two or more.")
    report = explained(lambda: _look(model, size, stream))
    click.echo(json.dumps(_as_dict(report), indent=2) if as_json else _as_text(report))


def _look(build: Build, size: tuple[int, int] | None, stream: bool) -> SiteReport:
    """On the meta device, where no weight is ever made; for real where a model cannot be built or traced there."""
    for device in ("meta", "cpu"):
        try:
            model = dense(build(device, size))
            parameter = next(model.parameters(), torch.empty(0))
            return find_sites(model, torch.zeros(2, *image(model, size), device=parameter.device), stream=stream)
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
