"""What `find_sites` returns: sites, where their gates attach, and a report that can be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..config import GateConfig, predictor_size

__all__ = ["Attach", "Edge", "Layer", "NormAt", "Site", "SiteReport"]


@dataclass(frozen=True, eq=False)
class Edge:
    """A layer that a site narrows.

    Attributes:
        path: Module path of the layer.
        op: The operator: "conv2d", "linear", "batch_norm", …
        dim: Which dimension of its weight: 0 for what it writes or carries, 1 for what it reads.
        units: (n,), the site channel of each of the layer's n channels in that dimension; −1: not of this site.
    """

    path: str
    op: str
    dim: int
    units: Tensor


@dataclass(frozen=True, eq=False)
class Attach:
    """A place at a module's boundary: its only input (``"input"``) or its output (``"output"``).

    ``units`` maps the channels along ``channel_dim`` to site channels; None where no map is needed. ``fate`` is what
    becomes of the value's memory: "kept", nothing writes over it; "rectified", its only reader, a rectifier, does;
    None: something else may.
    """

    path: str
    side: str
    channel_dim: int
    units: Tensor | None = None
    fate: str | None = None


@dataclass(frozen=True, eq=False)
class NormAt:
    """A norm over all channels of a site, to be computed over the active ones only.

    Attributes:
        source: Where its input can be seen. outputs: where its output can be replaced.
        weight, bias: Names of its parameters in the model, or None.
        eps: Its ε. kind: "layer", "rms", "group" or "response" (see `gatedprune.functional.masked_norm`).
    """

    source: Attach
    outputs: tuple[Attach, ...]
    weight: str | None
    bias: str | None
    eps: float
    kind: str


@dataclass(frozen=True, eq=False)
class Site:
    """A channel dimension of ``channels`` channels that may be narrowed, with everything coupled to it.

    Attributes:
        name: Module path of the first producer.
        kind: "inner" (no residual addition, x + f(x), joins its producers) or "stream" (its winners are added to the
            stream).
        channels: C: how many units can be suppressed one by one; a unit may be several channels (a group).
        in_channels: Channels of the tensor that enters the first producer: what the gate sees.
        producers, carriers, consumers: The layers that write, carry and read the site.
        gate_at: Where the gate looks. gain_at: where the gain is multiplied. masks: where suppressed channels, woken
            by a bias or an activation with f(0) ≠ 0, are silenced again. norms: layer norms whose statistics are the
            active channels'.
        silenced: Whether all layers that read the site, gates included, do so behind ``masks``. Suppressed channels
            keep their values up to there: in training a batch norm on the way would take zeros for values.
        branches: Paths of the producers that write the site each on their own, and whose outputs are added up: each
            takes the gain. Just the first producer where nothing is added.
        macs: Multiply-accumulates per sample of the layers that the site narrows, dense.
        share: `macs` as a share of the model's.
    """

    name: str
    kind: str
    channels: int
    in_channels: int
    producers: tuple[Edge, ...]
    carriers: tuple[Edge, ...]
    consumers: tuple[Edge, ...]
    gate_at: Attach
    gain_at: tuple[Attach, ...]
    masks: tuple[Attach, ...]
    macs: int
    share: float
    norms: tuple[NormAt, ...] = ()
    branches: tuple[str, ...] = ()
    silenced: bool = False

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Every layer of the site."""
        return self.producers + self.carriers + self.consumers


@dataclass(frozen=True, eq=False)
class Layer:
    """An operator that multiplies and accumulates, and which part of it each site narrows.

    Attributes:
        path: Module path of the layer; of a matrix product the module that calls it.
        op: The operator: "conv2d", "linear", "matmul", …
        macs: Dense MACs per sample.
        writes: Site → share of the output's channels (of a grouped convolution its groups, of a product of attention
            its heads) that it narrows.
        reads: Site → share of the input's channels that it narrows.
    """

    path: str
    op: str
    macs: int
    writes: Mapping[str, float] = field(default_factory=dict)
    reads: Mapping[str, float] = field(default_factory=dict)

    def macs_with(self, kept: Mapping[str, float]) -> int:
        """MACs per sample where each site keeps that share of its channels; sites not named keep all."""
        written, read = (sum(v * (1 - kept.get(s, 1)) for s, v in d.items()) for d in (self.writes, self.reads))
        return round(self.macs * (1 - written) * (1 - read))


@dataclass(frozen=True, eq=False)
class SiteReport:
    """The sites of a model, and for every other layer why it is not gated. Iterable, sized, printable.

    Attributes:
        model: The model's class name.
        sites: The sites, in the order in which the model computes them.
        skipped: Module path → why no site begins there.
        macs: Dense MACs of the model's convolutions and linear layers, per sample.
        macs_in_sites: Those of the layers that some site narrows.
        layers: Every operator that has MACs, with the part of it that each site narrows.
    """

    model: str
    sites: tuple[Site, ...]
    skipped: dict[str, str] = field(default_factory=dict)
    macs: int = 0
    macs_in_sites: int = 0
    layers: tuple[Layer, ...] = ()

    def macs_left(self, ratio: float | Mapping[str, float] = 0.5, rank: int | None = None) -> int:
        """MACs per sample of the model gated at ``ratio``, predictors included: arithmetic, nothing is run.

        Args:
            ratio: As in `gatedprune.wrap`: a number for all sites, or a mapping from name patterns to numbers.
            rank: Of predictors, as in `gatedprune.wrap`.
        """
        config = GateConfig(ratio=ratio, rank=rank)
        asked = {s.name: (s.channels, config.ratio_for(s.name)) for s in self.sites}
        return self.macs_with({n: config.active_count(c, r) for n, (c, r) in asked.items() if r is not None}, rank)

    def macs_with(self, active: Mapping[str, int], rank: int | None = None) -> int:
        """MACs per sample where each site named keeps that many channels, chosen by a gate whose predictor has at most
        that rank; the others are whole."""
        gated = [s for s in self.sites if s.name in active]
        kept = {s.name: active[s.name] / s.channels for s in gated}
        predictors = sum(predictor_size(s.channels, s.in_channels, rank) for s in gated)
        return sum(layer.macs_with(kept) for layer in self.layers) + predictors

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(f"No site {name!r}. Sites: {', '.join(s.name for s in self.sites) or 'none'}.")

    def __str__(self) -> str:
        share = self.macs_in_sites / self.macs if self.macs else 0.0
        width = max([len(s.name) for s in self.sites] + [len(p) for p in self.skipped] + [4])
        lines = [
            f"{self.model}: {len(self.sites)} sites; "
            f"{share:.1%} of {self.macs / 1e6:,.0f} MMACs lie in layers that they narrow",
            f"{'site':<{width}}  kind    channels  gate sees  MAC share  narrows",
        ]
        for s in self.sites:
            layers = ", ".join(dict.fromkeys(e.path for e in s.edges if e.op != "batch_norm"))
            lines.append(
                f"{s.name:<{width}}  {s.kind:<6}  {s.channels:>8}  {s.in_channels:>9}  {s.share:>9.1%}  {layers}"
            )
        if self.skipped:
            lines.append("not gated:")
            lines += [f"{path:<{width}}  {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


def identity_units(units: np.ndarray, channels: int) -> bool:
    """Whether channel j is unit j, for every j."""
    return len(units) == channels and bool((units == np.arange(channels)).all())
