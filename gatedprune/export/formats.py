"""The formats: how an exported program is written to a file, and how the file is run again."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import ExportError

__all__ = ["FORMATS", "Format"]

Program = torch.export.ExportedProgram
Runner = Callable[..., list[Tensor]]

_LARGEST_ONNX = 2**31 - 2**20  # bytes: what one protobuf file can hold, less the graph


@dataclass(frozen=True)
class Format:
    """``write(program, args, path)`` makes the file; ``read(path)`` gives a function from tensors to tensors."""

    suffix: str
    write: Callable[[Program, tuple[Any, ...], str], None]
    read: Callable[[str], Runner]


def _write_program(program: Program, args: tuple[Any, ...], path: str) -> None:
    with open(path, "wb") as file, _quiet():
        torch.export.save(program, file)


def _read_program(path: str) -> Runner:
    with open(path, "rb") as file, _quiet():
        module = torch.export.load(file).module()

    def run(*args: Any) -> list[Tensor]:
        with torch.no_grad():
            return [y for y in tree_leaves(module(*args)) if isinstance(y, Tensor)]

    return run


def _write_onnx(program: Program, args: tuple[Any, ...], path: str) -> None:
    try:
        import onnx  # noqa: F401
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError("format='onnx' needs onnx and onnxscript: pip install 'gatedprune[export]'.") from error

    def sort(x: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """ONNX breaks ties of TopK in favour of the lower index, which is what a stable sort does."""
        size = op.Shape(x, start=dim, end=None if dim == -1 else dim + 1)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    size = sum(t.numel() * t.element_size() for t in program.state_dict.values() if isinstance(t, Tensor))
    size += sum(t.numel() * t.element_size() for t in program.constants.values() if isinstance(t, Tensor))
    if size > _LARGEST_ONNX:
        raise ExportError(f"The model has {size / 2**30:.1f} GiB of weights; an ONNX file holds 2. Use 'torch-export'.")
    tensors = [a for a in args if isinstance(a, Tensor)]
    inputs, outputs = _numbered("input", len(tensors)), _numbered("output", len(program.graph_signature.user_outputs))
    shapes = tuple({0: "batch"} if isinstance(a, Tensor) and a.dim() else None for a in args)  # names only
    with _quiet():
        made = torch.onnx.export(program, args, dynamo=True, verbose=False, input_names=inputs, output_names=outputs,
                                 dynamic_shapes=shapes,
                                 custom_translation_table={torch.ops.aten.sort.stable: sort})  # fmt: skip
        assert made is not None
        made.save(path)


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}{i}" for i in range(count)]


def _read_onnx(path: str) -> Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "An ONNX file is checked with onnxruntime: pip install 'gatedprune[export]', or export with check=False."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any) -> list[Tensor]:
        tensors = [a.numpy() for a in args if isinstance(a, Tensor)]
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export and torch.onnx have to say to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


FORMATS = {
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
    "torch-export": Format(".pt2", _write_program, _read_program),
}
