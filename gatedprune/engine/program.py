"""A lowered graph without Python: its operators are recorded as they run once, and then run one after the other in C++.

Between two layers of a small network Python takes longer than the layers do, and between those of a large one its code
comes from memory each time, since the activations have driven it out of the caches.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from .selection import Selector

__all__ = ["Program", "Programs", "record"]

_log = logging.getLogger("gatedprune")

# Shapes that a model keeps programs of: image sizes times batch sizes.
_KEPT = 16
# Operators that tell a shape. It is the same in each run.
_SHAPES = {
    "sym_size",
    "sym_stride",
    "sym_numel",
    "sym_storage_offset",
    "size",
    "stride",
    "numel",
    "dim",
    "is_contiguous",
}
# Which method of the native program takes a value of a type that means one thing only.
_CONSTANTS: dict[type, str] = {
    str: "text",
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
    torch.device: "device",
}


class Program:
    """Made by `record`: computes what the graph did, for inputs of the same shapes, and tells its selectors of it.

    Attributes:
        graph: What the graph is called where it came from.
        size: Number of operators.
    """

    def __init__(self, native: Any, selectors: list[Selector], result: Any, hooks: list[Any], graph: str) -> None:
        self._run, self.size, self.graph = native.run, native.size(), graph
        self._selectors, self._hooks = selectors, hooks
        leaves, self._spec = tree_flatten(result)
        self._rest = [None if isinstance(v, Tensor) else v for v in leaves]
        self._outputs = sum(isinstance(v, Tensor) for v in leaves)

    def usable(self) -> bool:
        """Whether nobody listens to the modules of the graph, which this does not call."""
        return not any(self._hooks)

    def __call__(self, *args: Any) -> Any:
        found = self._run([a for a in args if isinstance(a, Tensor)])
        for selector, active in zip(self._selectors, found[self._outputs :], strict=True):
            selector.__dict__["last_active"] = active
        values = iter(found)
        return tree_unflatten([next(values) if v is None else v for v in self._rest], self._spec)


class Programs:
    """The programs of a model, by the shapes of what it was called with. Any number of threads may ask."""

    def __init__(self) -> None:
        self._known: dict[tuple, Program | None] = {}
        self._lock = threading.Lock()

    def key(self, args: tuple) -> tuple | None:
        """What decides which operators run; None where Python has to see them."""
        if (
            torch.compiler.is_dynamo_compiling()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        key: list[Any] = []
        for a in args:
            if type(a) is not Tensor:
                if isinstance(a, Tensor):
                    return None
                key.append(repr(a))
            elif a.device.type != "cpu" or not a.is_contiguous():
                return None
            else:
                key.append((a.shape, a.dtype))
        return tuple(key)

    def find(self, key: tuple | None) -> Program | None:
        """The program of these shapes, if there is one and it may be used."""
        program = self._known.get(key) if key is not None else None
        return program if program is not None and program.usable() else None

    def make(self, key: tuple, graph: fx.GraphModule, args: tuple, name: str) -> Any:
        """Compute the graph, and record it unless that was tried before. The oldest of many programs is forgotten."""
        if key not in self._known:
            with self._lock:  # hooks are looked at in here, since a recording listens by hooks of its own
                if key not in self._known and not any(_hooks(graph)):
                    program, result = record(graph, args, name)
                    while len(self._known) >= _KEPT:
                        self._known.pop(next(iter(self._known)), None)
                    self._known[key] = program
                    return result
        return graph(*args)  # without the lock: a hook may call the model again

    def clear(self) -> None:
        self._known.clear()

    def __deepcopy__(self, memo: dict) -> Programs:
        return Programs()

    def __reduce__(self) -> Any:
        return Programs, ()


def record(graph: fx.GraphModule, args: Sequence[Any], name: str = "") -> tuple[Program | None, Any]:
    """The operators that ``graph`` runs on ``args``, on the CPU, and its result.

    No program where what runs depends on values, or does not give the same result again: a recording would be wrong.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    selectors = [m for m in graph.modules() if isinstance(m, Selector)]
    if any(s.gate.varies for s in selectors):
        return None, graph(*args)
    recorder = _Recorder(tensors)
    hooks = _hooks(graph)
    # Operators that consist of others are seen whole in this mode: fewer of them, and the backend's own short cuts.
    with torch.inference_mode(), _listening(selectors) as chosen, recorder:
        result = graph(*args)
    leaves = tree_flatten(result)[0]
    try:
        recorder.check()
        outputs = [recorder.register(v) for v in leaves if isinstance(v, Tensor)]
        outputs += [recorder.register(chosen.get(s), known=True) for s in selectors]
    except _Unrecordable as e:
        _log.debug("Not recorded, since %s.", e)
        return None, graph(*args)  # not what was made in inference mode, which nobody could write to
    recorder.native.finish(outputs)
    program = Program(recorder.native, selectors, result, hooks, name)
    again = program(*args)
    if all(_same(a, b) for a, b in zip(leaves, tree_flatten(again)[0], strict=True)):
        return program, again
    _log.debug("Not recorded, since a second run gave another result.")
    return None, graph(*args)


def _hooks(graph: fx.GraphModule) -> list[Any]:
    """Where hooks on the graph's modules lie, those of any module included: the dictionaries, which change later."""
    anywhere = [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
    return anywhere + [hooks for m in graph.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


@contextlib.contextmanager
def _listening(selectors: list[Selector]) -> Iterator[dict[Selector, Tensor]]:
    """What each selector chooses in this thread, in the calls of the block; others may be running the same graph."""
    chosen: dict[Selector, Tensor] = {}
    thread = threading.get_ident()

    def hear(selector: Any, args: Any, out: Any) -> None:
        if threading.get_ident() == thread:
            chosen[selector] = out[0]

    handles = [s.register_forward_hook(hear) for s in selectors]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return bool(a == b)
    return a.shape == b.shape and a.dtype is b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _by_numbers(func: Any, args: tuple) -> bool:
    """Whether this is indexing by numbers, whose result has a known size; by a mask it has not."""
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and all(i is None or i.dtype not in masks for i in args[1])


class _Unrecordable(Exception):
    """A run that cannot be replayed; says why."""


class _Recorder(TorchDispatchMode):
    """Writes down every operator that runs, with its arguments."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.native = torch.classes.gatedprune.Program(len(inputs))
        # Weakly: values of a recorded run are freed as those of any other.
        self.registers = WeakTensorKeyDictionary({t: i for i, t in enumerate(inputs)})
        self.constants: set[int] = set()
        self.why: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.why is None:
            try:
                self._add(func, args, kwargs, out)
            except Exception as e:  # noqa: BLE001 - whatever it is, the graph still runs as it is
                self.why = str(e)
        return out

    def check(self) -> None:
        if self.why is not None:
            raise _Unrecordable(self.why)

    def register(self, value: Tensor | None, known: bool = False) -> int:
        """Where a tensor lies. One that comes from nowhere is a constant, unless it has to be ``known``."""
        at = None if value is None else self.registers.get(value)
        if at is None:
            if value is None or known:
                raise _Unrecordable("a value of this run is missing")
            at = self.registers[value] = self.native.constant(value)
            self.constants.add(at)
        return at

    def _add(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        schema = func._schema
        name = schema.name.split("::")[1]
        if name in _SHAPES:
            return
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not _by_numbers(func, args)
        if dynamic or torch.Tag.data_dependent_output in func.tags:
            raise _Unrecordable(f"{func} depends on values")
        results = out if isinstance(out, tuple) and len(schema.returns) != 1 else (out,) if schema.returns else ()
        counts = [len(r) if isinstance(r, list | tuple) else -1 for r in results]
        values = [v for r in results for v in (r if isinstance(r, list | tuple) else (r,))]
        if not all(isinstance(v, Tensor) for v in values):
            raise _Unrecordable(f"{func} returns {[type(v).__name__ for v in values]}")
        for i, argument in enumerate(schema.arguments):
            if i < len(args):
                value = args[i]
            else:
                value = kwargs.get(argument.name, argument.default_value)
            self._argument(argument, value)
        first = self.native.call(schema.name, schema.overload_name, counts)
        for i, v in enumerate(values):
            self.registers[v] = first + i

    def _argument(self, argument: Any, value: Any) -> None:
        native, kind = self.native, str(argument.type)
        if value is None:
            native.none()
        elif isinstance(value, Tensor):
            at = self.register(value)
            if argument.alias_info is not None and argument.alias_info.is_write and at in self.constants:
                raise _Unrecordable("a constant is overwritten")
            native.tensor(at)
        elif isinstance(value, list | tuple):
            self._list(kind, value)
        elif type(value) in _CONSTANTS:
            getattr(native, _CONSTANTS[type(value)])(value)
        elif not isinstance(value, bool | int | float):
            raise _Unrecordable(f"an argument is a {type(value).__name__}")
        elif "Tensor" in kind:
            native.number(value)
        elif "number" in kind or "Scalar" in kind:
            native.scalar(value)
        elif "float" in kind:
            native.real(float(value))
        elif "bool" in kind:
            native.truth(bool(value))
        else:
            native.integer(int(value))

    def _list(self, kind: str, values: Sequence[Any]) -> None:
        native = self.native
        if "Tensor" in kind:
            native.tensors([-1 if v is None else self.register(v) for v in values], "List[Optional[Tensor]]" in kind)
        elif "float" in kind:
            native.reals([float(v) for v in values])
        elif "bool" in kind:
            native.truths([bool(v) for v in values])
        elif "int" in kind or "Int" in kind:
            native.integers([int(v) for v in values])
        else:
            raise _Unrecordable(f"an argument is a {kind}")
