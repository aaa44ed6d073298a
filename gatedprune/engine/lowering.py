"""Lower a captured graph: each site's operators become narrow ones, everything else stays what it was.

A value is narrow from the layer that writes its site until an operator that has no narrow form; there it is widened
(suppressed channels become zero) and the graph goes on as captured. So every model lowers, and what is not understood
costs speed, never correctness.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..functional import scale_channels
from ..gates import Gate
from ..sites import Analysis, SiteNodes, norm_options, operators
from . import narrow, narrow_norms, selection, winograd
from .constants import Constants
from .fusion import fuse, is_view
from .handlers import RESAMPLING, handler_of, resampling
from .layout import Layout, Layouts
from .rows import rows_apart

__all__ = ["lower"]


def lower(
    analysis: Analysis, gates: dict[str, Gate], native: bool = False, shared: bool = False, fused: bool = True,
    bfloat16: bool = False,
) -> fx.GraphModule:  # fmt: skip
    """The graph of ``analysis`` with its gated sites computed narrow.

    Args:
        analysis: Of the captured eval-mode graph.
        gates: Site name → gate; sites without one stay dense.
        native: Let the native backend compute what it can.
        shared: One active set for the whole batch.
        fused: Let layers take in what follows them.
        bfloat16: Let native layers multiply in bfloat16, where that pays.
    """
    lowering = Lowering(analysis, gates, native, shared, bfloat16)
    lowering.run()
    if fused:
        fuse(lowering.root, lowering.graph, lowering.shapes(), native)
    lowering.prune()
    return fx.GraphModule(lowering.root, lowering.graph)


class Lowering:
    """One pass over a captured graph; ``env`` maps its nodes to lowered ones, ``state`` says how each is held."""

    def __init__(self, analysis: Analysis, gates: dict[str, Gate], native: bool, shared: bool, bfloat16: bool) -> None:
        self.flow, self.gates, self.native, self.shared = analysis.flow, gates, native, shared
        self.bfloat16 = bfloat16
        self.sites = {name: analysis.sites[name] for name in gates}
        self.names = list(self.sites)
        self.layouts = Layouts(analysis, self.names)
        self.active = [None if gates[n].varies else gates[n].active_count for n in self.names]
        self.constants = Constants(self.flow)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        # None: full. A layout: narrow. A tuple: of each element (operators with several results).
        self.state: dict[fx.Node, Any] = {}
        self.selected: dict[str, tuple[fx.Node, fx.Node]] = {}
        self.indices: dict[tuple, fx.Node] = {}
        self.folded: dict[fx.Node, fx.Node] = {}
        self.gained: set[tuple[fx.Node, str]] = set()
        self.order = {n: i for i, n in enumerate(self.flow.graph_module.graph.nodes)}
        self.gain_at: dict[fx.Node, list[str]] = {}
        for name, found in self.sites.items():
            for gain in found.gains:
                self.gain_at.setdefault(gain, []).append(name)

    def run(self) -> None:
        source = self.flow.graph_module.graph
        self.graph.set_codegen(source._codegen)
        for node in source.nodes:
            if node.op in ("placeholder", "output"):
                self.env[node] = self.graph.node_copy(node, self.full)
            elif node.op == "get_attr":
                self.env[node] = self._constant(node)
            else:
                for name, found in self.sites.items():
                    if found.producer is node:
                        self._select(name, found)
                self.env[node] = self._lower(node)
            self.state.setdefault(node, None)

    def prune(self) -> None:
        """Take out the constants that no layer reads, and their views."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (node.op == "get_attr" or is_view(node)):
                self.graph.erase_node(node)
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        for name in [n for n, _ in self.root.named_buffers(recurse=False) if n not in used]:
            delattr(self.root, name)

    def shapes(self) -> dict[fx.Node, tuple]:
        """Lowered value → its shape with all channels, and which of them it has."""
        out: dict[fx.Node, tuple] = {}
        for node, value in self.env.items():
            state = self.state.get(node)
            if isinstance(node.meta.get("val"), Tensor) and not isinstance(state, tuple):
                out[value] = (tuple(self.flow.shape(node)), None if state is None else (state.dim, *state.key))
        return out

    # --- building blocks -------------------------------------------------------------------------------------------

    def _constant(self, node: fx.Node) -> fx.Node:
        value, name = self.constants.value(node), "constant_" + str(node.target).replace(".", "_")
        if isinstance(value, Tensor):
            self.root.register_buffer(name, value)
        else:
            setattr(self.root, name, value)
        return self.graph.get_attr(name)

    def module(self, name: str, module: nn.Module, args: tuple) -> fx.Node:
        path = name.replace(".", "/")
        while path in self.root._modules:
            path += "+"
        self.root.add_module(path, module)
        return self.graph.create_node("call_module", path, args, {})

    def name(self, node: fx.Node, what: str = "") -> str:
        paths = [p for p, _ in (node.meta.get("nn_module_stack") or {}).values()]
        return (paths[-1] if paths and paths[-1] else node.name) + (f"#{what}" if what else "")

    def index(self, layout: Layout) -> fx.Node:
        """The node that holds (B, n): the active channels of that layout."""
        sites = self.layouts.sites_in(layout)
        if self.layouts.identity(layout):
            return self.selected[self.names[sites[0]]][0]
        if layout.key not in self.indices:
            tables = [self.layouts.table(layout, s) for s in sites]
            fixed = torch.from_numpy((layout.site < 0).nonzero()[0])
            module = selection.ChannelIndex([t for t in tables if t is not None], fixed, layout.channels, self.native)
            args = tuple(self.selected[self.names[s]][0] for s in sites)
            self.indices[layout.key] = self.module(f"index#{len(self.indices)}", module, args)
        return self.indices[layout.key]

    def active_channels(self, layout: Layout) -> int | None:
        """n: how many channels a narrow tensor of that layout has; None where that varies from sample to sample."""
        total = int((layout.site < 0).sum())
        for site in self.layouts.sites_in(layout):
            table, count = self.layouts.table(layout, site), self.active[site]
            if count is None:
                return None
            total += 0 if table is None else count * table.shape[1]
        return total

    def full(self, node: fx.Node) -> fx.Node:
        """The lowered value with all its channels."""
        layout, value = self.state.get(node), self.env[node]
        if layout is None:
            return value
        return self.module(
            self.name(node, "widen"), narrow.Widen(layout.dim, layout.channels), (value, self.index(layout))
        )

    def _gain(self, layout: Layout, sites: list[str], active_only: bool, ones: bool = False) -> fx.Node:
        """(B, n): the product of those sites' gains (or masks) for each channel, or active channel, of a layout."""
        numbers = [self.names.index(s) for s in sites]
        if active_only and not ones and len(sites) == 1 and self.layouts.identity(layout):
            return self.selected[sites[0]][1]
        units = [
            torch.from_numpy(layout.unit.copy()).masked_fill(torch.from_numpy(layout.site != s), -1) for s in numbers
        ]
        args: list[fx.Node | None] = [self.index(layout) if active_only else None]
        for site in sites:
            active, gain = self.selected[site]
            args += [active, self.graph.call_function(torch.ones_like, (gain,)) if ones else gain]
        module = selection.ChannelGain(units, [self.layouts.counts[n] for n in numbers], self.native)
        return self.module("gain", module, tuple(args))

    def _select(self, name: str, found: SiteNodes) -> None:
        layout = self.state[found.gate_input]
        value = self.env[found.gate_input]
        if layout is None:  # what it sees, the layer behind it reads: without the channels that others have suppressed
            value = self._silenced(found.gate_input, value, self.wakened(found.producer).get(found.gate_input, []))
        args = (value,) if layout is None else (value, self.index(layout))
        both = self.module(
            f"{name}#gate", selection.Selector(self.gates[name], native=self.native, shared=self.shared), args
        )
        self.selected[name] = tuple(self.graph.call_function(operator.getitem, (both, i)) for i in (0, 1))  # type: ignore[assignment]

    # --- operators -------------------------------------------------------------------------------------------------

    def _lower(self, node: fx.Node) -> fx.Node:
        if node in self.folded:  # a batch norm that its layer has taken in
            source = self.folded[node]
            self.state[node] = self.state[source]
            return self._apply_gain(node, self.env[source])
        name = operators.op_name(node.target)
        if name in ("conv2d", "linear") and node in self.flow.macs:
            return self._layer(node, name)
        held = [a for a in node.all_input_nodes if self.state.get(a) is not None]
        if held:
            handler = handler_of(name)
            out = handler(self, node, held) if handler is not None else None
            if out is not None:
                return self._apply_gain(node, out)
        if self.native and name == "batch_norm" and not held and not self.wakened(node):
            affine, x = self.constants.affine(node), node.args[0]
            if affine is not None and node.meta["val"].dtype is torch.float32:
                module = narrow.NarrowAffine(affine[0].float(), affine[1].float(), native=True)
                return self._apply_gain(node, self.module(self.name(node), module, (self.env[x], None)))  # type: ignore[index]
        if name in RESAMPLING and not held and not self.wakened(node):
            own = resampling(self, node)
            if own is not None:
                return self._apply_gain(node, self.module(self.name(node), own, (self.env[node.args[0]],)))  # type: ignore[index]
        norm = self._masked_norm(node)
        return self._apply_gain(node, self._as_captured(node) if norm is None else norm)

    def _masked_norm(self, node: fx.Node) -> fx.Node | None:
        """A layer norm over a site that is held in full: its statistics are the active channels' all the same."""
        if not any(use.node is node for use in self.flow.norms):
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layout = self.layouts.of(source)
        if layout is None:
            return None
        weight, bias, eps, kind = norm_options(node)
        affine = [None if v is None else self.constants.value(v).clone() for v in (weight, bias)]
        module = narrow_norms.MaskedNorm(affine[0], affine[1], layout.dim, eps, kind)
        sites = [self.names[s] for s in self.layouts.sites_in(layout)]
        mask = self._gain(layout, sites, active_only=False, ones=True)
        return self.module(self.name(node), module, (self.full(source), mask))

    def _as_captured(self, node: fx.Node) -> fx.Node:
        values = {a: self.full(a) for a in node.all_input_nodes}
        reads = self.wakened(node)
        for value, sites in reads.items():
            values[value] = self._silenced(value, values[value], sites)
        return self.graph.node_copy(node, values.__getitem__)

    def _silenced(self, source: fx.Node, value: fx.Node, sites: list[str]) -> fx.Node:
        """``value``, which holds ``source`` in full, with those sites' suppressed channels set to zero."""
        layout = self.layouts.of(source)
        if layout is None or not sites:
            return value
        gain = self._gain(layout, sites, active_only=False, ones=True)
        return self.graph.call_function(scale_channels, (value, gain, layout.dim))

    def wakened(self, node: fx.Node) -> dict[fx.Node, list[str]]:
        """Full values that the operator reads whose suppressed channels are not zero: value → the sites to silence."""
        sites = [name for name, found in self.sites.items() if node in found.unsafe]
        out: dict[fx.Node, list[str]] = {}
        for value in node.all_input_nodes if sites else ():
            layout = self.layouts.of(value)
            if layout is not None and self.state.get(value) is None:
                inside = [self.names[s] for s in self.layouts.sites_in(layout)]
                out[value] = [s for s in sites if s in inside]
        return out

    def _apply_gain(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Multiply the gain of the sites whose gain point this is, unless their layer has it in its weights."""
        sites = [s for s in self.gain_at.get(node, ()) if (node, s) not in self.gained]
        if not sites:
            return value
        self.gained.update((node, s) for s in sites)
        held = self.state.get(node)
        layout = held or self.layouts.of(node)
        assert layout is not None
        gain = self._gain(layout, sites, active_only=held is not None)
        return self.graph.call_function(scale_channels, (value, gain, layout.dim))

    def _layer(self, node: fx.Node, name: str) -> fx.Node:
        """A layer with constant weights: narrow where its input or output is, else a plain module."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        if not all(self.constants.holds(a) for a in node.args[1:]):
            return self._apply_gain(node, self._as_captured(node))
        norm = self.constants.folding_norm(node)
        weight, bias = self.constants.layer(node, norm)
        if norm is not None:
            self.folded[norm] = node
        options = _conv_options(node) if name == "conv2d" else {}
        within = next((use.labels for use in self.flow.consumers if use.node is node), None)  # of each group alike
        grouped = options.get("groups", 1) != 1 and within is None
        out_layout = self.layouts.of(node)
        through = any(use.node is node for use in self.flow.through)
        if through or out_layout is not None and (not self.layouts.regular(out_layout) or not self._ready(out_layout)):
            out_layout = None
        in_layout = self.state.get(x)
        if in_layout is not None and through:
            return self._through(node, in_layout, _plain(name, weight, bias, options))
        if grouped and (in_layout is None or out_layout is None):
            out_layout = None  # groups are narrow on both sides or on neither
        value = self.env[x] if in_layout is not None and not (grouped and out_layout is None) else self.full(x)
        if grouped and out_layout is None:
            in_layout = None
        if in_layout is None:
            value = self._silenced(x, value, self.wakened(node).get(x, []) if value is self.env[x] else [])
        self.state[node] = out_layout
        shape = node.meta["val"].shape
        if in_layout is None and out_layout is None and not (self.native and _native_when_plain(name, shape, options)):
            return self._apply_gain(node, self.module(self.name(node), _plain(name, weight, bias, options), (value,)))
        fast = self.native and name == "conv2d" and winograd.pays(weight, options, shape[2:])
        positions = (shape[2:] if name == "conv2d" else shape[1:-1]).numel()
        # Below a vector of pixels, gathering the weights' pairs would take longer than multiplying by them.
        if self.native and self.bfloat16 and not fast and weight.shape[1] > 1 and positions >= 16:
            weight = weight.bfloat16()
        if self.native and norm is not None and not fast:  # without a norm it is the source model's own
            weight = rows_apart(weight)
        if name == "conv2d":
            module: nn.Module = narrow.NarrowConv2d(
                weight, bias, whole_groups=grouped, native=self.native, winograd=fast, **options
            )
        else:
            module = narrow.NarrowLinear(weight, bias, native=self.native)
        if in_layout is not None and within is not None and len(within) < in_layout.channels:
            in_layout = self.layouts.along(within, in_layout.dim)
        weight_gain = self._gain_in_weights(node, norm, out_layout)
        in_index = self.index(in_layout) if in_layout is not None and not grouped else None
        out_index = self.index(out_layout) if out_layout is not None else None
        return self._apply_gain(node, self.module(self.name(node), module, (value, in_index, out_index, weight_gain)))

    def _through(self, node: fx.Node, layout: Layout, module: nn.Module) -> fx.Node:
        """A layer that treats every channel alike: it runs on the active ones as it is."""
        x, after = node.args[0], self.layouts.of(node)
        assert isinstance(x, fx.Node) and after is not None and after.key == layout.key
        self.state[node] = after
        return self._apply_gain(node, self.module(self.name(node), module, (self.env[x],)))

    def _ready(self, layout: Layout) -> bool:
        return all(self.names[s] in self.selected for s in self.layouts.sites_in(layout))

    def _gain_in_weights(self, node: fx.Node, norm: fx.Node | None, layout: Layout | None) -> fx.Node | None:
        point = norm if norm is not None else node
        sites = self.gain_at.get(point, [])
        if layout is None or not sites or not any(self.gates[s].boost for s in sites):
            self.gained.update((point, s) for s in (sites if layout is not None else ()))
            return None
        self.gained.update((point, s) for s in sites)
        return self._gain(layout, sites, active_only=True)


def _conv_options(node: fx.Node) -> dict[str, Any]:
    stride, padding, dilation, groups = (*node.args[3:7], *[None] * 4)[:4] if len(node.args) > 3 else [None] * 4

    def pair(value: Any, default: int) -> Any:
        if value is None or isinstance(value, str):
            return (default, default) if value is None else value
        return tuple(value) if len(value) == 2 else (value[0], value[0])

    return {
        "stride": pair(stride, 1),
        "padding": pair(padding, 0),
        "dilation": pair(dilation, 1),
        "groups": 1 if groups is None else groups,
    }


def _native_when_plain(name: str, shape: torch.Size, options: dict[str, Any]) -> bool:
    """Whether a layer with all its channels is left to the native backend too.

    A convolution takes in what follows. A linear layer of one position, as classifiers are, is as fast as its weights
    come from memory (measured for 1 to 128 samples: 0.55 to 0.98 of the time of PyTorch's).
    """
    return options["groups"] == 1 if name == "conv2d" else len(shape) == 2


def _plain(name: str, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> nn.Module:
    """An ordinary layer with these parameters."""
    if name == "linear":
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        channels, kernel = (weight.shape[1] * options["groups"], weight.shape[0]), (weight.shape[2], weight.shape[3])
        layer = nn.Conv2d(*channels, kernel, bias=bias is not None, device="meta", **options)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
