"""Static pruning by the engine: the lowered graph for active sets that are the same for every input."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..wrapping import GatedModel
from . import narrow, selection
from .compact import CompactModel
from .lowering import lower

__all__ = ["FrozenModel", "freeze"]


def freeze(gated: nn.Module, active: Mapping[str, Tensor], example_inputs: tuple[Any, ...],
           gains: Mapping[str, Tensor] | None = None) -> FrozenModel:  # fmt: skip
    """A model whose sites hold fixed channels: ordinary layers with narrower weights and no gates.

    Args:
        gated: What `gatedprune.wrap` returned. Left as it is.
        active: Site name → (k,) the channels that stay, int64, ascending. Sites not named stay whole.
        example_inputs: Positional arguments to lower the model for at once; other sizes follow when they come.
        gains: Site name → (k,) what those channels are multiplied by; None: one.

    Raises:
        ModelError: The model is not gated, or cannot be traced.
    """
    if not isinstance(gated, GatedModel):
        raise ModelError(f"freeze() takes a model that gatedprune.wrap() returned, not a {type(gated).__name__}.")
    model = FrozenModel(gated, active, gains)
    model.prepare(*example_inputs)
    return model


class FrozenModel(CompactModel):
    """Computes the same channels for every input; made by `freeze`. Evaluation only: batch norms are folded."""

    def __init__(
        self, gated: GatedModel, active: Mapping[str, Tensor], gains: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(gated, "torch")
        self.active = {name: indices.detach().cpu().clone() for name, indices in active.items()}
        self.gains = {name: gain.detach().cpu().clone() for name, gain in (gains or {}).items()}

    def _settle(self, source: GatedModel) -> None:
        source.gate_modules.clear_matches()  # a static model is cut from the dense one

    def _graph(self, analysis: Any) -> fx.GraphModule:
        gates, fixed = {}, {}
        for name, indices in self.active.items():
            gates[name] = gate = self.gates[name]
            gain = self.gains.get(name)
            # Of the copy that is this model's own. Without a gain to multiply, nothing is multiplied.
            gate.active_count, gate.boost, gate.kind = len(indices), gain is not None, "topk"
            fixed[id(gate)] = indices, torch.ones(len(indices)) if gain is None else gain
        graph = lower(analysis, gates, fused=False)
        _fold(graph, fixed)
        return graph


def _fold(graph_module: fx.GraphModule, fixed: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Evaluate what depends on active sets alone; then cut the layers that read them."""
    graph, known = graph_module.graph, dict[fx.Node, Any]()
    for node in list(graph.nodes):
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, selection.Selector):
            indices, gain = fixed[id(module.gate)]
            known[node] = indices.to(module.gate.weight.device)[None], gain.to(module.gate.weight)[None]
        elif node.args and all(a in known for a in node.all_input_nodes) and node.all_input_nodes:
            args = fx.map_arg(node.args, known.__getitem__)
            if module is not None:
                known[node] = module(*args)
            elif node.op == "call_function" and (node.target is operator.getitem or node.target is torch.ones_like):
                known[node] = node.target(*args)
        elif isinstance(module, (narrow.NarrowConv2d, narrow.NarrowLinear)):
            _cut(graph_module, node, module, known)
    for number, (node, value) in enumerate(known.items()):
        if isinstance(value, Tensor) and any(user not in known for user in node.users):
            name = f"fixed{number}"
            graph_module.register_buffer(name, value)
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in known)
    for node in reversed(list(known)):
        graph.erase_node(node)
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()


def _cut(graph_module: fx.GraphModule, node: fx.Node, layer: Any, known: Mapping[fx.Node, Any]) -> None:
    """Put an ordinary layer with the active rows and columns in the place of a narrow one."""
    rest = [None if a is None else known[a] for a in (*node.args[1:4], None, None, None)[:3]]  # type: ignore[index]
    in_index, out_index, gain = rest
    grouped = isinstance(layer, narrow.NarrowConv2d) and layer.whole_groups
    weight, bias = narrow.gather_rows(layer.weight, layer.bias, in_index, out_index, gain, 0, grouped=grouped)
    if isinstance(layer, narrow.NarrowConv2d):
        groups = layer.groups
        if grouped and out_index is not None:
            groups = out_index.shape[1] * layer.groups // layer.out_channels
        options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        kernel: Any = layer.kernel_size
        new: nn.Module = nn.Conv2d(
            weight.shape[1] * groups, weight.shape[0], kernel, groups=groups, bias=bias is not None, device="meta",
            **options,
        )  # fmt: skip
    else:
        new = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias, requires_grad=False)
    graph_module.set_submodule(str(node.target), new)
    node.args = node.args[:1]
