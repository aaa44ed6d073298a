"""Values that depend on parameters alone, and the folding of batch norms into the layer before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..sites import operators
from ..sites.flow import Flow
from ..sites.labels import Const

__all__ = ["Constants"]


class Constants:
    """Evaluates the constant part of a captured graph, once."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._known: dict[fx.Node, Any] = {}
        self._dependent: set[fx.Node] | None = None

    def holds(self, node: Any) -> bool:
        """Whether the argument is no node, or a node that depends on parameters alone, not even on the batch size."""
        return not isinstance(node, fx.Node) or (self.unlabelled(node) and node not in self._of_inputs())

    def unlabelled(self, node: fx.Node) -> bool:
        """Whether the value has no channels that could be narrow: parameters, sizes and what is made of them."""
        value = self.flow.values.get(node)
        return isinstance(value, Const) or not isinstance(value, (Tensor, tuple))

    def _of_inputs(self) -> set[fx.Node]:
        """The nodes that depend on the model's inputs, be it on their shapes."""
        if self._dependent is None:
            self._dependent = set()
            for node in self.flow.graph_module.graph.nodes:
                if node.op == "placeholder" or not self._dependent.isdisjoint(node.all_input_nodes):
                    self._dependent.add(node)
        return self._dependent

    def value(self, node: Any) -> Any:
        """The value of a constant node; anything else as it is."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._known:
            if node.op == "get_attr":
                found: Any = self.flow.graph_module
                for name in str(node.target).split("."):
                    found = getattr(found, name)
                self._known[node] = found.detach() if isinstance(found, Tensor) else found
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
                with torch.no_grad():
                    self._known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._known[node]

    def affine(self, norm: fx.Node) -> tuple[Tensor, Tensor] | None:
        """An eval-mode batch norm as (scale, shift), each (C,) in float64; None where it uses the batch's."""
        _, weight, bias, mean, var, training, _, eps = (*norm.args, *[None] * 8)[:8]
        if training or mean is None or var is None or not all(self.holds(a) for a in (weight, bias, mean, var)):
            return None
        mean, var = self.value(mean).double(), self.value(var).double()
        scale = (var + eps).rsqrt()
        if weight is not None:
            scale = scale * self.value(weight).double()
        shift = -mean * scale
        return scale, shift if bias is None else shift + self.value(bias).double()

    def folding_norm(self, node: fx.Node) -> fx.Node | None:
        """The batch norm that alone reads the layer ``node``, if it can be folded into it."""
        users = list(node.users)
        if len(users) != 1 or operators.op_name(users[0].target) != "batch_norm" or users[0].args[0] is not node:
            return None
        return users[0] if self.affine(users[0]) is not None else None

    def layer(self, node: fx.Node, norm: fx.Node | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a convolution or linear node, with ``norm`` folded in (in float64, then rounded once).

        Without a norm they are the source model's own: nothing changes either, and a large model has many.
        """
        weight = self.value(node.args[1])
        bias = self.value(node.args[2]) if len(node.args) > 2 else self.value(node.kwargs.get("bias"))
        if norm is None:
            return weight.contiguous(), None if bias is None else bias.contiguous()
        affine = self.affine(norm)
        assert affine is not None
        scale, shift = affine
        folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        if bias is not None:
            shift = shift + bias.double() * scale
        return folded.to(weight.dtype), shift.to(weight.dtype)
