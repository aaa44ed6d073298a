"""How fast: dense, static and dynamic timed together over sizes, batches, threads and ratios."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from ..engine import CompactModel, compact, native
from ..engine.program import record
from ..errors import ConfigError, ModelError
from ..files import atomic_write, write_json
from ..measure import count_macs, measure_latency
from ..measure.environment import Environment, environment
from ..measure.latency import Latency
from ..wrapping import wrap
from .equality import check_equality
from .static import dense_copy, prune_static

__all__ = ["RUNTIMES", "Benchmark", "Cell", "bench"]


@dataclass(frozen=True)
class Cell:
    """One setting of a benchmark.

    Args:
        size: (H, W) of the images.
        ratio: Share of each site's channels that is suppressed.
        batch: Images a call.
        threads: Threads PyTorch used for one operator.
        macs: "dense", "static", "dynamic" → MACs per sample that are really executed; static only where it exists.
        latency: The same names, "static, RUNTIME" for each runtime asked for, and "dynamic, compile" where compile is
            among them → time of a call on the whole batch.
        error: Largest difference of dynamic from masked, relative to the largest output, in the model's precision.
        notes: Why a column is missing.
    """

    size: tuple[int, int]
    ratio: float
    batch: int
    threads: int
    macs: dict[str, int]
    latency: dict[str, Latency]
    error: float
    notes: tuple[str, ...]

    def ms(self, name: str) -> float | None:
        """Median milliseconds of a call; None where that was not measured."""
        return self.latency[name].median_ms if name in self.latency else None

    @property
    def speedup(self) -> float:
        """Dense time over dynamic time."""
        return self.latency["dense"].median_ms / self.latency["dynamic"].median_ms

    @property
    def against_static(self) -> float | None:
        """Dynamic time over static time."""
        static = self.ms("static")
        return None if static is None else self.latency["dynamic"].median_ms / static

    @property
    def realised(self) -> float | None:
        """Share of the theoretical speed-up: time saved over MACs saved, both as shares of the dense model's."""
        saved = 1 - self.macs["dynamic"] / self.macs["dense"]
        return (1 - 1 / self.speedup) / saved if saved > 0 else None


@dataclass(frozen=True)
class Benchmark:
    """What `bench` returns; prints as a table.

    Args:
        model: Name of the model.
        cells: One for each size, ratio, batch and number of threads.
        backend: What computed the dynamic model: "native" or "torch".
        dtype: What all three models were converted to, "float32" or "bfloat16".
        environment: Machine, versions and commit.
    """

    model: str
    cells: tuple[Cell, ...]
    backend: str
    dtype: str
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        cells = [
            {**dataclasses.asdict(c), "speedup": c.speedup, "against_static": c.against_static, "realised": c.realised}
            for c in self.cells
        ]
        return {**dataclasses.asdict(self), "cells": cells}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, in one piece."""
        write_json(self.to_dict(), path)

    def __str__(self) -> str:
        runtimes = list(dict.fromkeys(n for c in self.cells for n in c.latency if ", " in n))
        head = ["size", "ratio", "batch", "threads", "dense ms", "static", "dynamic", "p20–p80", "dynamic/static"]
        table = [[*head, *(f"{n} ms" for n in runtimes), "dense/dynamic", "MACs", "realised"]]
        for cell in self.cells:
            dynamic = cell.latency["dynamic"]
            table.append([
                "×".join(map(str, cell.size)), f"{cell.ratio:g}", str(cell.batch), str(cell.threads),
                _number(cell.ms("dense")), _number(cell.ms("static")), _number(dynamic.median_ms),
                f"{dynamic.p20_ms:.2f}–{dynamic.p80_ms:.2f}", _number(cell.against_static),
                *(_number(cell.ms(n)) for n in runtimes), _number(cell.speedup),
                _number(cell.macs["dynamic"] / cell.macs["dense"]),
                "–" if cell.realised is None else f"{cell.realised:.0%}",
            ])  # fmt: skip
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(t.rjust(w) for t, w in zip(row, widths, strict=True)) for row in table]
        lines.insert(1, "─" * len(lines[0]))
        notes = list(dict.fromkeys(note for c in self.cells for note in c.notes))
        repeats = self.cells[0].latency["dense"].repeats
        return "\n".join([
            self.model, *lines,
            f"ms a call, medians of {repeats}, one process, alternating; MACs: dynamic/dense; realised: time saved "
            f"over MACs saved; engine: {self.backend}; {self.dtype}",
            f"{self.environment.processor}, torch {self.environment.packages['torch']}", *notes,
        ])  # fmt: skip

    def plot(self, path: str | Path) -> None:
        """Milliseconds over MACs, one line each for static and dynamic, to a PNG, SVG or PDF file.

        Raises:
            ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("A plot needs matplotlib: pip install 'gatedprune[bench]'.") from error
        groups = sorted({(c.size, c.batch, c.threads) for c in self.cells})
        figure = Figure(figsize=(5.5 * len(groups), 4.2), layout="constrained")
        for axes, (size, batch, threads) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
            cells = [c for c in self.cells if (c.size, c.batch, c.threads) == (size, batch, threads)]
            dense = max(cells, key=lambda c: c.latency["dense"].median_ms)
            full = dense.macs["dense"] / 1e9, dense.latency["dense"].median_ms
            axes.plot([0, full[0]], [0, full[1]], color="0.7", linestyle="--", label="time as MACs")
            axes.plot(*full, "k*", markersize=12, label="dense")
            for name in ("static", "dynamic"):
                points = sorted((c.macs[name] / 1e9, c.latency[name].median_ms) for c in cells if name in c.latency)
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=name)
            axes.set(xlabel="GMACs per image", ylabel="ms a call", xlim=(0, None), ylim=(0, None),
                     title=f"{self.model}, {size[0]}×{size[1]}, batch {batch}, threads {threads}")  # fmt: skip
            axes.legend()
        atomic_write(path, figure.savefig)


def bench(
    model: nn.Module,
    sizes: Sequence[tuple[int, int]],
    *,
    ratios: Sequence[float] = (0.5,),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    runtimes: Sequence[str] = (),
    backend: str = "auto",
    tune: bool = False,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    warmup: int = 3,
    repeats: int = 20,
    on_cell: Callable[[Cell], None] | None = None,
) -> Benchmark:
    """Time dense, static and dynamic side by side; equality of dynamic and masked is checked before each timing.

    Args:
        model: A dense model. Stays as it is.
        sizes: (H, W) of the images.
        ratios, batches, threads: What else is varied; every combination is a cell.
        runtimes: Also time the static model in these, names of `RUNTIMES`; with "compile" the dynamic one too.
        backend, tune: See `compact`. rank: Of predictors, see `gatedprune.wrap`.
        dtype: Convert the models and the images to this before they are timed; equality is checked in float32.
        warmup, repeats: See `measure_latency`.
        on_cell: Called with each cell as it is done, for a progress bar.

    Raises:
        ConfigError: Nothing to do, an unknown runtime, or a runtime in another type than float32.
        ModelError: No site was found, or the dynamic model does not equal the masked one.
        ImportError: torch-pruning, thop or a runtime is not installed.
    """
    if not (sizes and ratios and batches and threads):
        raise ConfigError("bench() needs at least one size, ratio, batch size and number of threads.")
    unknown = [r for r in runtimes if r not in RUNTIMES]
    if unknown:
        raise ConfigError(f"Unknown runtime {unknown[0]!r}. Known: {', '.join(RUNTIMES)}.")
    if runtimes and dtype is not torch.float32:
        raise ConfigError(f"Runtimes are timed in float32. Leave out `runtimes`, or `dtype` {dtype}.")
    cells, used = [], "torch"
    for size, ratio in itertools.product(sizes, ratios):
        one = torch.randn(1, 3, *size)
        gated = wrap(copy.deepcopy(model), ratio=ratio, example_inputs=one, rank=rank)
        fast = compact(gated, one, backend=backend, tune=tune)
        used = fast.backend
        models: dict[str, Any] = {"dense": dense_copy(gated)}
        notes = [] if rank is None else [f"dynamic: predictors of rank {rank}"]
        try:
            static = prune_static(gated, example_inputs=one)
            models["static"] = static.model
            if static.why:
                notes.append(f"static: cut by gatedprune, batch norms folded, since {static.why}")
        except ModelError as error:
            notes.append(f"no static column: {error}")
        models["dynamic"] = fast
        macs = {name: count_macs(m, one).total for name, m in models.items()}
        for batch in batches:
            x = torch.randn(batch, 3, *size)
            difference = check_equality(gated, fast, (x,)).native
            timed = dict(models)
            if dtype is not torch.float32:
                timed, x = {name: copy.deepcopy(m).to(dtype) for name, m in models.items()}, x.to(dtype)
            if "compile" in runtimes:
                torch._dynamo.reset()  # what was compiled for other cells; not between those of one cell
            for count in threads:
                for runtime in runtimes if "static" in models else ():
                    if runtime in _OWN_THREADS or f"static, {runtime}" not in timed:
                        timed[f"static, {runtime}"] = RUNTIMES[runtime](models["static"], x, count)
                if "compile" in runtimes and "dynamic, compile" not in timed:
                    timed["dynamic, compile"] = _compiled(fast, x, count)
                latency = measure_latency(timed, x, threads=count, warmup=warmup, repeats=repeats)
                cells.append(Cell(size, ratio, batch, count, macs, latency, difference, tuple(notes)))
                if on_cell is not None:
                    on_cell(cells[-1])
    config = getattr(model, "default_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    kind = str(dtype).removeprefix("torch.")
    return Benchmark(str(name or type(model).__name__), tuple(cells), used, kind, environment())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _compiled(model: nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Any]:
    """`torch.compile` with weights frozen into the code."""
    import torch._inductor.config as inductor

    # In the mode that the timing uses, on a tensor from outside of it: else it would be compiled again there, unfrozen.
    with inductor.patch(freezing=True), torch.inference_mode():
        compiled = torch.compile(copy.deepcopy(model).eval())
        compiled(x)
    return compiled


def _recorded(model: nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Any]:
    """The model as the engine runs its own: batch norms folded, PyTorch's operators one after the other, no Python."""
    native.load(required=True)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    # A model that cannot be traced that way has other norms, or keeps them.
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        model = fuse(model, inplace=True)
    with torch.no_grad():
        program, _ = record(torch.export.export(model, (x,)).module(), (x,))
    if program is None:
        raise ModelError(f"{type(model).__name__} cannot be recorded: what it runs depends on the values in its input.")
    return program


def _exported(model: nn.Module, x: Tensor) -> bytes:
    if isinstance(model, CompactModel):  # cut by gatedprune: tracing cannot see it choose the graph for a size
        model = model.prepare(x)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(copy.deepcopy(model).eval(), (x,), path, dynamo=False, input_names=["x"])
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError("This runtime needs the package onnx: pip install onnx.") from error
        return path.read_bytes()


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Any]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("The runtime 'onnxruntime' needs its package: pip install onnxruntime onnx.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(_exported(model, x), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"x": images.numpy()})


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Any]:
    try:
        import openvino
    except ImportError as error:
        raise ImportError("The runtime 'openvino' needs its package: pip install openvino onnx.") from error
    core = openvino.Core()
    # float32 as everywhere else here; on CPUs with bfloat16 it would choose that.
    hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    network = core.compile_model(core.read_model(_exported(model, x)), "CPU", hints)
    return lambda images: network(images.numpy())


# They keep the number of threads that they were made with; the others take PyTorch's.
_OWN_THREADS = ("onnxruntime", "openvino")
RUNTIMES: dict[str, Callable[[nn.Module, Tensor, int], Callable[[Tensor], Any]]] = {
    "recorded": _recorded,
    "compile": _compiled,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
