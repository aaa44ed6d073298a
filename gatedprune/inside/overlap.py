"""`choices`: which channels single images use, and which they share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import ConfigError
from ..files import write_json
from .record import chosen_channels, gates_of, is_untouched
from .table import aligned

__all__ = ["Choices", "SiteChoices", "choices"]


@dataclass(frozen=True, eq=False)
class SiteChoices:
    """What several inputs choose at one site.

    Attributes:
        mask: (N, C), bool: which channels win for which input.
    """

    mask: np.ndarray

    @property
    def channels(self) -> int:
        """C."""
        return self.mask.shape[1]

    @property
    def active(self) -> tuple[int, ...]:
        """Winners of each input."""
        return tuple(self.mask.sum(1).tolist())

    @property
    def shared(self) -> int:
        """Channels that win for every input."""
        return int(self.mask.all(0).sum())

    @property
    def unused(self) -> int:
        """Channels that win for none of the inputs."""
        return int((~self.mask.any(0)).sum())

    def only(self, number: int) -> int:
        """Channels that win for that input and for no other."""
        return int((self.mask[number] & (self.mask.sum(0) == 1)).sum())

    @property
    def overlap(self) -> float:
        """Channels shared over channels used (Jaccard), mean over all pairs of inputs: 1 where they choose alike."""
        pairs = itertools.combinations(self.mask, 2)
        return float(np.mean([(a & b).sum() / max((a | b).sum(), 1) for a, b in pairs]))


@dataclass(frozen=True, eq=False)
class Choices:
    """What `choices` returns; prints as a table.

    Attributes:
        names: What to call the inputs, N of them.
        sites: Site name → which channels they choose there.
        untouched: No gate looks at its input yet: the gates need calibration or training.
    """

    names: tuple[str, ...]
    sites: Mapping[str, SiteChoices]
    untouched: bool = False

    def __getitem__(self, site: str) -> SiteChoices:
        if site not in self.sites:
            raise KeyError(f"No site {site!r}. Sites: {', '.join(self.sites)}.")
        return self.sites[site]

    def __str__(self) -> str:
        letters = [_letter(i) for i in range(len(self.names))]
        rows = [["site", "channels", "active", "all share", *(f"only {x}" for x in letters), "none", "overlap"]]
        for name, site in self.sites.items():
            active = "/".join(map(str, dict.fromkeys(site.active)))
            only = [str(site.only(i)) for i in range(len(self.names))]
            rows.append([name, str(site.channels), active, str(site.shared), *only, str(site.unused),
                         f"{site.overlap:.2f}"])  # fmt: skip
        lines = [f"{letter}: {name}" for letter, name in zip(letters, self.names, strict=True)]
        lines += [
            *aligned(rows),
            "overlap: channels shared over channels used, mean over pairs; 1 where all choose alike",
        ]
        if self.untouched:
            lines.append("The gates are untouched: they choose alike for every input. Calibrate or train them first.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: for each site and input the winners' indices."""
        sites = {
            name: {"channels": site.channels, "shared": site.shared, "overlap": site.overlap,
                   "active": [np.flatnonzero(row).tolist() for row in site.mask]}
            for name, site in self.sites.items()
        }  # fmt: skip
        return {"inputs": list(self.names), "untouched": self.untouched, "sites": sites}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, whole or not at all."""
        write_json(self.to_dict(), path)

    def plot(self, path: str | Path, pictures: Sequence[Any] | None = None) -> None:
        """Draw a strip of C cells for each site, coloured by who uses the channel; to a .png, .svg or .pdf file.

        Two inputs share a strip: used by the first, the second, both, none. Of more inputs each has a strip of its own.

        Args:
            path: The file.
            pictures: The N images themselves, (H, W, 3) arrays or PIL images, to be drawn on top.

        Raises:
            ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
        """
        from .plots import plot_choices

        plot_choices(self, path, pictures)


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else str(number)


def choices(model: nn.Module, images: Tensor | tuple[Any, ...], names: Sequence[str] | None = None) -> Choices:
    """Which channels each of a few inputs uses at each site.

    Args:
        model: A gated model, or a compact one. In eval mode, without gradients.
        images: (N, C, H, W) with N ≥ 2, or a tuple of the model's arguments for a batch of N.
        names: What to call the inputs; default: their numbers.

    Raises:
        ModelError: The model is not gated.
        ConfigError: Fewer than two inputs, or not a name for each.
    """
    gates = gates_of(model, "choices()")
    args = images if isinstance(images, tuple) else (images,)
    count = next((len(a) for a in args if isinstance(a, Tensor)), 0)
    if count < 2:
        raise ConfigError(f"choices() lays inputs side by side: give it at least two. Got {count}.")
    if names is not None and len(names) != count:
        raise ConfigError(f"`names` of choices() must name {count} inputs. Got {len(names)} names.")
    device = next(iter(gates.values())).weight.device
    chosen = chosen_channels(model, tuple(a.to(device) if isinstance(a, Tensor) else a for a in args))
    labels = tuple(map(str, range(count))) if names is None else tuple(map(str, names))
    return Choices(labels, {name: SiteChoices(mask.numpy()) for name, mask in chosen.items()}, is_untouched(gates))
