"""What each channel of a site contributes to a sample, next to what its gate sees of that sample."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ModelError
from ..functional import subsample
from ..sites import Attach, Site
from ..wrapping import GatedModel
from .reader import Reader, squared_weights, sum_by_unit

__all__ = ["Contributions"]


class Contributions:
    """While entered, forward passes of a gated model record what its gates see and what its sites' readers read.

    A channel's contribution to a sample is what the layers that read it would lose with it: the root mean square, over
    space, of its activation there, times the norm of the weights that read it. Several readers, and the channels of a
    unit, add up in squares. Where a reader is no layer with weights of its own, the activation alone counts, where the
    gain is multiplied.

    Channels do not add up, though: what several of them carry together is lost only when the last one goes, and what
    two of them cancel is gained with both. `costs` with an active set tells what each channel matters beside those.

    Run the model with its gates suspended (`gatedprune.sites.suspended`): suppressed channels contribute nothing. Set
    ``reading`` to False for a gated pass afterwards that shall replace ``seen`` only.

    Args:
        gated: A gated model.
        norms: Reader path → path of the batch norm behind it (`following_norms`): errors are then measured in that
            norm's output.
        matched: Those norms are matched to what is left (`Matching`): errors are those that remain then.

    Attributes:
        seen: Site name → s(x), (B, C_in), float64, of the last forward pass.
        reading: Whether forward passes record what readers read.
    """

    def __init__(self, gated: GatedModel, norms: Mapping[str, str] | None = None, matched: bool = True) -> None:
        self.gated = gated
        self.seen: dict[str, Tensor] = {}
        self.reading = True
        self._read: dict[str, list[tuple[Reader | Attach, Tensor]]] = {}
        self._handles: list[RemovableHandle] = []
        self._readers = {site.name: self._readers_of(site, norms or {}, matched) for site in gated.gated_sites}

    def clear(self) -> None:
        """Forget the last forward pass; call it before the next."""
        self.seen.clear()
        self._read.clear()

    def costs(self, site: str, active: Tensor | None = None) -> Tensor:
        """What the readers' outputs lose in squared error when each channel is suppressed rather than kept.

        Args:
            site: The site's name. active: (B, k), the channels that are there otherwise; None: all.

        Returns:
            (B, C), float64; never negative where all are there.
        """
        if site not in self._read:
            raise ModelError(
                f"The forward pass did not run the layers that read the site {site}: nothing was recorded."
            )
        samples, channels = len(self.seen[site]), self.gated.site_report[site].channels
        total = torch.zeros(samples, channels, dtype=torch.float64, device=self.seen[site].device)
        for reader, x in self._read[site]:
            if isinstance(reader, Reader):
                total += reader.costs(x, active, samples)
            else:
                total += _energy(reader, x, samples, channels)
        return total

    def target(self, site: str, active: Tensor | None = None) -> Tensor:
        """The contributions of a site's channels, (B, C), float64: the root of `costs`, with its sign."""
        costs = self.costs(site, active)
        return costs.sign() * costs.abs().sqrt()

    def __enter__(self) -> Contributions:
        for site in self.gated.gated_sites:
            self._watch(site)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _readers_of(self, site: Site, norms: Mapping[str, str], matched: bool) -> list[tuple[Attach, Reader | Attach]]:
        """Where the site is read by linear layers with weights of their own; if by others too, where the gain is."""
        found: list[tuple[Attach, Reader | Attach]] = []
        for edge in site.consumers:
            module = self.gated.get_submodule(edge.path)
            if squared_weights(module, edge) is None:
                break  # a reader that cannot be weighed: then all are left to the activation
            norm = self.gated.get_submodule(norms[edge.path]) if edge.path in norms else None
            reader = Reader(module, edge, site.channels, norm, matched)
            found.append((Attach(edge.path, "input", reader.dim, edge.units), reader))
        else:
            if found:
                return found
        return [(at, at) for at in site.gain_at]

    def _watch(self, site: Site) -> None:
        dim, signed = site.gate_at.channel_dim, self.gated.gates[site.name].signed

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
            self.seen[site.name] = subsample(x, dim, signed).double()

        gate_at = self.gated.get_submodule(site.gate_at.path)
        self._handles.append(gate_at.register_forward_pre_hook(see, with_kwargs=True))
        for at, reader in self._readers[site.name]:
            module = self.gated.get_submodule(at.path)
            if at.side == "input":
                hook = self._record_input(site.name, reader)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._record_output(site.name, reader)))

    def _record(self, site: str, reader: Reader | Attach, x: Tensor) -> None:
        if self.reading:  # a copy: what comes later may work in place
            self._read.setdefault(site, []).append((reader, x.detach().clone()))

    def _record_input(self, site: str, reader: Reader | Attach) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._record(site, reader, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _record_output(self, site: str, reader: Reader | Attach) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._record(site, reader, output)

        return hook


def _energy(at: Attach, x: Tensor, samples: int, channels: int) -> Tensor:
    """Mean square of each unit's activation, (B, C), float64."""
    dim = at.channel_dim % x.dim()
    others = [d for d in range(1, x.dim()) if d != dim]
    # Squares of half-precision values overflow, and their sums lose digits.
    energy = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    energy = (energy.mean(others) if others else energy).double()
    energy = energy.view(samples, -1, energy.shape[1]).mean(1)  # windows are folded into the batch, sample by sample
    return sum_by_unit(energy, at.units, channels)
