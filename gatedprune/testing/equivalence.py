"""Checks that gating means removal, and that the engine computes what the masked model does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import ROUNDING_FACTOR, in_float64, nearby
from .case import Case, outputs
from .choice import EXACT, difference, scale_of
from .oracle import removed

__all__ = ["check_compact_float32", "check_compact_float64", "check_static"]

FLOOR = 4 * torch.finfo(torch.float32).eps


def check_static(case: Case) -> str:
    """Per sample, the gated network is what is left without the suppressed channels, times the gain."""
    gated, args = case.gated(torch.float64), case.inputs(torch.float64)
    whole = outputs(gated, args)
    samples = next(a for a in args if isinstance(a, Tensor)).shape[0]
    how, oracle = "", case.oracle
    for b in {0, samples - 1}:
        model, said = removed(gated, args, b, oracle)
        how = how or said
        oracle = "columns" if said.startswith("columns") else oracle  # what failed once is not tried again
        # The model is good for this sample alone; the others run along since some pruned models know their
        # batch size.
        off = difference([v[b : b + 1] for v in outputs(model, args)], [v[b : b + 1] for v in whole])
        if off > EXACT:
            raise AssertionError(
                f"{case.name}: sample {b} is off by {off:.1e} from the network without its suppressed "
                f"channels ({how}){_blame(case, b)}"
            )
        del model  # before the next: large models are large in float64
    return how


def _blame(case: Case, sample: int) -> str:
    """The sites that are wrong when they alone are gated."""
    args, wrong = case.inputs(torch.float64), []
    for name in case.gated().gates:
        gated = case.gated(torch.float64)
        for other, gate in gated.gates.items():
            if other != name:
                gate.active_count, gate.boost = gate.channels, False
                gate.forget_threshold()
        whole = [v[sample : sample + 1] for v in outputs(gated, args)]
        model, _ = removed(gated, args, sample, "columns")
        if difference([v[sample : sample + 1] for v in outputs(model, args)], whole) > EXACT:
            wrong.append(name)
    return f"; wrong by itself: site {', '.join(wrong[:5])}" if wrong else "; each site is right by itself"


def check_compact_float64(case: Case) -> str:
    """The compact model equals the masked one in float64, where only logic can differ."""
    gated, args = case.gated(torch.float64), case.inputs(torch.float64)
    wanted, found = outputs(gated, args), outputs(case.compacted64, args)
    for name, active in case.compacted64.last_active.items():
        masked = gated.gates[name].last_active
        assert masked is not None and torch.equal(active, masked), (
            f"{case.name}, site {name}: compact and masked choose different channels"
        )
    off = difference(found, wanted)
    assert off <= EXACT, (
        f"{case.name}: the compact model is off by {off:.1e} in float64 (at most {EXACT:.0e}), "
        f"sites {', '.join(list(gated.gates)[:5])}, …"
    )
    return f"{off:.1e}"


def check_compact_float32(case: Case) -> str:
    """In float32 the compact model is at most twice as far from the float64 reference as the masked model is.

    Samples for which rounding made one of them choose another channel are left out, and the note says how many.
    Where the case's own samples say otherwise, all of eight inputs near them decide together: one early rounding
    moves everything behind it, so that three samples may be mere luck.
    """
    exact, masked = case.gated(torch.float64), case.gated()
    seen = _Precision()
    for number, args in enumerate(nearby(case.inputs())):
        reference, plain = outputs(exact, in_float64(args)), outputs(masked, args)
        fast = outputs(case.compacted, args)
        chosen = case.compacted.last_active
        alike = torch.ones(len(plain[0]), dtype=torch.bool)
        for name, gate in masked.gates.items():
            wanted = exact.gates[name].last_active
            for active in (gate.last_active, chosen[name]):
                assert active is not None and wanted is not None
                alike &= (active == wanted).all(1).cpu()
        seen.add(alike, reference, plain, fast)
        if number == 0 and seen.samples and seen.good:
            break
    assert seen.samples, f"{case.name}: float32 chose other channels for every sample, so that nothing can be compared"
    assert seen.good, (
        f"{case.name}: in float32 the compact model is off by {seen.ours:.1e} from float64, the masked one by "
        f"{seen.theirs:.1e}, over {seen.samples} samples"
    )
    return f"{seen.ours:.1e} against {seen.theirs:.1e} over {seen.samples} samples" + (
        f"; {seen.left_out} left out, rounding decided a near-tie" if seen.left_out else ""
    )


class _Precision:
    """Errors in float32 of the compact and of the masked model, over all samples so far that can be compared."""

    def __init__(self) -> None:
        self.samples = self.left_out = 0
        self._ours: list[list[float]] = []  # of each input, of each output: the sum of squares
        self._theirs: list[list[float]] = []

    def add(self, alike: Tensor, reference: list[Tensor], plain: list[Tensor], fast: list[Tensor]) -> None:
        """Errors relative to the outputs' size, on the samples that are `alike`."""
        kept = int(alike.sum())
        self.samples, self.left_out = self.samples + kept, self.left_out + len(alike) - kept
        if kept:
            wanted, theirs, ours = ([v[alike].double() for v in values] for values in (reference, plain, fast))
            self._ours.append([kept * error for error in _mean_squares(ours, wanted)])
            self._theirs.append([kept * error for error in _mean_squares(theirs, wanted)])

    @property
    def ours(self) -> float:
        return self._worst(self._ours)

    @property
    def theirs(self) -> float:
        return self._worst(self._theirs)

    @property
    def good(self) -> bool:
        return self.ours <= ROUNDING_FACTOR * self.theirs + FLOOR

    def _worst(self, sums: list[list[float]]) -> float:
        """Root mean square over all samples, of the output where it is largest."""
        return max(math.sqrt(sum(output) / self.samples) for output in zip(*sums, strict=True))


def _mean_squares(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of each output; relative to the largest value of all."""
    scale = scale_of(wanted)
    errors = [float(((a - b) / scale).square().mean()) for a, b in zip(found, wanted, strict=True)]
    return [error if error == error else math.inf for error in errors]
