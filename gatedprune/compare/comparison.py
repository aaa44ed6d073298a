"""Dense, static and dynamic side by side: MACs, parameters, wall-clock time, and what the user measures."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import GateConfig
from ..engine import compact
from ..errors import ConfigError, DataError
from ..measure import (
    Environment,
    Latency,
    MacCount,
    count_macs,
    count_parameters,
    environment,
    measure_latency,
)
from ..sites import evaluating, normalise_inputs
from ..wrapping import GatedModel, is_gated, wrap
from .equality import Equality, check_equality
from .static import dense_copy, prune_static
from .surgery import Importance

__all__ = ["Comparison", "Row", "compare", "compare_models"]

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class Row:
    """One model of a comparison.

    Args:
        name: "dense", "static" or "dynamic".
        macs: MACs per sample that are really executed, by layer.
        parameters: Numbers in the model's parameters; of the dynamic model, those of all channels and its
            gates.
        latency: Time of one call on the whole batch.
        metrics: What the `evaluate` function returned.
    """

    name: str
    macs: MacCount
    parameters: int
    latency: Latency
    metrics: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; prints as a table.

    Args:
        rows: Dense, static and dynamic, in this order.
        equality: Compact against masked, as checked before the timing.
        active: Site name → (k, C): how many channels are kept, of how many.
        dynamic_only: The gated sites on the residual stream, which static pruning leaves whole: torch-pruning
            can only remove a channel of the stream from all of its producers at once.
        inputs: Shapes of the example inputs.
        environment: Machine, versions and commit.
        notes: What else a reader must know.
    """

    rows: tuple[Row, ...]
    equality: Equality
    active: dict[str, tuple[int, int]]
    dynamic_only: tuple[str, ...]
    inputs: tuple[tuple[int, ...], ...]
    environment: Environment
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"No row {name!r}. Rows: {', '.join(row.name for row in self.rows)}.")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**dataclasses.asdict(self), "equality": self.equality.to_dict()}

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file, in one piece: a crash leaves the old file, or none."""
        write_json(self.to_dict(), path)

    def __str__(self) -> str:
        dense = self.rows[0]
        metrics = list(dict.fromkeys(name for row in self.rows for name in row.metrics))
        table = [["", "MMACs", "predictors", "M params", "ms", "p20–p80", "MACs/dense", "ms/dense", *metrics]]
        for row in self.rows:
            latency = row.latency
            table.append([
                row.name,
                f"{row.macs.total / 1e6:,.1f}",
                f"{row.macs.predictors / 1e6:,.2f}" if row.macs.predictors else "–",
                f"{row.parameters / 1e6:,.2f}",
                f"{latency.median_ms:,.2f}",
                f"{latency.p20_ms:,.2f}–{latency.p80_ms:,.2f}",
                f"{row.macs.total / dense.macs.total:.2f}" if dense.macs.total else "–",
                f"{latency.median_ms / dense.latency.median_ms:.2f}",
                *(f"{row.metrics[name]:.4g}" if name in row.metrics else "–" for name in metrics),
            ])  # fmt: skip
        widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in table
        ]  # fmt: skip
        lines.insert(1, "─" * max(len(line) for line in lines))
        return "\n".join([*lines, *self._footer()])

    def _footer(self) -> list[str]:
        latency = self.rows[0].latency
        machine = self.environment.accelerator if latency.device != "cpu" else self.environment.processor
        threads = f", {latency.threads} thread{'s' if latency.threads > 1 else ''}" if latency.device == "cpu" else ""
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.inputs)
        kept, channels = (sum(pair[i] for pair in self.active.values()) for i in (0, 1))
        lines = [
            f"MACs per sample; ms a batch of {latency.batch}, median of {latency.repeats}, input {shapes}, "
            f"{machine}{threads}, torch {self.environment.packages['torch']}",
            f"{len(self.active)} sites keep {kept} of {channels} channels: static the same for all inputs, "
            f"dynamic chosen for each; compact equals masked to {self.equality.float64:.0e} (float64)",
        ]
        if self.dynamic_only:
            lines.append(f"{len(self.dynamic_only)} of them, on the residual stream, stay whole in the static model")
        return [*lines, *self.notes]


def write_json(value: dict[str, Any], path: str | Path) -> None:
    """Write JSON in one piece: a crash leaves the old file, or none."""
    target = Path(path)
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def compare(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ratio: float | Mapping[str, float] | None = None,
    config: GateConfig | None = None,
    evaluate: Evaluate | None = None,
    importance: Importance | None = None,
    threads: int | None = 1,
    warmup: int = 3,
    repeats: int = 20,
) -> Comparison:
    """Compare the dense model with its static and its dynamic pruning: same sites, same k, one table.

    Nothing is trained here. For a fair reading of metrics after fine-tuning, train each model with the same
    budget and hand the three to `gatedprune.compare.compare_models`.

    Args:
        model: A dense model, or one gated already (then its gates say sites and k). Stays as it is.
        example_inputs: What to count and time with: a tensor (B, …) or a tuple of arguments.
        ratio: Share of channels suppressed, for a dense model; default 0.5.
        config: All options of gating, for a dense model, instead of `ratio`.
        evaluate: Takes a model, returns named numbers, such as an accuracy; called once a row. The dynamic
            row gets the compact model.
        importance: What ranks channels for static pruning; see `prune_static`.
        threads: Threads for one operator while timing; None: as they are.
        warmup: Rounds before timing starts.
        repeats: Rounds that are timed.

    Raises:
        ConfigError: An option is out of its domain, or is given for a model that is gated already.
        ModelError: No site was found, torch-pruning fails, or the compact model does not equal the masked
            one: then nothing is timed.
        ImportError: torch-pruning or thop is not installed (`pip install gatedprune[compare]`).
    """
    inputs = _inputs(model, example_inputs)
    gated = copy.deepcopy(model)
    if is_gated(gated):
        if ratio is not None or config is not None:
            raise ConfigError(
                "`ratio` and `config` of compare() are for dense models; this one is gated already. "
                "Leave them out, or change the gates with model.set_ratio()."
            )
    else:
        options: dict[str, Any] = {"config": config} if config is not None else {}
        if ratio is not None or config is None:
            options["ratio"] = 0.5 if ratio is None else ratio
        gated = wrap(gated, example_inputs=inputs, **options)
    static = prune_static(gated, importance=importance, example_inputs=inputs)
    found = compare_models(
        dense_copy(gated), static.model, gated, inputs,
        evaluate=evaluate, threads=threads, warmup=warmup, repeats=repeats,
    )  # fmt: skip
    notes = (f"static: cut by gatedprune, batch norms folded, since {static.why}",) if static.why else ()
    return dataclasses.replace(found, notes=notes)


def compare_models(
    dense: nn.Module,
    static: nn.Module,
    gated: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    evaluate: Evaluate | None = None,
    threads: int | None = 1,
    warmup: int = 3,
    repeats: int = 20,
) -> Comparison:
    """Compare three models that are there already, each fine-tuned as you like.

    Args:
        dense: The model without pruning.
        static: The statically pruned one, from `prune_static`.
        gated: The gated one, from `wrap`; compacted here.
        example_inputs, evaluate, threads, warmup, repeats: As in `compare`.

    Raises:
        ConfigError: `gated` has no gates, or a number is out of its domain.
        ModelError: The compact model does not equal the masked one.
        ImportError: thop is not installed (`pip install gatedprune[compare]`).
    """
    if not isinstance(gated, GatedModel):
        raise ConfigError("`gated` of compare_models() has no gates: pass a model that gatedprune.wrap returned.")
    inputs = _inputs(gated, example_inputs)
    fast = compact(gated, inputs)
    equality = check_equality(gated, fast, inputs)
    models = {"dense": dense, "static": static, "dynamic": fast}
    parameters = {"dense": dense, "static": static, "dynamic": gated}
    latency = measure_latency(models, inputs, threads=threads, warmup=warmup, repeats=repeats)
    rows = tuple(
        Row(
            name=name,
            macs=count_macs(model, inputs),
            parameters=count_parameters(parameters[name]),
            latency=latency[name],
            metrics=_metrics(evaluate, model),
        )
        for name, model in models.items()
    )
    return Comparison(
        rows=rows,
        equality=equality,
        active={name: (gate.active_count, gate.channels) for name, gate in gated.gates.items()},
        dynamic_only=tuple(site.name for site in gated.gated_sites if site.kind != "inner"),
        inputs=tuple(tuple(value.shape) for value in inputs if isinstance(value, Tensor)),
        environment=environment(),
    )


def _inputs(model: nn.Module, example_inputs: Any) -> tuple[Any, ...]:
    if example_inputs is None:
        raise DataError(
            "`example_inputs` of compare() must be given, as it decides what is counted and timed: "
            "torch.randn(1, 3, 224, 224), say."
        )
    return normalise_inputs(model, example_inputs)


def _metrics(evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    if evaluate is None:
        return {}
    with evaluating(model):
        found = evaluate(model)
    if not isinstance(found, Mapping):
        raise ConfigError(
            "`evaluate` of compare() must return a dict of names and numbers, such as {'top1': 76.1}. "
            f"Got {type(found).__name__}."
        )
    return {str(name): float(value) for name, value in found.items()}
