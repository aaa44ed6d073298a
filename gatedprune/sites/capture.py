"""Capture a model's forward pass as a graph of ATen operators."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ConfigError, ModelError
from .rewrites import join_response_norms, join_rms_norms, replace_overwritten
from .turns import TURNS

__all__ = [
    "GATING_STATE",
    "capture",
    "concrete",
    "evaluating",
    "module_path",
    "normalise_inputs",
    "suspended",
    "two_samples",
]

# Where a gated model keeps the switch that its hooks look at (see wrapping): a captured graph holds the backbone alone.
GATING_STATE = "_gatedprune_state"


def input_size(model: nn.Module) -> tuple[int, ...]:
    """(C, H, W) that the timm configuration of the model, or of a module inside it, names; else (3, 224, 224)."""
    for module in model.modules():
        for attribute in ("pretrained_cfg", "default_cfg"):
            cfg = getattr(module, attribute, None)
            if isinstance(cfg, dict) and cfg.get("input_size"):
                return tuple(cfg["input_size"])
    return (3, 224, 224)


def normalise_inputs(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    """``example_inputs`` as a tuple of positional arguments; a zero image of the configured size where None."""
    if example_inputs is None:
        reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        example_inputs = torch.zeros(2, *input_size(model), device=reference.device, dtype=reference.dtype)
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if not any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
        raise ConfigError(
            "`example_inputs` must be a floating-point tensor such as torch.zeros(1, 3, 224, 224), or a tuple of the "
            f"model's arguments with one among them. Got {type(example_inputs).__name__}"
            + (f" of {args[0].dtype}." if args and isinstance(args[0], Tensor) else ".")
        )
    return args


def two_samples(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for a batch of two: with one sample a batch cannot be told from a dimension of length 1."""
    return tuple(a.new_zeros(2, *a.shape[1:]) if isinstance(a, Tensor) and a.dim() else a for a in args)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; each module's own mode comes back afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put back what tracing leaves in the modules' attributes: fake tensors in caches, copies of lists."""
    kept = ("_parameters", "_buffers", "_modules")
    before = [
        (m, {k: (v, copy.copy(v) if type(v) in (dict, list) else None) for k, v in vars(m).items() if k not in kept})
        for m in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in [n for n in vars(module) if n not in attributes and n not in kept]:
                del vars(module)[name]
            for name, (value, content) in attributes.items():
                vars(module)[name] = value
                if isinstance(value, dict) and content is not None:
                    value.clear()
                    value.update(content)
                elif isinstance(value, list) and content is not None:
                    value[:] = content


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Switch every gate in the model off."""
    states = [m.__dict__[GATING_STATE] for m in model.modules() if GATING_STATE in m.__dict__]
    before = [state.suspended for state in states]
    try:
        for state in states:
            state.suspended = True
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.suspended = value


def capture(model: nn.Module, args: tuple[Any, ...], *, dynamic_batch: bool = False) -> fx.GraphModule:
    """The eval-mode forward pass on ``args`` as a graph of ATen operators that reads the model's own parameters.

    Args:
        model: Any module `torch.export` can trace. Left as it was, training mode included; gates are not captured.
        args: Positional arguments.
        dynamic_batch: Let the first dimension of every tensor argument vary.

    Raises:
        ModelError: The model cannot be traced on these inputs.
    """
    shapes = None
    if dynamic_batch:
        shapes = tuple({0: torch.export.Dim.AUTO} if isinstance(a, Tensor) and a.dim() else None for a in args)
    try:
        with (
            TURNS.tracing(), _unchanged(model), evaluating(model), suspended(model), torch.no_grad(),
            warnings.catch_warnings(),
        ):  # fmt: skip
            # Of caches that a forward pass fills (attention biases, position grids): `_unchanged` takes them out again.
            warnings.filterwarnings("ignore", "The tensor attributes? ", UserWarning)
            program = _exported(model, args, shapes)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} could not be traced by torch.export on inputs of shape "
            f"{[tuple(a.shape) for a in args if isinstance(a, Tensor)]}: {_first_line(error)} "
            "Give `example_inputs` that the model accepts, and keep data-dependent Python branches out of forward()."
        ) from error
    takes = inspect.signature(program.module).parameters
    captured = program.module(check_guards=False) if "check_guards" in takes else program.module()
    _inline_contexts(captured)
    _name_modules_once(model, captured)
    replace_overwritten(captured)
    join_rms_norms(captured)
    join_response_norms(captured)
    return captured


def _exported(model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Any:
    # Up to torch 2.6 `export` goes through dynamo, which does not look into PyTorch's own modules, and so loses the
    # names of what is in an nn.Sequential.
    own = {"strict": False} if type(model).__module__.startswith("torch.") else {}
    return torch.export.export(model, args, dynamic_shapes=shapes, **own)  # type: ignore[arg-type]


def _name_modules_once(model: nn.Module, captured: fx.GraphModule) -> None:
    """A module that the model holds under several names is called by the first: it is one module that runs often."""
    first: dict[nn.Module, str] = {}
    names = {path: first.setdefault(module, path) for path, module in model.named_modules(remove_duplicate=False)}

    def name_of(path: str) -> str:
        # Up to torch 2.6 what a model finds by iterating over itself, as timm's FeatureListNet does, is called so.
        path = path if path in names else path.replace("_modules.", "")
        return names.get(path, path)

    for node in captured.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {key: (name_of(path), kind) for key, (path, kind) in stack.items()}


def _inline_contexts(captured: fx.GraphModule) -> None:
    """Put the bodies of ``torch.autocast(enabled=False)`` and ``torch.no_grad()`` blocks into the graph itself.

    Outside autocast, and without gradients, they change nothing; as opaque calls they would hide every layer inside.
    """
    names = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}
    for node in list(captured.graph.nodes):
        at = names.get(getattr(node.target, "__name__", "")) if node.op == "call_function" else None
        if at is None or (at == 4 and node.args[2]):  # autocast that is switched on does change the numbers
            continue
        body = getattr(captured, str(node.args[at].target))
        _inline_contexts(body)
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(inputs, node.args[at + 1 :], strict=True))
        with captured.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "output":
                    result = fx.map_arg(inner.args[0], env.__getitem__)
                elif inner.op == "get_attr":
                    name = f"{node.args[at].target}_{inner.target}".replace(".", "_")
                    setattr(captured, name, _fetch(body, str(inner.target)))
                    env[inner] = captured.graph.get_attr(name)
                elif inner.op != "placeholder":
                    env[inner] = captured.graph.node_copy(inner, env.__getitem__)
        for user in list(node.users):  # the block's results, picked one by one
            user.replace_all_uses_with(result[user.args[1]])
            captured.graph.erase_node(user)
        captured.graph.erase_node(node)
    captured.recompile()


def _fetch(module: Any, target: str) -> Any:
    for name in target.split("."):
        module = getattr(module, name)
    return module


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if text.endswith(".") else text + "."


def concrete(value: Any) -> int:
    """A plain integer from a size that may be symbolic (then: what it was for the example inputs)."""
    if isinstance(value, torch.SymInt):
        node: Any = value.node
        hint = getattr(node, "hint", None)
        return int(hint if hint is not None else node.shape_env.size_hint(node.expr))
    return int(value)


def module_path(node: fx.Node) -> list[str]:
    """Paths of the modules that were running when the node was recorded, outermost first; '' is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if not path.startswith("_empty_nn_module_stack")]
