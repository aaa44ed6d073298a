"""Where a value of the graph can be touched from outside: as a module's input or output."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, fx

from .capture import module_path
from .flow import Flow

__all__ = ["Boundaries"]


class Boundaries:
    """Which nodes ran inside each module call, and which labelled values cross the call's border."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._inside: dict[str, dict[fx.Node, None]] = defaultdict(dict)
        self._entering: dict[str, list[fx.Node]] = {}
        self._calls: dict[str, set[str]] = defaultdict(set)
        self._paths: dict[fx.Node, list[str]] = {}
        for node in flow.graph_module.graph.nodes:
            self._paths[node] = module_path(node)
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                self._inside[path][node] = None
                self._calls[path].add(key)

    def innermost(self, node: fx.Node) -> str:
        """Path of the module whose forward() called the operator."""
        paths = self._paths[node]
        return paths[-1] if paths else ""

    def paths(self, node: fx.Node) -> list[str]:
        """Paths of the modules around the operator, outermost first."""
        return self._paths[node]

    def once(self, path: str) -> bool:
        """Whether the module was called exactly once in the forward pass."""
        return len(self._calls[path]) == 1

    def inputs(self, path: str) -> list[fx.Node]:
        """The labelled values that enter the module's call, in order of use."""
        if path not in self._entering:
            inside = self._inside[path]
            outer = (arg for node in inside for arg in node.all_input_nodes if arg not in inside)
            self._entering[path] = list(dict.fromkeys(a for a in outer if self._labelled(a)))
        return self._entering[path]

    def _labelled(self, node: fx.Node) -> bool:
        return isinstance(self.flow.values.get(node), (Tensor, tuple))

    def outputs(self, path: str) -> list[fx.Node]:
        """The labelled values that leave the module's call."""
        inside = self._inside[path]
        return [n for n in inside if any(u not in inside for u in n.users) and self._labelled(n)]

    def input_hook(self, node: fx.Node) -> tuple[str, fx.Node] | None:
        """The innermost module around ``node`` that is called once on a single value: its path and that value."""
        path = self.innermost(node)
        if not path or not self.once(path):
            return None
        entering = self.inputs(path)
        return (path, entering[0]) if len(entering) == 1 else None

    def reach(self, value: fx.Node) -> list[tuple[str, str]] | None:
        """Module boundaries that together cover every use of ``value``: [(path, "output" or "input"), …]."""
        path = self.innermost(value)
        if (
            path
            and self.once(path)
            and self.outputs(path) == [value]
            and not any(u in self._inside[path] for u in value.users)
        ):
            return [(path, "output")]
        found: dict[tuple[str, str], None] = {}
        for user in value.users:
            if user.op == "output":
                return None
            outer = set(self._paths[value])
            candidates = [p for p in self._paths[user] if p not in outer and self.once(p) and self.inputs(p) == [value]]
            if not candidates:
                return None
            found[(candidates[0], "input")] = None
        return list(found) or None
