"""Which channels a narrow tensor holds, as a function of the sites' active sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from ..sites import Analysis

__all__ = ["Layout", "Layouts"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Channels of a value along ``dim``: site and unit of each; site −1 where it belongs to no gated site.

    ``dim`` 0 where they are folded into the batch (B·C, …), sample by sample.

    ``channels`` counts all of them. Two layouts with the same ``key`` hold the same channels in the same order.
    """

    dim: int
    site: np.ndarray
    unit: np.ndarray

    @property
    def channels(self) -> int:
        return len(self.site)

    @property
    def key(self) -> tuple[bytes, bytes]:
        return self.site.tobytes(), self.unit.tobytes()


class Layouts:
    """Look-up from labels to layouts, for the sites that carry a gate."""

    def __init__(self, analysis: Analysis, names: list[str]) -> None:
        self.flow, self.names = analysis.flow, names
        self.counts = [analysis.sites[n].site.channels for n in names]
        self._of: dict[int, tuple[int, int]] = {}
        for i, name in enumerate(names):
            for unit, root in enumerate(analysis.sites[name].roots.tolist()):
                self._of[root] = (i, unit)

    def of(self, node: fx.Node) -> Layout | None:
        """The layout of a value; None where no channel of it belongs to a gated site, or they lie across dimensions."""
        labels = self.flow.labelled(node)
        return None if labels is None else self.of_labels(labels)

    def of_labels(self, labels: Tensor) -> Layout | None:
        """The layout of a value with these labels."""
        small = self.flow.units.varying(labels)
        dims = [d for d, s in enumerate(small.shape) if s > 1]
        if len(dims) != 1:
            return None
        if dims[0] == 0:
            rows = small.reshape(self.flow.batch, -1) if len(small) % self.flow.batch == 0 else small[None]
            return self.along(rows[0], 0) if (rows == rows[0]).all() and len(rows) == self.flow.batch else None
        return self.along(small.reshape(-1), dims[0])

    def along(self, labels: np.ndarray, dim: int) -> Layout | None:
        """The layout of these labels along ``dim``."""
        pairs = [self._of.get(int(r), (-1, -1)) for r in self.flow.units.find(labels)]
        site, unit = (np.array(column) for column in zip(*pairs, strict=True))
        return Layout(dim, site, unit) if (site >= 0).any() else None

    def sites_in(self, layout: Layout) -> list[int]:
        """Numbers of the sites that the layout depends on."""
        return sorted(set(layout.site[layout.site >= 0].tolist()))

    def table(self, layout: Layout, site: int) -> Tensor | None:
        """(C, m): the channels of each unit; None where units differ in their number of channels here."""
        at = np.flatnonzero(layout.site == site)
        units = layout.unit[at]
        counts = np.bincount(units, minlength=self.counts[site])
        if counts.min() != counts.max():
            return None
        return torch.from_numpy(at[np.argsort(units, kind="stable")].reshape(len(counts), -1).copy())

    def regular(self, layout: Layout) -> bool:
        """Whether every sample keeps the same number of channels, so that a narrow tensor has a shape."""
        return all(self.table(layout, s) is not None for s in self.sites_in(layout))

    def identity(self, layout: Layout) -> bool:
        """Whether channel j is simply unit j of one site: then its active set is the index."""
        sites = self.sites_in(layout)
        return (
            len(sites) == 1
            and layout.channels == self.counts[sites[0]]
            and bool((layout.unit == np.arange(layout.channels)).all())
        )
