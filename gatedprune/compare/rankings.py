"""What static pruning may rank channels by: torch-pruning's importances, and ours from activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ModelError
from ..sites import evaluating, suspended
from ..training import Contributions, reestimate_norms
from ..wrapping import GatedModel
from .static import StaticResult, dense_copy, prune_static
from .surgery import Importance, import_torch_pruning

__all__ = ["NEEDS_DATA", "RANKINGS", "Pruner", "check_ranking"]

# name → what it ranks by, for help texts and pages
RANKINGS = {
    "magnitude-l2": "squared weights of the whole group",
    "magnitude-l1": "absolute weights of the whole group",
    "batch-norm": "scale of the batch norm (Network Slimming)",
    "random": "chance",
    "taylor": "weights times gradients of the loss (needs data)",
    "activation": "mean activation times the norm of the reading weights, gatedprune's own (needs data)",
}
NEEDS_DATA = ("taylor", "activation")


class Pruner:
    """Prunes a gated model's own sites, ranked by any of `RANKINGS`; what it learns from data is learnt once.

    Given data, it also takes the batch norms' statistics anew (`reestimate_norms`), as calibration matches those of a
    gated model.

    Args:
        gated: Says the sites, and the counts at the time of each call; its backbone is what is pruned. Stays as it is.
        inputs: Positional arguments to trace it with.
        batches: As for `gatedprune.calibrate`; for batch norms, and for the rankings that need data.
    """

    def __init__(self, gated: GatedModel, inputs: tuple[Any, ...], batches: Iterable[Any] | None) -> None:
        self.gated, self.inputs, self.batches = gated, inputs, batches
        self._scores: dict[str, Tensor] | None = None
        self._gradients: dict[str, Tensor | None] | None = None

    def __call__(self, ranking: str | Importance | None, counts: Mapping[str, int] | None = None) -> StaticResult:
        """The pruned model.

        Args:
            ranking: One of `RANKINGS`, or what `prune_static` takes.
            counts: Site name → k; default: what the gates keep.

        Raises:
            ConfigError: No such ranking, or it needs data. ModelError: the model cannot be ranked or pruned so.
        """
        result = self._pruned(ranking, counts)
        if self.batches is not None:
            reestimate_norms(result.model, self.batches)
        return result

    def _pruned(self, ranking: str | Importance | None, counts: Mapping[str, int] | None) -> StaticResult:
        if not isinstance(ranking, str):
            return prune_static(self.gated, counts=counts, importance=ranking, example_inputs=self.inputs)
        check_ranking(ranking, self.batches)
        inner = {site.name for site in self.gated.gated_sites if site.kind == "inner"}
        wanted = counts or {name: gate.active_count for name, gate in self.gated.gates.items() if name in inner}
        if ranking == "activation":
            if self._scores is None:
                self._scores = mean_contributions(self.gated, self.batches or ())
            keep = {name: _largest(self._scores[name], k) for name, k in wanted.items()}
            return prune_static(self.gated, keep=keep, example_inputs=self.inputs)
        if ranking == "taylor":
            if self._gradients is None:
                self._gradients = taylor_gradients(self.gated, self.batches or ())
            self._lend(self._gradients)
        try:
            return prune_static(self.gated, counts=wanted, importance=_importance(ranking), example_inputs=self.inputs)
        finally:
            self._lend({})

    def _lend(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, parameter in self.gated.named_parameters():
            parameter.grad = gradients.get(name)


def check_ranking(ranking: str, batches: Iterable[Any] | None) -> None:
    """Raise `ConfigError` unless there is such a ranking, and data where it needs some."""
    if ranking not in RANKINGS:
        raise ConfigError(f"Unknown ranking {ranking!r} of static pruning. Known: {', '.join(RANKINGS)}.")
    if ranking in NEEDS_DATA and batches is None:
        raise ConfigError(f"The ranking {ranking!r} of static pruning needs data: give `calibrate` batches.")


def _importance(ranking: str) -> Importance | None:
    if ranking == "magnitude-l2":
        return None  # prune_static's own default, with its way out where torch-pruning fails
    tp = import_torch_pruning().importance
    return {
        "magnitude-l1": lambda: tp.GroupMagnitudeImportance(p=1),
        "batch-norm": tp.BNScaleImportance,
        "random": tp.RandomImportance,
        "taylor": tp.GroupTaylorImportance,
    }[ranking]()


def _largest(score: Tensor, count: int) -> Tensor:
    return torch.sort(score, descending=True, stable=True).indices[:count].sort().values.cpu()


def mean_contributions(gated: GatedModel, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Site name → mean contribution of each channel over the data, (C,), in the dense model; see `Contributions`."""
    total: dict[str, Tensor] = {}
    samples = 0
    with torch.no_grad(), evaluating(gated), suspended(gated), Contributions(gated) as record:
        for images in _images(batches, gated):
            record.clear()
            gated(images)
            for site in gated.gated_sites:
                found = record.target(site.name).sum(0)
                total[site.name] = total[site.name] + found if site.name in total else found
            samples += len(images)
    if not samples:
        raise DataError("The `calibrate` batches of compare() are empty: give some hundred samples.")
    return {name: value / samples for name, value in total.items()}


def taylor_gradients(gated: GatedModel, batches: Iterable[Any]) -> dict[str, Tensor | None]:
    """Parameter name → the dense model's gradient of the cross-entropy against its own predictions.

    Its own predictions, since calibration data have no labels; on a trained model they mostly are the labels.

    Raises:
        ModelError: The model's outputs are no logits, (B, classes).
    """
    dense = dense_copy(gated).eval().requires_grad_(True)
    dense.zero_grad(set_to_none=True)
    for images in _images(batches, gated):
        with torch.enable_grad():
            logits = dense(images)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ModelError("The ranking 'taylor' needs a model that gives logits, (B, classes).")
            torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in dense.named_parameters()}


def _images(batches: Iterable[Any], gated: GatedModel) -> Iterable[Tensor]:
    device = next(gated.parameters()).device
    for batch in batches:
        yield (batch[0] if isinstance(batch, (tuple, list)) else batch).to(device)
