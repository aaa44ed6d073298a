"""Checks that gating means removal, and that the engine computes what the masked model does."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, outputs
from .choice import EXACT, difference, scale_of
from .oracle import removed

__all__ = ["check_compact_float32", "check_compact_float64", "check_static"]

ROUNDING = 2.0  # in low precision the fast path may be off by as much again as plain PyTorch
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

    Samples for which rounding made one of them choose another channel are left out, and the note says how
    many.
    """
    exact, masked = case.gated(torch.float64), case.gated()
    reference = outputs(exact, case.inputs(torch.float64))
    plain, fast = outputs(masked, case.inputs()), outputs(case.compacted, case.inputs())
    chosen = case.compacted.last_active
    alike = torch.ones(len(plain[0]), dtype=torch.bool)
    for name, gate in masked.gates.items():
        wanted = exact.gates[name].last_active
        for active in (gate.last_active, chosen[name]):
            assert active is not None and wanted is not None
            alike &= (active == wanted).all(1).cpu()
    assert alike.any(), f"{case.name}: float32 chose other channels for every sample, so that nothing can be compared"
    keep = [[v[alike].double() for v in values] for values in (reference, plain, fast)]
    scale = scale_of(keep[0])
    ours, theirs = (_rms(values, keep[0]) / scale for values in (keep[2], keep[1]))
    assert ours <= ROUNDING * theirs + FLOOR, (
        f"{case.name}: in float32 the compact model is off by {ours:.1e} from float64, the masked one by {theirs:.1e}"
    )
    left = int((~alike).sum())
    return f"{ours:.1e} against {theirs:.1e}" + (
        f"; {left} samples left out, rounding decided a near-tie" if left else ""
    )


def _rms(found: list[Tensor], wanted: list[Tensor]) -> float:
    worst = max(float((a - b).square().mean().sqrt()) for a, b in zip(found, wanted, strict=True))
    return worst if worst == worst else float("inf")
