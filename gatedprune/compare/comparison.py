"""Dense, static and dynamic side by side: MACs, parameters, wall-clock time, memory, and what the user measures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import GateConfig, check_ratio
from ..engine import compact
from ..errors import ConfigError, DataError, ModelError
from ..measure import count_macs, count_parameters, environment, measure_latency, measure_memory
from ..sites import evaluating, normalise_inputs
from ..training import calibrate as fit_gates
from ..wrapping import GatedModel, is_gated, wrap
from .combined import gate_after_static
from .equality import Equality, check_equality
from .rankings import Pruner, check_ranking
from .result import Comparison, Row
from .static import StaticResult, dense_copy
from .surgery import Importance

__all__ = ["compare", "compare_models"]

Evaluate = Callable[[nn.Module], Mapping[str, float]]


def compare(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ratio: float | Mapping[str, float] | Sequence[float] | None = None,
    config: GateConfig | None = None,
    evaluate: Evaluate | None = None,
    importance: Importance | None = None,
    rankings: Sequence[str] | None = None,
    calibrate: Iterable[Any] | None = None,
    combined: bool = False,
    threads: int | None = 1,
    warmup: int = 3,
    repeats: int = 20,
    on_row: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare the dense model with its static and its dynamic pruning: same sites, same k, one table.

    Nothing is trained here. For a fair reading of metrics after fine-tuning, train each model with the same
    budget and hand the three to `gatedprune.compare.compare_models`.

    Args:
        model: A dense model, or one gated already (then its gates say sites and k). Stays as it is.
        example_inputs: What to count and time with: a tensor (B, …) or a tuple of arguments.
        ratio: Share of channels suppressed, for a dense model; default 0.5. A sequence: rows for each of them, also for
            a model that is gated already.
        config: All options of gating, for a dense model, instead of `ratio`.
        evaluate: Takes a model, returns named numbers, such as an accuracy; called once a row, for the dense model
            first. The dynamic row gets the compact model.
        importance: What ranks channels for static pruning; see `prune_static`.
        rankings: Instead: a static row for each of these names of `gatedprune.compare.RANKINGS`.
        calibrate: Batches of a few hundred samples, as for `gatedprune.calibrate`: the gates are calibrated on them, at
            each ratio, static models take their batch norms' statistics anew (`reestimate_norms`), and rankings that
            need data take them. They are gone through several times.
        combined: Also a row in which half of the suppressed channels are pruned statically first, and the rest is
            gated.
        threads: Threads for one operator while timing; None: as they are.
        warmup: Rounds before timing starts.
        repeats: Rounds that are timed.
        on_row: Called with the name of each row when its work begins, and with "time" at the end.

    Raises:
        ConfigError: An option is out of its domain, or is given for a model that is gated already.
        ModelError: No site was found, torch-pruning fails, or the compact model does not equal the masked
            one: then nothing is timed. With `rankings`, those that fail are left out, and a note says why.
        ImportError: torch-pruning or thop is not installed (`pip install gatedprune[compare]`).
    """
    inputs = _inputs(model, example_inputs)
    _check(importance, rankings, calibrate)
    gated, ratios = _gated(model, inputs, ratio, config)
    pruner = Pruner(gated, inputs, calibrate)
    table = _Table(inputs, evaluate, on_row)
    table.add("dense", "dense", dense_copy(gated))
    active: dict[str, tuple[int, int]] = {}
    for one in ratios:
        if one is not None:
            gated.set_ratio(one)
        active = active or {name: (gate.active_count, gate.channels) for name, gate in gated.gates.items()}
        table.start(one if isinstance(one, float) else None, several=len(ratios) > 1)
        if rankings is None:
            table.add_static("", lambda: pruner(importance))
        for ranking in rankings or ():
            table.add_static(ranking, lambda ranking=ranking: pruner(ranking))  # type: ignore[misc]
        dynamic = copy.deepcopy(gated)
        if calibrate is not None:
            fit_gates(dynamic, calibrate)
        table.add_dynamic("dynamic", dynamic)
        if combined:
            _add_combined(table, gated, pruner, inputs, calibrate)
    if calibrate is not None:
        table.notes.append(
            "nothing is trained: gates are calibrated, and the batch norms of static models re-estimated, on the same "
            "samples"
        )
    rows = table.rows(threads, warmup, repeats)
    return _comparison(gated, rows, active, inputs, table.notes)


def compare_models(
    dense: nn.Module,
    static: nn.Module | Mapping[str, nn.Module],
    gated: nn.Module | Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...],
    *,
    evaluate: Evaluate | None = None,
    threads: int | None = 1,
    warmup: int = 3,
    repeats: int = 20,
    on_row: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare models that are there already, each fine-tuned as you like.

    Args:
        dense: The model without pruning.
        static: The statically pruned one, from `prune_static`; or several, by what their rows are to say: "0.5".
        gated: The gated one, from `wrap`; compacted here. Or several, by the same keys.
        example_inputs, evaluate, threads, warmup, repeats, on_row: As in `compare`.

    Raises:
        ConfigError: `gated` has no gates, or a number is out of its domain.
        ModelError: The compact model does not equal the masked one.
        ImportError: thop is not installed (`pip install gatedprune[compare]`).
    """
    statics = static if isinstance(static, Mapping) else {"": static}
    dynamics = gated if isinstance(gated, Mapping) else {"": gated}
    if not dynamics or not all(isinstance(one, GatedModel) for one in dynamics.values()):
        raise ConfigError("`gated` of compare_models() has no gates: pass a model that gatedprune.wrap returned.")
    if statics.keys() != dynamics.keys():
        raise ConfigError(f"`static` and `gated` of compare_models() have other keys: {[*statics]} and {[*dynamics]}.")
    first: Any = next(iter(dynamics.values()))
    inputs = _inputs(first, example_inputs)
    table = _Table(inputs, evaluate, on_row)
    table.add("dense", "dense", dense)
    for key, one in dynamics.items():
        table.name(key)
        table.add("static", "static", statics[key])
        table.add_dynamic("dynamic", one)  # type: ignore[arg-type]
    active = {name: (gate.active_count, gate.channels) for name, gate in first.gates.items()}
    return _comparison(first, table.rows(threads, warmup, repeats), active, inputs, table.notes)


class _Table:
    """Rows in the making: everything but time is measured as a model is added; time at the end, of all in turns."""

    def __init__(self, inputs: tuple[Any, ...], evaluate: Evaluate | None,
                 on_row: Callable[[str], None] | None = None) -> None:  # fmt: skip
        self.inputs, self.evaluate, self.on_row = inputs, evaluate, on_row
        self.notes: list[str] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self._timed: dict[str, nn.Module] = {}
        self._like: dict[str, str] = {}  # row → the row of equal shapes that is timed in its place
        self._ratio: float | None = None
        self._suffix = ""

    def start(self, ratio: float | None, several: bool) -> None:
        """What follows is at this ratio."""
        self._ratio = ratio
        self.name(f"{ratio:g}" if several else "")

    def name(self, key: str) -> None:
        """What follows is told from other rows by this."""
        self._suffix = f" @ {key}" if key else ""

    def add(self, name: str, kind: str, model: nn.Module, counted: nn.Module | None = None, **more: Any) -> None:
        """``counted``: the model whose parameters count, where that is another."""
        name += self._suffix
        self.tell(name)
        shapes = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
        twin = next(
            (n for n, row in self._rows.items() if kind == "static" == row["kind"] and row["shapes"] == shapes), None
        )
        if twin is None:
            self._timed[name] = model
            costs = {"macs": count_macs(model, self.inputs), "memory": measure_memory(model, self.inputs)}
        else:
            self._like[name] = self._like.get(twin, twin)
            costs = {key: self._rows[twin][key] for key in ("macs", "memory")}
        self._rows[name] = {
            **costs, "kind": kind, "ratio": self._ratio, "shapes": shapes,
            "parameters": count_parameters(model if counted is None else counted),
            "metrics": _metrics(self.evaluate, model), **more,
        }  # fmt: skip

    def add_static(self, ranking: str, prune: Callable[[], StaticResult]) -> None:
        """With a ranking: leaves the row out where that cannot be pruned, and says so."""
        name = f"static, {ranking}" if ranking else "static"
        try:
            result = prune()
        except ModelError as error:
            if not ranking:
                raise
            self.note(f"no row {name!r}: {error}")
            return
        if result.why:
            self.note(f"{name}: cut by gatedprune, batch norms folded, since {result.why}")
        self.add(name, "static", result.model, ranking=ranking)

    def add_dynamic(self, name: str, gated: GatedModel, kind: str = "dynamic", **more: Any) -> None:
        """Compacts the model, and adds it if it equals the masked one."""
        fast = compact(gated, self.inputs)
        equality = check_equality(gated, fast, self.inputs)
        self.add(name, kind, fast, counted=gated, equality=equality, **more)

    def tell(self, name: str) -> None:
        """That work on this row begins."""
        if self.on_row is not None:
            self.on_row(name)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def rows(self, threads: int | None, warmup: int, repeats: int) -> tuple[Row, ...]:
        self.tell("time")
        latency = measure_latency(self._timed, self.inputs, threads=threads, warmup=warmup, repeats=repeats)
        if self._like:
            self.notes.append("static models of equal shapes are timed once")
        rows = []
        for name, row in self._rows.items():
            kept = {key: value for key, value in row.items() if key != "shapes"}
            rows.append(Row(name=name, latency=latency[self._like.get(name, name)], **kept))
        return tuple(rows)


def _add_combined(table: _Table, gated: GatedModel, pruner: Pruner, inputs: tuple[Any, ...], batches: Any) -> None:
    ranking = "magnitude-l2" if batches is None else "activation"
    try:
        combined = gate_after_static(gated, lambda counts: pruner(ranking, counts), inputs)
    except ModelError as error:
        table.note(f"no row 'static, then dynamic': {error}")
        return
    if batches is not None:
        fit_gates(combined, batches)
    table.add_dynamic("static, then dynamic", combined, "static, then dynamic", ranking=ranking)


def _gated(model: nn.Module, inputs: tuple[Any, ...], ratio: Any, config: GateConfig | None) -> tuple[Any, list[Any]]:
    """A gated copy, and the ratios to set one after the other; [None]: as it is."""
    several = [check_ratio(one, "compare()") for one in ratio] if isinstance(ratio, Sequence) else None
    if several is not None and not several:
        raise ConfigError("The `ratio` of compare() is an empty sequence: give at least one number.")
    if is_gated(model):
        if (ratio is not None and several is None) or config is not None:
            raise ConfigError(
                "`ratio` and `config` of compare() are for dense models; this one is gated already. "
                "Leave them out, or change the gates with model.set_ratio()."
            )
        return copy.deepcopy(model), several or [None]
    options: dict[str, Any] = {"config": config} if config is not None else {}
    if config is None:
        options["ratio"] = several[0] if several else 0.5 if ratio is None else ratio
    elif ratio is not None and several is None:
        options["ratio"] = ratio  # wrap() says that it is too much
    gated = wrap(copy.deepcopy(model), example_inputs=inputs, **options)
    single = gated.gate_config.ratio
    return gated, several or ([single] if isinstance(single, float) else [None])


def _comparison(gated: GatedModel, rows: tuple[Row, ...], active: dict[str, tuple[int, int]], inputs: tuple[Any, ...],
                notes: list[str]) -> Comparison:  # fmt: skip
    checked: list[Equality] = [row.equality for row in rows if row.equality is not None]
    config = getattr(gated, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, dict) else None
    return Comparison(
        rows=rows,
        equality=max(checked, key=lambda e: e.float64),
        active=active,
        dynamic_only=tuple(site.name for site in gated.gated_sites if site.kind != "inner"),
        inputs=tuple(tuple(value.shape) for value in inputs if isinstance(value, Tensor)),
        environment=environment(),
        notes=tuple(notes),
        model=str(name or gated._gatedprune_base.__name__),
    )


def _check(importance: Any, rankings: Sequence[str] | None, batches: Any) -> None:
    if rankings is not None:
        if importance is not None:
            raise ConfigError("Give compare() either `importance` or `rankings`.")
        if isinstance(rankings, str):
            raise ConfigError(f"`rankings` of compare() must be a sequence of names. Got {rankings!r}.")
        for ranking in rankings:
            check_ranking(ranking, batches)
    if isinstance(batches, Iterator):
        raise DataError(
            "The `calibrate` batches of compare() are an iterator, which is used up after one pass: give a list or a "
            "data loader."
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
