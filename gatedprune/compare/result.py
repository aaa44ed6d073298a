"""What a comparison found: rows, and how they are printed, written and drawn."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import atomic_write, write_json
from ..measure import Environment, Latency, MacCount, Memory
from .equality import Equality

__all__ = ["Comparison", "Row", "aligned"]


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Args:
        name: "dense", "static", "dynamic", …; with the ranking, and the ratio where there are several.
        macs: MACs per sample that are really executed, by layer.
        parameters: Numbers in the model's parameters; of the dynamic model, those of all channels and its
            gates.
        latency: Time of one call on the whole batch.
        metrics: What the `evaluate` function returned.
        kind: "dense", "static", "dynamic" or "static, then dynamic".
        ranking: What ranked the channels that were pruned statically; "" where none were.
        ratio: The uniform ratio, where one was asked for.
        memory: Of one call on the whole batch.
        equality: Of a dynamic model: compact against masked, as checked before the timing.
    """

    name: str
    macs: MacCount
    parameters: int
    latency: Latency
    metrics: dict[str, float]
    kind: str = ""
    ranking: str = ""
    ratio: float | None = None
    memory: Memory | None = None
    equality: Equality | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; prints as a table, and draws itself in a notebook.

    Args:
        rows: Dense first, then for each ratio static and dynamic.
        equality: Compact against masked, as checked before the timing; of several dynamic models, the worst.
        active: Site name → (k, C): how many channels are kept, of how many; of several ratios, at the first.
        dynamic_only: The gated sites on the residual stream, which static pruning leaves whole: torch-pruning
            can only remove a channel of the stream from all of its producers at once.
        inputs: Shapes of the example inputs.
        environment: Machine, versions and commit.
        notes: What else a reader must know.
        model: Name of the model.
    """

    rows: tuple[Row, ...]
    equality: Equality
    active: dict[str, tuple[int, int]]
    dynamic_only: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    environment: Environment
    notes: tuple[str, ...] = field(default=())
    model: str = ""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"No row {name!r}. Rows: {', '.join(row.name for row in self.rows)}.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what was measured by the `evaluate` function."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.metrics))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        rows = [
            {
                **dataclasses.asdict(row),
                "memory": None if row.memory is None else row.memory.to_dict(),
                "equality": None if row.equality is None else row.equality.to_dict(),
            }
            for row in self.rows
        ]
        return {**dataclasses.asdict(self), "rows": rows, "equality": self.equality.to_dict()}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, in one piece: a crash leaves the old file, or none."""
        write_json(self.to_dict(), path)

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each row to a file, in one piece: plain numbers; MACs per sample, ms a call, bytes."""
        head = ["name", "kind", "ranking", "ratio", "macs", "macs_predictors", "macs_flop_counter", "parameters",
                "ms_median", "ms_p20", "ms_p80", "bytes_peak", "bytes_weights", *self.metrics]  # fmt: skip
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(head)
        for row in self.rows:
            memory = (None, None) if row.memory is None else (row.memory.peak, row.memory.weights)
            latency = row.latency
            writer.writerow([row.name, row.kind, row.ranking, row.ratio, row.macs.total, row.macs.predictors,
                             row.macs.operators, row.parameters, latency.median_ms, latency.p20_ms, latency.p80_ms,
                             *memory, *(row.metrics.get(name) for name in self.metrics)])  # fmt: skip
        atomic_write(path, lambda temporary: Path(temporary).write_text(text.getvalue(), encoding="utf-8", newline=""))

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the Pareto plots: the first metric over MACs and over milliseconds; without a metric, ms over MACs.

        Args:
            path: Also write it there, whole or not at all: a .png, .svg or .pdf file.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed (`pip install gatedprune[bench]`).
        """
        from .pareto import draw  # matplotlib is optional

        figure = draw(self)
        if path is not None:
            atomic_write(path, figure.savefig)
        return figure

    def __str__(self) -> str:
        lines = aligned(self._table())
        lines.insert(1, "─" * max(len(line) for line in lines))
        return "\n".join([*lines, *self._footer()])

    def _repr_html_(self) -> str:
        """The table, and where matplotlib is installed the plot, for notebooks."""
        head, *body = self._table()
        cells = "".join(f"<th style='text-align:right'>{html.escape(text)}</th>" for text in head)
        lines = [f"<table><thead><tr>{cells}</tr></thead><tbody>"]
        for first, *rest in body:
            numbers = "".join(f"<td style='text-align:right'>{html.escape(text)}</td>" for text in rest)
            lines.append(f"<tr><th style='text-align:left'>{html.escape(first)}</th>{numbers}</tr>")
        lines.append("</tbody></table>")
        lines += [f"<div><small>{html.escape(text)}</small></div>" for text in self._footer()]
        try:
            figure = self.plot()
        except ImportError:
            return "\n".join(lines)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        return "\n".join([*lines, drawn.getvalue()[drawn.getvalue().index("<svg") :]])

    def _table(self) -> list[list[str]]:
        dense = self.rows[0]
        with_memory = any(row.memory is not None for row in self.rows)
        memory = ["peak MB"] if with_memory else []
        table = [
            ["", "MMACs", "predictors", "M params", *memory, "ms", "p20–p80", "MACs/dense", "ms/dense", *self.metrics]
        ]
        for row in self.rows:
            latency = row.latency
            table.append([
                row.name,
                f"{row.macs.total / 1e6:,.1f}",
                f"{row.macs.predictors / 1e6:,.2f}" if row.macs.predictors else "–",
                f"{row.parameters / 1e6:,.2f}",
                *([f"{row.memory.peak / 1e6:,.1f}" if row.memory else "–"] if with_memory else []),
                f"{latency.median_ms:,.2f}",
                f"{latency.p20_ms:,.2f}–{latency.p80_ms:,.2f}",
                f"{row.macs.total / dense.macs.total:.2f}" if dense.macs.total else "–",
                f"{latency.median_ms / dense.latency.median_ms:.2f}",
                *(f"{row.metrics[name]:.4g}" if name in row.metrics else "–" for name in self.metrics),
            ])  # fmt: skip
        return table

    def _footer(self) -> list[str]:
        latency = self.rows[0].latency
        machine = self.environment.accelerator if latency.device != "cpu" else self.environment.processor
        threads = f", {latency.threads} thread{'s' if latency.threads > 1 else ''}" if latency.device == "cpu" else ""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.inputs)
        kept, channels = (sum(pair[i] for pair in self.active.values()) for i in (0, 1))
        several = "at the first ratio " if len({row.ratio for row in self.rows[1:]}) > 1 else ""
        lines = [
            f"MACs per sample; ms a batch of {latency.batch}, median of {latency.repeats}, input {shapes}, "
            f"{machine}{threads}, torch {self.environment.packages['torch']}",
            f"{len(self.active)} sites keep {several}{kept} of {channels} channels: static the same for all inputs, "
            f"dynamic chosen for each; compact equals masked to {self.equality.float64:.0e} (float64)",
        ]
        if any(row.memory is not None for row in self.rows):
            lines.append("peak MB: weights, and what PyTorch's allocator hands out at the worst moment of a call")
        if self.dynamic_only:
            lines.append(f"{len(self.dynamic_only)} of them, on the residual stream, stay whole in the static model")
        return [*lines, *self._about_macs(), *self.notes]

    def _about_macs(self) -> list[str]:
        """Whether thop's layers and PyTorch's counter of operators see the same, and if not, why."""
        said: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.macs.notes:
                said.setdefault(note, []).append(row.name)
        lines = [f"MACs of {', '.join(names)}: {note}" for note, names in said.items()]
        if all(row.macs.total == row.macs.operators for row in self.rows):
            lines.insert(
                0, "MACs by thop's walk through the layers; torch.utils.flop_counter sees the same in every row"
            )
        else:
            gaps = ", ".join(f"{r.name} {r.macs.operators / 1e6:,.1f}" for r in self.rows
                             if r.macs.total != r.macs.operators)  # fmt: skip
            lines.insert(0, f"MMACs by torch.utils.flop_counter, where it sees others: {gaps}")
        return lines


def aligned(table: list[list[str]]) -> list[str]:
    """Lines of text: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in table
    ]  # fmt: skip
