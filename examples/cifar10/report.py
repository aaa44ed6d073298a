"""What came of the trainings: a table, accuracy over MACs and over milliseconds, and time at equal accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gatedprune.files import atomic_write
from gatedprune.finetune import WAYS, Trials

__all__ = ["COSTS", "CostRatio", "Point", "at_equal_accuracy", "draw", "measure_times", "points", "table"]


@dataclass(frozen=True)
class Point:
    """One way at one share of the MACs, over all seeds.

    Attributes:
        way: "dense", "static" or "dynamic".
        asked: The share of the dense MACs that was asked for.
        macs: The share that is left, predictors included.
        top1: Accuracy in percent, of each seed.
        ms: Median time of one image in milliseconds, of each seed that was timed.
    """

    way: str
    asked: float
    macs: float
    top1: tuple[float, ...]
    ms: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else 0.0

    @property
    def time(self) -> float | None:
        """Milliseconds, the median over the seeds."""
        return statistics.median(self.ms) if self.ms else None


def points(trials: Trials, times: Mapping[tuple[str, float, int], float]) -> list[Point]:
    """One for each way and share of which all trainings are done."""
    found: dict[tuple[str, float], list[Any]] = {}
    for run in trials:
        found.setdefault((run.way, run.budget), []).append((run, run.result))
    done = {key: runs for key, runs in found.items() if all(result is not None for _, result in runs)}
    return [
        Point(way, share, statistics.fmean(r["macs"] / r["dense_macs"] for _, r in runs),
              tuple(r["top1"] for _, r in runs),
              tuple(times[way, share, run.seed] for run, _ in runs if (way, share, run.seed) in times))
        for (way, share), runs in done.items()
    ]  # fmt: skip


def measure_times(
    trials: Trials, *, size: tuple[int, int], threads: int, repeats: int, say: Callable[[str], None]
) -> dict[tuple[str, float, int], float]:
    """Milliseconds of one image, in one process, all models of a seed in turns; dynamic by the compact engine, after it
    was checked against the masked model.

    Returns:
        (way, share, seed) → the median.
    """
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size)
    found: dict[tuple[str, float, int], float] = {}
    for seed in trials.seeds:
        if any(trial.result is None for trial in trials if trial.seed == seed):
            continue
        say(f"timing seed {seed}")
        table = trials.compare(image, seed, threads=threads, repeats=repeats)
        for trial in trials:
            if trial.seed == seed:
                name = trial.way if trial.way == "dense" else f"{trial.way} @ {trial.budget:g}"
                found[trial.way, trial.budget, seed] = table[name].latency.median_ms
    return found


COSTS: dict[str, Callable[[Point], float | None]] = {"MACs": lambda p: p.macs, "time": lambda p: p.time}
"""What accuracy is set against."""


class CostRatio(NamedTuple):
    """What dynamic costs as a share of `of` at the same accuracy.

    Attributes:
        ratio: Dynamic's cost over the other's.
        of: "static"; or, where nothing static is as accurate, the most accurate of static and dense.
        reached: Whether the other is as accurate as dynamic. Where not, the ratio favours the other.
    """

    ratio: float
    of: str
    reached: bool


def at_equal_accuracy(found: Sequence[Point], cost: Callable[[Point], float | None]) -> dict[float, CostRatio]:
    """What dynamic costs as a share of the least that static costs at the same accuracy, the dense network counted as
    static: a point as accurate, or one more and one less accurate with the cost interpolated between them.

    Returns:
        The share of MACs asked for → the ratio of costs; none for a dynamic point less accurate than all static ones.
    """
    static = [(p.mean, c, p) for p in found if p.way in ("dense", "static") and (c := cost(p)) is not None]
    ratios = {}
    for point in found:
        mine = cost(point)
        below = [(top1, c) for top1, c, _ in static if top1 <= point.mean]
        above = [(top1, c) for top1, c, _ in static if top1 >= point.mean]
        if point.way != "dynamic" or mine is None or not below:
            continue
        if above:
            between = [cheap + (dear - cheap) * (point.mean - low) / (high - low)
                       for low, cheap in below for high, dear in above if low < high]  # fmt: skip
            ratios[point.asked] = CostRatio(mine / min([c for _, c in above] + between), "static", True)
        else:
            _, other, best = max(static, key=lambda entry: entry[0])
            name = best.way if best.way == "dense" else f"{best.way} at {best.asked:g}"
            ratios[point.asked] = CostRatio(mine / other, name, False)
    return ratios


def table(found: Sequence[Point]) -> str:
    """Markdown: a row for each point, then the ratios at equal accuracy."""
    lines = ["| | MACs asked for | MACs left | top-1, mean ± standard deviation | of each seed | ms |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for p in found:
        each = ", ".join(f"{t:.2f}" for t in p.top1)
        ms = "" if p.time is None else f"{p.time:.3f}"
        lines.append(f"| {p.way} | {p.asked:g} | {p.macs:.3f} | {p.mean:.2f} ± {p.spread:.2f} | {each} | {ms} |")
    for name, cost in COSTS.items():
        for asked, (ratio, of, reached) in at_equal_accuracy(found, cost).items():
            lines += ["", f"At the accuracy of dynamic at {asked:g}, dynamic needs {ratio:.2f} of static's {name}."
                      if reached else
                      f"Nothing static is as accurate as dynamic at {asked:g}. "
                      f"Of the most accurate, {of}, dynamic needs {ratio:.2f} of the {name}."]  # fmt: skip
    return "\n".join(lines)


def draw(found: Sequence[Point], file: Path) -> None:
    """Accuracy over MACs and over milliseconds: a line for static and one for dynamic, both from the dense point.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'gatedprune[bench]'`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"MACs": "share of the dense MACs", "time": "ms for one image"}
    for axes, (name, cost) in zip(panels, COSTS.items(), strict=True):
        for way in WAYS:
            line = sorted(
                (c, p.mean, p.spread) for p in found if p.way in ("dense", way) and (c := cost(p)) is not None
            )
            if line:
                x, y, spread = zip(*line, strict=True)
                axes.errorbar(x, y, spread, marker="o", capsize=3, label=way)
        for p in found:
            if p.way == "dense" and (c := cost(p)) is not None:
                axes.plot([c], [p.mean], "k*", markersize=12, label="dense", zorder=3)
        axes.set(xlabel=labels[name], ylabel="top-1 [%]", xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    atomic_write(file, lambda path: figure.savefig(path, format=file.suffix[1:] or "png", dpi=120))
