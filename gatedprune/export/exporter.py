"""`export`: lower the compact model to plain operators, write it whole or not at all, run the file and compare."""

from __future__ import annotations

import copy
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import CompactModel, FrozenModel, compact
from ..errors import ConfigError, ExportError, GatedPruneError, ModelError
from ..files import atomic_write
from ..sites import normalise_inputs
from ..wrapping import GatedModel
from .batched import batched
from .checking import Checked, compare_file, first_line
from .formats import FORMATS, Format

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        format: "onnx", "torch-export" or "torchscript".
        batch: Samples in a call; None: any number.
        inputs: Shape of each tensor argument; None for the batch, height and width where they may vary.
        bytes: Size of the file.
        difference: Largest difference to the compact model on the checked inputs, relative to the largest output; None
            where that was not asked for.
        active_sets: How many different active sets the checked inputs had at the site where they had most.
        sizes: Height and width of the images that were checked, where they may vary.
        runtimes: What else than the format's own runtime the file was checked in: "openvino", where it is installed.
    """

    path: Path
    format: str
    batch: int | None
    inputs: tuple[tuple[int | None, ...], ...]
    bytes: int
    difference: float | None = None
    active_sets: int | None = None
    sizes: tuple[tuple[int, ...], ...] = ()
    runtimes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        lists = {name: [list(s) for s in getattr(self, name)] for name in ("inputs", "sizes")}
        return {**dataclasses.asdict(self), **lists, "path": str(self.path), "runtimes": list(self.runtimes)}

    def __str__(self) -> str:
        free = ("batch", "channels", "height", "width")
        shapes = " and ".join(
            "x".join(free[i] if n is None else str(n) for i, n in enumerate(shape)) for shape in self.inputs
        )
        text = f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB, takes {shapes}"
        if self.difference is None:
            return text + "; not checked"
        return text + (
            f"; run again and compared: off by {self.difference:.1e} of the largest output, on inputs with up to "
            f"{self.active_sets} active sets a site"
            + (f", sizes {' '.join('x'.join(map(str, size)) for size in self.sizes)}" if self.sizes else "")
            + (f"; also in {', '.join(self.runtimes)}" if self.runtimes else "")
        )


def export(model: nn.Module, path: str | os.PathLike[str], format: str = "onnx", *, example_inputs: Any = None,
           batch: int | None = None, any_size: bool = False, check: bool = True) -> Exported:  # fmt: skip
    """Write the compact model, with its choice of channels for each input inside the graph, as a file.

    The graph holds plain operators only. The batch may vary; where it is fixed, convolutions stay convolutions, where
    otherwise they become matrix products on the unfolded input.

    Args:
        model: A gated model, a compact one, or a static one from `gatedprune.engine.freeze`. Left as it is.
        path: The file: written whole or not at all.
        format: "onnx" (needs the extra ``export``), "torch-export" (`torch.export.save`) or "torchscript"
            (`torch.jit.trace`).
        example_inputs: A tensor (B, C, H, W) or a tuple of arguments; default: of the shapes that the model was wrapped
            for.
        batch: The number of samples in each call; None: any number.
        any_size: Height and width may vary too. Convolutional models allow that; a model whose image size is written
            into its graph (position embeddings, windows, padding worked out from the size) is refused.
        check: Run the file again, on random inputs with different active sets, and compare with the compact model.

    Raises:
        ConfigError: An argument out of its domain.
        ModelError: The model is not gated, or cannot be traced.
        ExportError: It cannot be expressed in that format, the file cannot be written, or it gives other numbers.
        ImportError: A package that the format needs is missing.
    """
    if format not in FORMATS:
        raise ConfigError(f"`format` of export() must be one of {', '.join(map(repr, FORMATS))}. Got {format!r}.")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ConfigError(f"`batch` of export() must be an integer from 1 on, or None for any. Got {batch!r}.")
    if any_size and not check:
        raise ConfigError("`any_size` of export() needs `check`: only other sizes tell whether the graph takes them.")
    source, share = _source(model)
    if any(gate.varies for gate in source.gates.values()):
        raise ExportError(
            "A model with gate='threshold' cannot be exported: how many channels win differs from sample to sample, "
            "and an exported graph has fixed sizes. Wrap it with gate='topk', which calibrates in the same way."
        )
    args = _sized(_inputs(source, example_inputs), 2 if batch is None else batch)
    if format == "onnx" and any(a.dtype is torch.bfloat16 for a in args if isinstance(a, Tensor)):
        raise ExportError("ONNX runtimes on the CPU do not compute in bfloat16: convert the model with .float() first.")

    def lowered() -> CompactModel:
        if isinstance(model, FrozenModel):
            return copy.deepcopy(model).cpu()
        return compact(source, args, backend="torch", share=share)

    form = FORMATS[format]
    graph = _graph(lowered(), args, batch)
    program = graph if form.traced else _program(graph, args, batch, any_size)
    found: list[Checked] = []

    def write(temporary: str) -> None:
        _write(form, program, args, temporary, format)
        if check:
            found.append(compare_file(form.runners(temporary), lowered(), args, batch, any_size, format))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise ExportError(
            f"{os.fspath(path)} cannot be written ({error}). Nothing was changed. Give a file in a folder that can be "
            "written to and has the room."
        ) from error
    shapes = tuple(
        (None if batch is None else batch, *([a.shape[1], None, None] if any_size and a.dim() == 4 else a.shape[1:]))
        for a in args if isinstance(a, Tensor) and a.dim()
    )  # fmt: skip
    seen = found[0] if found else Checked(None, None, (), ())
    return Exported(Path(path), format, batch, shapes, Path(path).stat().st_size, seen.difference, seen.active_sets,
                    seen.sizes if any_size else (), seen.runtimes)  # fmt: skip


def _source(model: nn.Module) -> tuple[GatedModel, str]:
    """The gated model on the CPU, in eval mode, and how its active sets are shared."""
    share = "sample"
    if isinstance(model, CompactModel):
        share, model = model.share, model.source()
    if not isinstance(model, GatedModel):
        raise ModelError(
            "export() takes a model that gatedprune.wrap() or gatedprune.compact() returned. "
            f"{type(model).__name__} is not gated."
        )
    if any(p.device.type != "cpu" for p in model.parameters()):
        model = copy.deepcopy(model).cpu()
    return model, share


def _inputs(source: GatedModel, example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is not None:
        return normalise_inputs(source, example_inputs)
    # In the type that the model has now, which may have been converted since it was wrapped.
    kind = next((p.dtype for p in source.parameters() if p.is_floating_point()), torch.float32)
    return tuple(
        torch.zeros(a.shape, dtype=kind if a.is_floating_point() else a.dtype) if isinstance(a, Tensor) else a
        for a in source._gatedprune_inputs
    )


def _sized(args: tuple[Any, ...], samples: int) -> tuple[Any, ...]:
    return tuple(
        torch.zeros(samples, *a.shape[1:], dtype=a.dtype) if isinstance(a, Tensor) and a.dim() else a for a in args
    )


def _graph(fast: CompactModel, args: tuple[Any, ...], batch: int | None) -> nn.Module:
    """The lowered model with the operators of `batched`."""
    graph = fast.prepare(*args)
    if fast._last.startswith("batch:") and batch is None:
        raise ExportError("The model's forward pass has the batch size written into it: give that number as `batch`.")
    batched(graph, graph.graph, batch)
    _own_memory(graph)
    return graph


def _program(graph: nn.Module, args: tuple[Any, ...], batch: int | None, any_size: bool) -> Any:
    shapes = None
    if batch is None or any_size:
        # Without a largest number, torch 2.6 cannot rule out that a batch is as long as an open slice ends, 2⁶³ − 1.
        samples = {} if batch is not None else {0: torch.export.Dim("batch", min=1, max=2**31 - 1)}
        pixels = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if any_size else {}
        shapes = tuple(
            {**samples, **(pixels if a.dim() == 4 else {})} if isinstance(a, Tensor) and a.dim() else None for a in args
        )
    try:
        with torch.no_grad():
            return torch.export.export(graph, args, dynamic_shapes=shapes)
    except Exception as error:
        if any_size:
            raise ExportError(
                f"The model has its image size written into its graph: export it without any_size, once for each size. "
                f"torch.export says: {first_line(error)}"
            ) from error
        hint = " Try a fixed number of samples, such as batch=1." if batch is None else ""
        raise ExportError(f"torch.export cannot trace the compact model: {first_line(error)}{hint}") from error


def _own_memory(module: nn.Module) -> None:
    """Give every tensor memory of its own: torch.export.save cannot store views into a larger or a smaller one."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for value in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if id(value) not in copies:
                copies[id(value)] = value
                value.data = value.detach().clone(memory_format=torch.contiguous_format)


def _write(form: Format, program: Any, args: tuple[Any, ...], path: str, name: str) -> None:
    try:
        form.write(program, args, path)
    except (OSError, ImportError, GatedPruneError):
        raise
    except Exception as error:
        raise ExportError(f"The compact model cannot be written as {name}: {first_line(error)}") from error
