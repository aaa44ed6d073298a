"""Labels: which removable unit each element of a tensor belongs to.

Every channel that a layer writes gets a label; operators carry labels along by being run on the integer label tensor
itself (a view, a permutation or a split moves labels exactly as it moves data), and channels that can only be removed
together have their labels united. A tensor of labels is kept as a broadcast (stride 0 along the dimensions over which
it is constant), so it costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

__all__ = ["WILD", "Const", "Join", "Units", "Use", "compress", "distinct", "number_pairs", "rebroadcast"]

WILD = -1  # an element that belongs to no unit and constrains none (padding, a class token)


def rebroadcast(labels: Tensor) -> Tensor:
    """The same labels with every dimension along which they are constant made a broadcast again."""
    small = labels
    for d in range(labels.dim()):
        if small.shape[d] > 1:
            first = small.narrow(d, 0, 1)
            if small.stride(d) == 0 or bool((small == first).all()):
                small = first
    return small.expand(labels.shape)


@dataclass(frozen=True)
class Const:
    """A value that depends on parameters and buffers only."""

    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Use:
    """One operator's dealing with units along one dimension: labels[j] is the unit of its channel j."""

    node: fx.Node
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Join:
    """An addition of two different sets of units at ``node``: of the labels ``left`` and ``right``.

    ``out`` are those of the sum: new ones where the residual stream begins or goes on (`Flow.joins`), the operands'
    own where branches are merged and their units united (`Flow.merged`).
    """

    node: fx.Node
    left: np.ndarray
    right: np.ndarray
    out: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """The operands' labels, each once."""
        both = np.unique(np.concatenate([self.left.ravel(), self.right.ravel()]))
        return both[both != WILD]


def compress(labels: Tensor) -> Tensor:
    """The same labels with every broadcast dimension cut to length 1."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())
    return labels[index] if labels.dim() else labels


def distinct(labels: np.ndarray) -> np.ndarray:
    """The labels that occur, ascending, each once: `numpy.unique` in one pass, as labels are small numbers."""
    if labels.size < 1024:
        return np.unique(labels)
    seen = np.zeros(int(labels.max()) + 2, dtype=bool)
    seen[labels] = True  # the last entry is WILD's: index -1
    found = np.flatnonzero(seen[:-1])
    return np.concatenate([[WILD], found]) if seen[-1] else found


def number_pairs(a: np.ndarray, b: np.ndarray) -> tuple[int, np.ndarray]:
    """How many different pairs two arrays of labels of one shape hold, and each place's pair by its rank.

    A map repeats itself: equal slices that follow one another are looked at once.
    """
    codes = (a + 1) * (int(b.max()) + 2) + b + 1
    places = []
    for d, size in enumerate(codes.shape):
        others = tuple(o for o in range(codes.ndim) if o != d)
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(codes, axis=d) != 0).any(others)]))
        codes = codes.take(starts, d)
        places.append(np.repeat(np.arange(len(starts)), np.diff([*starts, size])))
    found, ranks = np.unique(codes, return_inverse=True)
    return len(found), ranks.reshape(codes.shape)[np.ix_(*places)]


class Units:
    """A union-find over labels, vectorised; and what is known of each set (why it is pinned, whether it is added)."""

    def __init__(self) -> None:
        self._parent = np.append(np.arange(1023), WILD)  # WILD, as index -1, is its own parent
        self._size = 0
        self._flat = True  # whether every parent is a representative
        self._pins: list[tuple[np.ndarray, str]] = []

    def fresh(self, count: int) -> Tensor:
        """``count`` new labels, (count,)."""
        first, self._size = self._size, self._size + count
        while self._size >= len(self._parent):
            grown = np.arange(2 * len(self._parent))
            grown[: len(self._parent) - 1] = self._parent[:-1]
            grown[-1] = WILD
            self._parent = grown
        return torch.arange(first, self._size)

    def find(self, labels: Tensor | np.ndarray) -> np.ndarray:
        """The representative of each label; `WILD` stays `WILD`."""
        known = self._parent[: self._size]
        while not self._flat:
            up = known[known]
            self._flat = np.array_equal(up, known)
            known[:] = up
        return self._parent[labels.numpy() if isinstance(labels, Tensor) else labels]

    def union(self, a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> None:
        """Unite label by label; wild ones are left out."""
        ra, rb = self.find(a).ravel(), self.find(b).ravel()
        keep = (ra != rb) & (ra != WILD) & (rb != WILD)
        ra, rb = ra[keep], rb[keep]
        while ra.size:
            np.minimum.at(self._parent, np.maximum(ra, rb), np.minimum(ra, rb))
            self._flat = False
            # Linking may have dropped an edge whose root another edge claimed first: go on until all agree.
            na, nb = self.find(ra), self.find(rb)
            differ = na != nb
            ra, rb = na[differ], nb[differ]

    def pin(self, labels: Tensor | np.ndarray, reason: str) -> None:
        """These units must stay whole, for that reason."""
        x = distinct(labels.numpy() if isinstance(labels, Tensor) else labels)
        self._pins.append((x[x != WILD], reason))

    def pinned(self) -> dict[int, str]:
        """Representative → the first reason why its set is pinned."""
        out: dict[int, str] = {}
        for labels, reason in self._pins:
            for root in distinct(self.find(labels)).tolist():
                out.setdefault(root, reason)
        return out

    def varying(self, labels: Tensor) -> np.ndarray:
        """Representatives with every dimension along which they do not vary cut to length 1; wild ones do not count."""
        roots = self.find(compress(labels))
        for d in range(roots.ndim):
            if roots.shape[d] > 1:
                top = roots.max(axis=d, keepdims=True)  # WILD is below every label
                if ((roots == top) | (roots == WILD)).all():
                    roots = top
        return roots

    def unite_within(self, labels: Tensor, dims: tuple[int, ...]) -> None:
        """Unite everything that differs only in its position along ``dims``."""
        roots = self.find(compress(labels))
        keep = [d for d in range(roots.ndim) if d not in {d % roots.ndim for d in dims}]
        rows = np.moveaxis(roots, keep, range(len(keep))).reshape(int(np.prod([roots.shape[d] for d in keep])), -1)
        first = rows.max(axis=1, keepdims=True)
        self.union(np.broadcast_to(first, rows.shape), rows)

    def settle(self, labels: Tensor, dims: tuple[int, ...]) -> bool:
        """Make labels constant along ``dims``, which an operator runs over; False where all channels lie there.

        Where labels vary along other dimensions too (heads, the branches of split attention), what meets in the
        operator can only be removed together: it is united.
        """
        roots, over = self.varying(labels), {d % labels.dim() for d in dims}
        if all(roots.shape[d] == 1 for d in over):
            return True
        if all(s == 1 for d, s in enumerate(roots.shape) if d not in over):
            return False
        self.unite_within(labels, dims)
        return True

    def along(self, labels: Tensor, dim: int) -> np.ndarray:
        """One representative per position of ``dim``; labels that share a position are united.

        A layer that mixes channels reads position j of the channel dimension as one number per place; whatever lies
        there, anywhere in the map, can only be removed together.
        """
        dim %= labels.dim()
        small = compress(labels)
        if small.shape[dim] != labels.shape[dim]:
            small = small.expand(*[labels.shape[d] if d == dim else s for d, s in enumerate(small.shape)])
        rows = self.find(small.movedim(dim, 0).reshape(labels.shape[dim], -1))
        if rows.shape[1] > 1:
            first = rows.max(axis=1)  # WILD is below every label
            at, place = np.nonzero((rows != first[:, None]) & (rows != WILD))
            self.union(first[at], rows[at, place])
            return self.find(first)
        return rows[:, 0]

    def reduce(self, labels: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Labels after a reduction that keeps ``dims`` at length 1, and whether they were constant along them."""
        small = compress(labels)
        dims = tuple(d % labels.dim() for d in dims)
        if all(small.shape[d] == 1 for d in dims):
            shape = [1 if d in dims else s for d, s in enumerate(labels.shape)]
            return small.expand(shape), True
        roots = torch.from_numpy(self.find(small))
        top = roots.amax(dims, keepdim=True)
        constant = bool(((roots == top) | (roots == WILD)).all())
        shape = [1 if d in dims else s for d, s in enumerate(labels.shape)]
        return top.expand(shape), constant
