"""`python -m gatedprune.export.check MODEL …`: timm models as ONNX, against PyTorch and against time.

Each model is gated, its gates are moved so that they choose by the image, and it is exported. ONNX Runtime must then
give PyTorch's numbers on inputs with different active sets (`export` checks that), and is timed against the dense and
the statically pruned model in ONNX Runtime.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn

from ..compare.bench import RUNTIMES
from ..compare.static import dense_copy, prune_static
from ..engine import compact
from ..errors import GatedPruneError
from ..files import write_json
from ..measure import environment, measure_latency
from ..wrapping import wrap
from .exporter import export
from .formats import FORMATS

__all__ = ["Checked", "check_model", "lively", "main"]


@dataclass(frozen=True)
class Checked:
    """One model, exported for one image in each call.

    Attributes:
        difference: Largest difference of ONNX Runtime to PyTorch, relative to the largest output.
        active_sets: How many different active sets the checked inputs had at the site where they had most.
        ms: "dense", "static" and "dynamic" in ONNX Runtime, "engine": the compact model here → median ms, batch 1.
    """

    model: str
    size: tuple[int, int]
    difference: float
    active_sets: int
    ms: dict[str, float]


def lively(model: nn.Module, ratio: float, images: Tensor) -> Any:
    """The model, gated, with gates that choose by the image, as after training."""
    gated = wrap(model, ratio, example_inputs=images).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn(gate.weight.shape, generator=generator) * 0.3)
    return gated


def check_model(name: str, *, ratio: float = 0.5, repeats: int = 20, threads: int = 1) -> Checked:
    """Export a timm model with random weights to ONNX, compare the numbers, and time it.

    Raises:
        ModelError: It cannot be gated. ExportError: it cannot be exported, or gives other numbers.
        ImportError: onnxruntime is not installed.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    images = torch.randn(1, *timm.get_pretrained_cfg(name).input_size)
    gated = lively(model, ratio, images)
    runtime = RUNTIMES["onnxruntime"]
    with tempfile.TemporaryDirectory() as folder:
        made = export(gated, Path(folder) / "model.onnx", "onnx", batch=1, example_inputs=images)
        assert made.difference is not None and made.active_sets is not None
        torch.set_num_threads(threads)
        timed = {"dense": runtime(dense_copy(gated), images, threads)}
        with contextlib.suppress(GatedPruneError):  # no static counterpart: the column stays empty
            timed["static"] = runtime(prune_static(gated, example_inputs=images).model, images, threads)
        timed["dynamic"] = FORMATS["onnx"].read(str(made.path))
        timed["engine"] = compact(gated, images)
        found = measure_latency(timed, images, threads=threads, repeats=repeats)
    return Checked(name, (images.shape[2], images.shape[3]), made.difference, made.active_sets,
                   {key: latency.median_ms for key, latency in found.items()})  # fmt: skip


def table(rows: Sequence[Checked]) -> str:
    """As Markdown."""
    columns = ("dense", "static", "dynamic", "engine")
    lines = ["| model | off by | active sets | dense ms | static | dynamic | dynamic/dense | engine |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        dense, static, dynamic, engine = (f"{row.ms[c]:.1f}" if c in row.ms else "–" for c in columns)
        lines.append(
            f"| {row.model}, {row.size[0]}×{row.size[1]} | {row.difference:.0e} | {row.active_sets} | "
            f"{dense} | {static} | {dynamic} | {row.ms['dynamic'] / row.ms['dense']:.2f} | {engine} |"
        )
    return "\n".join(lines)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads for one operator.")
@click.option("--repeats", type=click.IntRange(1), default=20, show_default=True, help="Rounds that are timed.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the numbers to this file.")
def main(models: tuple[str, ...], ratio: float, threads: int, repeats: int, file: Path | None) -> None:
    """ONNX Runtime against PyTorch, for one timm model after the other.

    \b
      python -m gatedprune.export.check resnet18 vit_tiny_patch16_224
      python -m gatedprune.export.check mobilenetv3_small_050 --ratio 0.7

    Exit code 1 where one of them cannot be exported, or gives other numbers. Weights are random.
    """
    unknown = [name for name in models if not timm.is_model(name)]
    if unknown:
        raise click.UsageError(f"timm {timm.__version__} has no model {unknown[0]!r}.")
    rows, failed = [], []
    for name in models:
        click.echo(f"checking {name}", err=True)
        try:
            rows.append(check_model(name, ratio=ratio, repeats=repeats, threads=threads))
        except (GatedPruneError, ImportError) as error:
            failed.append(f"{name}: {error}")
    if rows:
        click.echo(table(rows))
    if file is not None:
        result = {"rows": [dataclasses.asdict(row) for row in rows], "failed": failed,
                  "ratio": ratio, "environment": environment().to_dict()}  # fmt: skip
        write_json(result, file)
    if failed:
        raise click.ClickException("\n".join(failed))


if __name__ == "__main__":
    main()
