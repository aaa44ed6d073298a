"""Passes over the data: what calibration sees of a gated model, and of the dense one beside it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, ModelError
from ..sites import evaluating, suspended
from ..wrapping import GatedModel
from .contribution import Contributions
from .divergence import divergence
from .matching import Matching, batch_norms, following_norms
from .moments import Moments

__all__ = ["Inputs", "Passes", "check_gated", "model_arguments"]

Inputs = Callable[[Any], Any]


def check_gated(gated: Any, where: str) -> None:
    if not isinstance(gated, GatedModel):
        raise ModelError(f"{where} takes a model that wrap() returned. {type(gated).__name__} is not gated.")


class Passes:
    """Passes over the data in eval mode, each batch through the dense model and then, if asked, the gated one."""

    def __init__(self, gated: Any, batches: Iterable[Any], inputs: Inputs | None, where: str, matching: bool) -> None:
        self.gated, self.batches, self.inputs, self.where = gated, batches, inputs, where
        self.matched = tuple(batch_norms(gated)) if matching else ()  # paths of the norms that are
        self.norms: dict[str, str] | None = None
        self._dense: Any = None  # the dense model's output for the last batch
        self._again: Callable[[], Any] = gated  # the gated model on that batch

    def accumulate(self, moments: dict[str, Moments], folds: int, *, gate: bool) -> int:
        """Add what gates see and what channels contribute to every site's moments; returns the number of samples.

        Args:
            gate: Gates see the gated model, and contributions are those beside the winners; else the dense one, beside
                all channels.
        """
        for moment in moments.values():
            moment.seen = 0  # the same samples in the same folds
        samples = 0
        with closing(self._run(gate=gate, reading=True)) as records:
            for record in records:
                for site in self.gated.gated_sites:
                    s = record.seen[site.name]
                    if site.name not in moments:
                        moments[site.name] = Moments(site.in_channels, site.channels, folds, s.device)
                    active = self.gated.gates[site.name].last_active if gate else None
                    moments[site.name].add(s, record.target(site.name, active))
                samples += len(s)
        return samples

    def match(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Norm path → scale and shift that match its input in the gated model to the dense one's."""
        with closing(self._run(gate=True, reading=False)) as records:
            for _ in records:
                pass
        return self.found

    def losses(self, choices: Sequence[Callable[[], AbstractContextManager[None]]]) -> list[float]:
        """Mean divergence of the gated model's outputs from the dense one's for each way to choose, in one pass.

        Args:
            choices: Each opens a context, batch after batch, in which gates choose that way.
        """
        totals, samples = [0.0] * len(choices), 0
        with closing(self._run(gate=False, reading=False)) as records:
            for _ in records:
                for i, choice in enumerate(choices):
                    with choice():
                        each = divergence(self._dense, self._again())
                    totals[i] += float(each.sum())
                samples += len(each)
        return [total / samples for total in totals]

    def _run(self, *, gate: bool, reading: bool) -> Generator[Contributions, None, None]:
        gated, samples = self.gated, 0
        with torch.no_grad(), evaluating(gated), ExitStack() as stack:
            for args in model_arguments(gated, self.batches, self.inputs, self.where):
                if self.norms is None:
                    with suspended(gated):
                        self.norms = following_norms(gated, *args)
                if not samples:
                    record = stack.enter_context(Contributions(gated, self.norms, matched=bool(self.matched)))
                    matching = stack.enter_context(Matching(gated, self.matched))
                record.clear()
                record.reading, matching.dense = reading, True
                with suspended(gated):
                    self._dense = gated(*args)
                record.reading = matching.dense = False
                self._again = partial(gated, *args)
                if gate:
                    self._again()
                samples += 1
                yield record
            if not samples:
                raise DataError(f"The `batches` of {self.where} are empty: give it a few hundred samples.")
            self.found = matching.matches()
        for module in gated.gates.values():
            module.clear()


def model_arguments(gated: Any, batches: Iterable[Any], inputs: Inputs | None, where: str) -> Iterator[tuple[Any, ...]]:
    """The model's arguments for each batch, on the model's device."""
    device = next(gated.parameters()).device
    for batch in batches:
        value = batch if inputs is None else inputs(batch)
        if inputs is None and isinstance(value, (tuple, list)) and value:
            value = value[0]  # (images, labels)
        args = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not any(isinstance(a, Tensor) for a in args):
            raise DataError(
                f"The `batches` of {where} must hold tensors, or tuples that begin with one. Got "
                f"{type(batch).__name__}: say with `inputs=` how to get the model's arguments from it."
            )
        yield tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
