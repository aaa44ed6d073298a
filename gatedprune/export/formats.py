"""The formats: how an exported program is written to a file, and how the file is run again."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
    """How a file is made and run again.

    Attributes:
        suffix: Of the file's name.
        write: ``write(source, args, path)`` makes the file; the source is a `torch.export` program, or where ``traced``
            the module itself.
        read: ``read(path)`` gives a function from tensors to tensors.
        traced: See ``write``.
        also: Package → another way to run the file, used where that package is installed.
    """

    suffix: str
    write: Callable[[Any, tuple[Any, ...], str], None]
    read: Callable[[str], Runner]
    traced: bool = False
    also: tuple[tuple[str, Callable[[str], Runner]], ...] = ()

    def runners(self, path: str) -> dict[str, Runner]:
        """What the file can be run in here: name → function."""
        found = {"": self.read(path)}
        found.update({name: read(path) for name, read in self.also if importlib.util.find_spec(name)})
        return found


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


def _write_script(module: torch.nn.Module, args: tuple[Any, ...], path: str) -> None:
    if not all(isinstance(a, Tensor) for a in args):
        raise ExportError("TorchScript takes tensors only: the model's arguments hold something else.")
    memory = io.BytesIO()  # torch.jit.save hides what went wrong with a file
    with _quiet(), torch.no_grad():
        torch.jit.save(torch.jit.trace(module, args, check_trace=False), memory)
    Path(path).write_bytes(memory.getvalue())


def _read_script(path: str) -> Runner:
    with _quiet():  # torch.jit is deprecated, and says so
        module = torch.jit.load(path, map_location="cpu")

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
    axes = {0: "batch", 2: "height", 3: "width"}  # names only
    shapes = tuple({d: axes[d] for d in axes if d < a.dim()} if isinstance(a, Tensor) else None for a in args)
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


def _read_openvino(path: str) -> Runner:
    import openvino

    core = openvino.Core()
    # float32 as everywhere else here; on CPUs with bfloat16 it would choose that.
    network = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*args: Any) -> list[Tensor]:
        found = network([a.numpy() for a in args if isinstance(a, Tensor)])
        return [torch.from_numpy(found[output].copy()) for output in network.outputs]

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
    "onnx": Format(".onnx", _write_onnx, _read_onnx, also=(("openvino", _read_openvino),)),
    "torch-export": Format(".pt2", _write_program, _read_program),
    "torchscript": Format(".pt", _write_script, _read_script, traced=True),
}
