"""`usage`: how often each channel wins over a data set, and for which classes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..files import atomic_write, write_json
from .record import arguments_and_labels, chosen_channels, class_name, gates_of, is_untouched
from .table import aligned

__all__ = ["SiteUsage", "Usage", "usage"]

_LEGEND = (
    "active: winners of an input; always, never: channels that win for every, for no input; entropy: of winning or",
    "not, bits a channel, 0 where all inputs choose alike; in common: winners that two inputs share; by chance: k²/C",
)


@dataclass(frozen=True, eq=False)
class SiteUsage:
    """How often each channel of one site wins.

    Attributes:
        counts: (C,), int64: for how many inputs each channel wins.
        samples: N, how many inputs there were.
        class_counts: (classes, C), int64: the same for the inputs of each class; None without labels.
        class_samples: (classes,), int64: how many inputs of each class there were; None without labels.
    """

    counts: np.ndarray
    samples: int
    class_counts: np.ndarray | None = None
    class_samples: np.ndarray | None = None

    @property
    def channels(self) -> int:
        """C."""
        return len(self.counts)

    @property
    def share(self) -> np.ndarray:
        """(C,), float64: the share of inputs for which each channel wins."""
        return self.counts / self.samples

    @property
    def class_share(self) -> np.ndarray:
        """(classes, C), float64: the share of each class's inputs for which a channel wins; NaN for an empty class.

        Raises:
            DataError: There were no labels.
        """
        if self.class_counts is None or self.class_samples is None:
            raise DataError("Wins by class need labels: give usage() batches of (images, labels).")
        with np.errstate(invalid="ignore"):
            return self.class_counts / self.class_samples[:, None]

    @property
    def active(self) -> float:
        """Mean number of winners of an input."""
        return float(self.counts.sum()) / self.samples

    @property
    def always(self) -> np.ndarray:
        """Indices of the channels that win for every input, ascending."""
        return np.flatnonzero(self.counts == self.samples)

    def dead(self, below: float = 0.0) -> np.ndarray:
        """Indices of the channels that win for at most that share of the inputs, ascending; 0: that never win."""
        return np.flatnonzero(self.counts <= below * self.samples + 1e-9)

    @property
    def entropy(self) -> float:
        """Entropy of winning or not, in bits, mean over channels: 0 where all inputs choose alike, 1 at most."""
        p = self.share
        p = p[(p > 0) & (p < 1)]
        return float((p * np.log2(1 / p) + (1 - p) * np.log2(1 / (1 - p))).sum()) / self.channels

    @property
    def common(self) -> float | None:
        """Mean number of winners that two different inputs have in common; None with one input."""
        return _common(self.counts, np.array(self.samples))

    @property
    def common_by_chance(self) -> float:
        """The same if every input drew its winners blindly: k²/C."""
        return self.active**2 / self.channels

    @property
    def common_in_class(self) -> float | None:
        """The same for two different inputs of one class; None without labels, or with no two inputs of a class."""
        if self.class_counts is None or self.class_samples is None:
            return None
        return _common(self.class_counts, self.class_samples)


def _common(counts: np.ndarray, samples: np.ndarray) -> float | None:
    """Σ n(n − 1) over channels and groups, over the number of ordered pairs: exact, without going through pairs."""
    pairs = int((samples * (samples - 1)).sum())
    return float((counts * (counts - 1)).sum()) / pairs if pairs else None


@dataclass(frozen=True, eq=False)
class Usage:
    """What `usage` returns; prints as a table.

    Attributes:
        model: The model's class name.
        samples: How many inputs were seen.
        sites: Site name → its counts, in the order in which the model computes them.
        classes: Names of the classes; None without labels.
        untouched: No gate looks at its input yet: the gates need calibration or training.
    """

    model: str
    samples: int
    sites: Mapping[str, SiteUsage]
    classes: tuple[str, ...] | None = None
    untouched: bool = False

    def __getitem__(self, site: str) -> SiteUsage:
        if site not in self.sites:
            raise KeyError(f"No site {site!r}. Sites: {', '.join(self.sites)}.")
        return self.sites[site]

    def __str__(self) -> str:
        rows = [["site", "channels", "active", "always", "never", "entropy", "in common", "by chance"]]
        if self.classes is not None:
            rows[0].append("in class")
        for name, site in self.sites.items():
            row = [name, str(site.channels), f"{site.active:.1f}", str(len(site.always)), str(len(site.dead()))]
            row += [f"{site.entropy:.2f}", _number(site.common), f"{site.common_by_chance:.1f}"]
            rows.append(row + ([_number(site.common_in_class)] if self.classes is not None else []))
        named = "" if self.classes is None else f" of {len(self.classes)} classes"
        lines = [f"{self.model}: {len(self.sites)} gates on {self.samples} inputs{named}", *aligned(rows)]
        lines += _LEGEND
        if self.untouched:
            lines.append("The gates are untouched: they choose alike for every input. Calibrate or train them first.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, counts included."""
        sites = {}
        for name, site in self.sites.items():
            sites[name] = {
                "channels": site.channels, "active": site.active, "entropy": site.entropy, "common": site.common,
                "common_by_chance": site.common_by_chance, "common_in_class": site.common_in_class,
                "always": site.always.tolist(), "never": site.dead().tolist(), "counts": site.counts.tolist(),
                "class_counts": None if site.class_counts is None else site.class_counts.tolist(),
            }  # fmt: skip
        first = next(iter(self.sites.values()), None)
        per_class = None if first is None or first.class_samples is None else first.class_samples.tolist()
        return {
            "model": self.model, "samples": self.samples, "untouched": self.untouched,
            "classes": None if self.classes is None else list(self.classes), "class_samples": per_class, "sites": sites,
        }  # fmt: skip

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, whole or not at all."""
        write_json(self.to_dict(), path)

    def to_csv(self, path: str | Path) -> None:
        """Write one line a channel: site, channel, wins, share, and with labels the wins of each class."""
        classes = list(self.classes or ())

        def write(name: str) -> None:
            with open(name, "w", encoding="utf-8", newline="") as stream:
                out = csv.writer(stream)
                out.writerow(["site", "channel", "wins", "share", *classes])
                for key, site in self.sites.items():
                    by_class = np.empty((0, site.channels)) if site.class_counts is None else site.class_counts
                    for channel, (count, *rest) in enumerate(np.vstack([site.counts, by_class]).T.astype(int).tolist()):
                        out.writerow([key, channel, count, count / self.samples, *rest])

        atomic_write(path, write)

    def to_npz(self, path: str | Path) -> None:
        """Write the arrays for NumPy: ``SITE`` (C,), with labels ``SITE/classes`` (classes, C), and ``samples``."""
        arrays: dict[str, Any] = {"samples": np.array(self.samples)}
        for name, site in self.sites.items():
            arrays[name] = site.counts
            if site.class_counts is not None:
                arrays[f"{name}/classes"], arrays["class_samples"] = site.class_counts, site.class_samples

        def write(name: str) -> None:
            with open(name, "wb") as stream:  # savez would add .npz to another suffix
                np.savez_compressed(stream, **arrays)

        atomic_write(path, write)

    def plot(self, path: str | Path) -> None:
        """Draw, for each site, how many channels win for what share of the inputs; to a .png, .svg or .pdf file.

        Raises:
            ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
        """
        from .plots import plot_usage

        plot_usage(self, path)

    def plot_classes(self, path: str | Path, sites: Sequence[str] | None = None) -> None:
        """Draw classes × channels for each site (default: all): the share of a class's inputs that a channel wins for.

        Raises:
            DataError: There were no labels. KeyError: An unknown site.
            ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
        """
        from .plots import plot_classes

        plot_classes(self, path, sites)


def usage(model: nn.Module, batches: Iterable[Any], *, classes: Sequence[str] | None = None,
          inputs: Callable[[Any], Any] | None = None) -> Usage:  # fmt: skip
    """Count for how many inputs each channel of each site wins. Eval mode, no gradients; nothing of the model changes.

    Args:
        model: A gated model, or a compact one.
        batches: Tensors (B, …), or tuples that begin with one; where a tuple's second element is a tensor of integers
            (B,), these are the labels, and wins are counted for each class too.
        classes: Names of the classes, by label; default: their numbers.
        inputs: From an element of ``batches`` to the model's argument, or to a tuple of them; then without labels.

    Raises:
        ModelError: The model is not gated.
        ConfigError: ``classes`` are fewer than the labels name.
        DataError: No batches, elements without a tensor, negative labels, or labels in some batches only.
    """
    gates = gates_of(model, "usage()")
    device = next(iter(gates.values())).weight.device
    totals = {name: _Total(gate.channels) for name, gate in gates.items()}
    per_class, samples, labelled = np.zeros(0, np.int64), 0, set()
    for batch in batches:
        args, labels = arguments_and_labels(batch, device, inputs, "usage()")
        chosen = chosen_channels(model, args)
        if labels is not None and len(labels):
            if int(labels.min()) < 0:
                raise DataError(f"The labels of usage() must not be negative. Got {int(labels.min())}.")
            per_class = _added(per_class, np.bincount(labels.numpy()))
        labelled.add(labels is not None)
        for name, mask in chosen.items():
            totals[name].add(mask, labels)
        samples += len(next(iter(chosen.values())))
    if not samples:
        raise DataError("The `batches` of usage() are empty: give it at least one input.")
    if len(labelled) > 1:
        raise DataError("Some batches of usage() have labels and others do not: give all of them labels, or none.")
    names = _names(classes, len(per_class)) if labelled == {True} else None
    if names is not None:
        per_class = _added(np.zeros(len(names), np.int64), per_class)
    sites = {
        name: SiteUsage(total.counts, samples, *((total.by_class(len(names)), per_class) if names is not None else ()))
        for name, total in totals.items()
    }
    return Usage(class_name(model), samples, sites, names, is_untouched(gates))


class _Total:
    """The wins of one site, all in all and by class."""

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros(channels, np.int64)
        self.classes = np.zeros((0, channels), np.int64)

    def add(self, mask: Tensor, labels: Tensor | None) -> None:
        self.counts += mask.sum(0).numpy()
        if labels is not None and len(labels):
            found = torch.zeros(int(labels.max()) + 1, mask.shape[1], dtype=torch.int64)
            self.classes = _added(self.classes, found.index_add_(0, labels, mask.long()).numpy())

    def by_class(self, classes: int) -> np.ndarray:
        return _added(np.zeros((classes, len(self.counts)), np.int64), self.classes)


def _added(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays whose first dimensions may differ in length."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    out = longer.copy()
    out[: len(shorter)] += shorter
    return out


def _names(classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if classes is None:
        return tuple(str(i) for i in range(count))
    if len(classes) < count:
        raise ConfigError(f"`classes` of usage() names {len(classes)} classes, but there are labels up to {count - 1}.")
    return tuple(str(name) for name in classes)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
