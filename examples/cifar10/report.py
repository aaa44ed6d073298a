"""What came of the trainings: a table, accuracy over MACs and over milliseconds, and time at equal accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gatedprune.files import atomic_write
from gatedprune.finetune import WAYS, Trials

__all__ = ["Point", "at_equal_accuracy", "draw", "measure_times", "points", "table"]


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


def at_equal_accuracy(found: Sequence[Point], cost: Callable[[Point], float | None]) -> dict[float, float]:
    """What dynamic costs as a share of what static costs at the same accuracy, interpolated between static's points.

    Returns:
        The share of MACs asked for → the ratio of costs. Where dynamic is more accurate than anything static reached,
        the dense model's cost stands for static's; where it is less accurate than all, there is none.
    """
    static = sorted((p.mean, c) for p in found if p.way in ("dense", "static") and (c := cost(p)) is not None)
    ratios = {}
    for point in found:
        mine = cost(point)
        if point.way != "dynamic" or mine is None or len(static) < 2 or point.mean < static[0][0]:
            continue
        wanted = static[-1][1]
        for (low, cheap), (high, dear) in zip(static, static[1:], strict=False):
            if low <= point.mean <= high:
                wanted = cheap if high == low else cheap + (dear - cheap) * (point.mean - low) / (high - low)
                break
        ratios[point.asked] = mine / wanted
    return ratios


def table(found: Sequence[Point]) -> str:
    """Markdown: a row for each point, then the ratios at equal accuracy."""
    lines = ["| | MACs asked for | MACs left | top-1, mean ± standard deviation | of each seed | ms |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for p in found:
        each = ", ".join(f"{t:.2f}" for t in p.top1)
        ms = "" if p.time is None else f"{p.time:.3f}"
        lines.append(f"| {p.way} | {p.asked:g} | {p.macs:.3f} | {p.mean:.2f} ± {p.spread:.2f} | {each} | {ms} |")
    for name, cost in (("MACs", lambda p: p.macs), ("time", lambda p: p.time)):
        for asked, ratio in at_equal_accuracy(found, cost).items():
            lines += ["", f"At the accuracy of dynamic at {asked:g}, dynamic needs {ratio:.2f} of static's {name}."]
    return "\n".join(lines)


def draw(found: Sequence[Point], file: Path) -> None:
    """Accuracy over MACs and over milliseconds: a line for static and one for dynamic, both from the dense point.

    Raises:
        ImportError: matplotlib is not installed (`pip install 'gatedprune[bench]'`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    costs: list[tuple[str, Callable[[Point], float | None]]] = [
        ("share of the dense MACs", lambda p: p.macs), ("ms for one image", lambda p: p.time),
    ]  # fmt: skip
    for axes, (label, cost) in zip(panels, costs, strict=True):
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
        axes.set(xlabel=label, ylabel="top-1 [%]", xlim=(0, None))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    atomic_write(file, lambda path: figure.savefig(path, format=file.suffix[1:] or "png", dpi=120))
