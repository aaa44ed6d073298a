"""What each channel of a site contributes to a sample, next to what its gate sees of that sample."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from ..functional import subsample
from ..sites import Attach, Edge, Site
from ..wrapping import GatedModel

__all__ = ["Contributions", "reading_norms"]


def reading_norms(module: nn.Module, edge: Edge) -> Tensor | None:
    """Squared L2 norm of the weights that read each of an edge's channels, (n,); None where there are none to see."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    w = weight.detach().double()
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # (C_in, C_out/groups, …)
        norms = w.flatten(1).square().sum(1)
    else:  # (C_out, C_in/groups, …): the j-th input of group i is read by the outputs of that group
        norms = w.flatten(2).square().sum(2) if w.dim() > 2 else w.square()
        norms = norms.view(groups, -1, norms.shape[1]).sum(1).flatten()
    return norms if len(norms) == len(edge.units) else None


class _Energy:
    """Forward hook: adds a tensor's mean square, times the reading weights', to its site's units, sample by sample."""

    def __init__(self, site: Site, at: Attach, norms: Tensor | None, store: dict[str, Tensor], rows: dict[str, int]):
        self.site, self.at, self.norms, self.store, self.rows = site, at, norms, store, rows

    def add(self, x: Tensor) -> None:
        n = self.site.channels
        dim = self.at.channel_dim % x.dim()
        others = [d for d in range(1, x.dim()) if d != dim]
        # Squares of half-precision values overflow, and their sums lose digits.
        energy = x.detach().to(torch.promote_types(x.dtype, torch.float32)).square()
        energy = (energy.mean(others) if others else energy).double()
        samples = self.rows[self.site.name]
        if x.shape[0] != samples:  # windows are folded into the batch, sample by sample
            energy = energy.view(samples, -1, energy.shape[1]).mean(1)
        if self.norms is not None:
            energy = energy * self.norms.to(energy.device)
        units = self.at.units
        if units is not None:
            # Channels of other sites have unit −1, which the spare last place takes.
            spread = energy.new_zeros(samples, n + 1)
            energy = spread.index_add_(1, units.to(energy.device) % (n + 1), energy)[:, :n]
        name = self.site.name
        self.store[name] = self.store[name] + energy if name in self.store else energy


class _EnergyIn(_Energy):
    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.add(args[0] if args else next(iter(kwargs.values())))


class _EnergyOut(_Energy):
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.add(output)


class Contributions:
    """While entered, every forward pass of a gated model records what its gates see and what its channels give.

    A channel's contribution to a sample is its root mean square activation where it is read, times the norm of the
    weights that read it: the root mean square, over space, of what the reading layers would lose with it. Several
    readers, and the channels of a unit, add up in squares. Where a reader is no layer with weights of its own, the
    activation alone counts, where the gain is multiplied.

    Run the model with its gates suspended (`gatedprune.sites.suspended`): suppressed channels contribute nothing.

    Args:
        gated: A gated model.

    Attributes:
        seen: Site name → s(x), (B, C_in), float64, of the last forward pass.
        energy: Site name → squared contributions, (B, C), float64.
    """

    def __init__(self, gated: GatedModel) -> None:
        self.gated = gated
        self.seen: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self._rows: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def clear(self) -> None:
        """Forget the last forward pass; call it before the next."""
        self.seen.clear()
        self.energy.clear()
        self._rows.clear()

    def target(self, site: str) -> Tensor:
        """The contributions of a site's channels, (B, C), float64."""
        if site not in self.energy:
            raise ModelError(
                f"The forward pass did not run the layers that read the site {site}: nothing was recorded."
            )
        return self.energy[site].sqrt()

    def __enter__(self) -> Contributions:
        for site in self.gated.gated_sites:
            self._watch(site)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, site: Site) -> None:
        dim, signed = site.gate_at.channel_dim, self.gated.gates[site.name].signed

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._rows[site.name] = x.shape[0]
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            self.seen[site.name] = subsample(x, dim, signed).double()

        gate_at = self.gated.get_submodule(site.gate_at.path)
        self._handles.append(gate_at.register_forward_pre_hook(see, with_kwargs=True))
        readers = _readers(self.gated, site)
        for at, norms in readers or tuple((at, None) for at in site.gain_at):
            module = self.gated.get_submodule(at.path)
            options = (site, at, norms, self.energy, self._rows)
            if at.side == "input":
                self._handles.append(module.register_forward_pre_hook(_EnergyIn(*options), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(_EnergyOut(*options)))


def _readers(model: nn.Module, site: Site) -> Sequence[tuple[Attach, Tensor | None]]:
    """Where the site is read by linear layers with weights of their own, with those weights' squared norms."""
    found: list[tuple[Attach, Tensor | None]] = []
    for edge in site.consumers:
        module = model.get_submodule(edge.path)
        norms = reading_norms(module, edge)
        if norms is None:
            return []  # a reader that cannot be weighed: then all are left to the activation
        dim = 1 if edge.op.startswith("conv") else -1
        found.append((Attach(edge.path, "input", dim, edge.units), norms))
    return found
