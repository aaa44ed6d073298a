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
from torch.utils._pytree import tree_leaves

from ..engine import CompactModel, compact
from ..errors import ConfigError, ExportError, GatedPruneError, ModelError
from ..files import atomic_write
from ..sites import normalise_inputs
from ..wrapping import GatedModel
from .batched import batched
from .formats import FORMATS, Format, Runner

__all__ = ["Exported", "export"]

# A runtime may lose as much to rounding as plain PyTorch does, several times over: other sums, other polynomials for
# exp and erf, about 1e-7 a step. A wrong channel is off by the size of the output itself.
_ROUNDING_FACTOR = 10.0
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: The file.
        format: "onnx" or "torch-export".
        batch: Samples in a call; None: any number.
        inputs: Shape of each tensor argument; None for the batch where it may vary.
        bytes: Size of the file.
        difference: Largest difference to the compact model on the checked inputs, relative to the largest output; None
            where that was not asked for.
        active_sets: How many different active sets the checked inputs had at the site where they had most.
    """

    path: Path
    format: str
    batch: int | None
    inputs: tuple[tuple[int | None, ...], ...]
    bytes: int
    difference: float | None = None
    active_sets: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**dataclasses.asdict(self), "path": str(self.path), "inputs": [list(s) for s in self.inputs]}

    def __str__(self) -> str:
        shapes = " and ".join("x".join("batch" if n is None else str(n) for n in shape) for shape in self.inputs)
        text = f"{self.path}: {self.format}, {self.bytes / 1e6:.1f} MB, takes {shapes}"
        if self.difference is None:
            return text + "; not checked"
        return text + (
            f"; run again and compared: off by {self.difference:.1e} of the largest output, on inputs with up to "
            f"{self.active_sets} active sets a site"
        )


def export(model: nn.Module, path: str | os.PathLike[str], format: str = "onnx", *, example_inputs: Any = None,
           batch: int | None = None, check: bool = True) -> Exported:  # fmt: skip
    """Write the compact model, with its choice of channels for each input inside the graph, as a file.

    The graph holds plain operators only. The image size is fixed. The batch may vary; where it is fixed, convolutions
    stay convolutions, where otherwise they become matrix products on the unfolded input.

    Args:
        model: A gated model, or a compact one. Left as it is.
        path: The file: written whole or not at all.
        format: "onnx" (needs the extra ``export``) or "torch-export" (`torch.export.save`).
        example_inputs: A tensor (B, C, H, W) or a tuple of arguments; default: of the shapes that the model was wrapped
            for.
        batch: The number of samples in each call; None: any number.
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
    source, share = _source(model)
    if any(gate.varies for gate in source.gates.values()):
        raise ExportError(
            "A model with gate='threshold' cannot be exported: how many channels win differs from sample to sample, "
            "and an exported graph has fixed sizes. Wrap it with gate='topk', which calibrates in the same way."
        )
    args = _sized(_inputs(source, example_inputs), 2 if batch is None else batch)
    if format == "onnx" and any(a.dtype is torch.bfloat16 for a in args if isinstance(a, Tensor)):
        raise ExportError("ONNX runtimes on the CPU do not compute in bfloat16: convert the model with .float() first.")
    reference = compact(source, args, backend="torch", share=share)
    program = _program(compact(source, args, backend="torch", share=share), args, batch, format)
    found: list[tuple[float, int]] = []

    def write(temporary: str) -> None:
        _write(FORMATS[format], program, args, temporary, format)
        if check:
            found.append(_compare(FORMATS[format].read(temporary), reference, args, batch, format))

    try:
        atomic_write(path, write)
    except OSError as error:
        raise ExportError(
            f"{os.fspath(path)} cannot be written ({error}). Nothing was changed. Give a file in a folder that can be "
            "written to and has the room."
        ) from error
    shapes = tuple((None if batch is None else batch, *a.shape[1:]) for a in args if isinstance(a, Tensor) and a.dim())
    difference, sets = found[0] if found else (None, None)
    return Exported(Path(path), format, batch, shapes, Path(path).stat().st_size, difference, sets)


def _source(model: nn.Module) -> tuple[GatedModel, str]:
    """The gated model on the CPU, in eval mode, and how its active sets are shared."""
    share = "sample"
    if isinstance(model, CompactModel):
        share, model = model.share, model.__dict__["_source"]
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


def _program(fast: CompactModel, args: tuple[Any, ...], batch: int | None, format: str) -> torch.export.ExportedProgram:
    graph = fast.prepare(*args)
    fixed = fast._last.startswith("batch:")
    if fixed and batch is None:
        raise ExportError("The model's forward pass has the batch size written into it: give that number as `batch`.")
    batched(graph, graph.graph, batch)
    _own_memory(graph)
    shapes = None
    if batch is None:
        # Without a largest number, torch 2.6 cannot rule out that a batch is as long as an open slice ends, 2⁶³ − 1.
        samples = torch.export.Dim("batch", min=1, max=2**31 - 1)
        shapes = tuple({0: samples} if isinstance(a, Tensor) and a.dim() else None for a in args)
    try:
        with torch.no_grad():
            return torch.export.export(graph, args, dynamic_shapes=shapes)
    except Exception as error:
        hint = " Try a fixed number of samples, such as batch=1." if batch is None else ""
        raise ExportError(f"torch.export cannot trace the compact model: {_first_line(error)}{hint}") from error


def _own_memory(module: nn.Module) -> None:
    """Give every tensor memory of its own: torch.export.save cannot store views into a larger or a smaller one."""
    copies: dict[int, Tensor] = {}
    for part in module.modules():
        for value in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if id(value) not in copies:
                copies[id(value)] = value
                value.data = value.detach().clone(memory_format=torch.contiguous_format)


def _write(form: Format, program: torch.export.ExportedProgram, args: tuple[Any, ...], path: str, name: str) -> None:
    try:
        form.write(program, args, path)
    except (OSError, ImportError, GatedPruneError):
        raise
    except Exception as error:
        raise ExportError(f"The compact model cannot be written as {name}: {_first_line(error)}") from error


def _compare(run: Runner, fast: CompactModel, args: tuple[Any, ...], batch: int | None, name: str) -> tuple[float, int]:
    """(largest relative difference, active sets) over random inputs; raises where it is more than rounding."""
    generator = torch.Generator().manual_seed(0)
    exact = copy.deepcopy(fast).double()
    worst = 0.0
    chosen: dict[str, set] = {site: set() for site in fast.gates}
    # An exported graph must not hold the number of samples, or the channels, that it was traced with.
    for samples in (1, 3) if batch is None else (batch,) * max(2, 4 // batch):
        inputs = tuple(_random(a, samples, generator) for a in args)
        wanted, precise = _outputs(fast, inputs), _outputs(exact, tuple(_double(a) for a in inputs))
        for site, active in fast.last_active.items():
            chosen[site].update(map(tuple, active.tolist()))
        try:
            found = run(*inputs)
        except ImportError:
            raise
        except Exception as error:
            raise ExportError(f"The {name} file does not run on {samples} samples: {_first_line(error)}") from error
        shapes = [[tuple(y.shape) for y in ys] for ys in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ExportError(f"The {name} file returns tensors of shapes {shapes[0]}, the compact model {shapes[1]}.")
        for ours, theirs, best in zip(wanted, found, precise, strict=True):
            scale = float(best.abs().max()) or 1.0
            rounding = float((ours - best).abs().max()) / scale
            difference = float((theirs - ours).abs().max()) / scale
            if not difference <= _ROUNDING_FACTOR * rounding + _ROUNDING:
                raise ExportError(
                    f"The {name} file does not compute what the compact model computes: off by {difference:.1e} of the "
                    f"largest output (rounding alone: {rounding:.1e}). It was not kept. Please report this with the "
                    "model's name."
                )
            worst = max(worst, difference)
    return worst, max(map(len, chosen.values()), default=0)


def _random(a: Any, samples: int, generator: torch.Generator) -> Any:
    """Samples of different mean and contrast in each channel, so that gates choose differently."""
    if not isinstance(a, Tensor) or not a.dim() or not a.is_floating_point():
        return a.expand(samples, *a.shape[1:]).clone() if isinstance(a, Tensor) and a.dim() else a
    x = torch.randn(samples, *a.shape[1:], generator=generator)
    style = (samples, *a.shape[1:2], *[1] * (a.dim() - 2))
    return (x * torch.rand(style, generator=generator) + torch.randn(style, generator=generator)).to(a.dtype)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor)]


def _double(a: Any) -> Any:
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.onnx puts the cause last, under advice for its developers
    cause = next((line for line in lines if "DispatchError" in line), lines[0] if lines else "")
    text = f"{type(error).__name__}: {cause[:300]}"
    return text if text.endswith(".") else text + "."
