"""The Pareto plot of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .result import Comparison, Row

__all__ = ["draw", "front"]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, gain) that no other beats: none costs as little and gains more; by rising cost."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def draw(found: Comparison) -> Any:
    """The first metric over MACs and over milliseconds, with the Pareto front; without a metric, ms over MACs.

    Raises:
        ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'gatedprune[bench]'.") from error
    metric = found.metrics[0] if found.metrics else None
    costs: list[tuple[str, Callable[[Row], float]]] = [
        ("GMACs per sample", lambda row: row.macs.total / 1e9),
        (f"ms a batch of {found.rows[0].latency.batch}", lambda row: row.latency.median_ms),
    ]
    figure = Figure(figsize=(5.5 * (2 if metric else 1), 5), layout="constrained")
    panels = figure.subplots(1, 2 if metric else 1, squeeze=False)[0]
    for axes, (label, cost) in zip(panels, costs, strict=False):
        if metric is not None:
            _panel(axes, found, cost, lambda row: row.metrics.get(metric))
            points = [(cost(row), row.metrics[metric]) for row in found.rows if metric in row.metrics]
            best = [points[i] for i in front(points)]
            axes.plot(*zip(*best, strict=True), drawstyle="steps-post", color="0.7", zorder=0, label="Pareto front")
            axes.set(xlabel=label, ylabel=metric)
        else:
            _panel(axes, found, cost, costs[1][1])
            dense = found.rows[0]
            axes.plot([0, cost(dense)], [0, costs[1][1](dense)], "--", color="0.7", zorder=0, label="time as MACs")
            axes.set(xlabel=label, ylabel=costs[1][0], xlim=(0, None), ylim=(0, None))
        axes.set_title(found.model, fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _panel(axes: Any, found: Comparison, x: Callable[[Row], float], y: Callable[[Row], float | None]) -> None:
    """A star for the dense model, and a line over the ratios for each way to choose channels."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in found.rows:
        value = y(row)
        if value is not None:
            lines.setdefault(f"{row.kind}, {row.ranking}" if row.ranking else row.kind, []).append((x(row), value))
    for name, points in lines.items():
        style: dict[str, Any] = {"marker": "*", "color": "k", "markersize": 12} if name == "dense" else {"marker": "o"}
        if name.startswith("static,") and not name.startswith("static, then"):
            style.update(linestyle=":", markersize=4)
        axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
