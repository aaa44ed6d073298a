"""What a sweep does with one model: the contract suite, or site discovery alone."""

from __future__ import annotations

import gc
import time
import warnings
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..sites import SiteReport, find_sites
from ..testing import CHECKS, Case
from .catalogue import Entry, Sized, build, sized
from .runner import Record, Tell

__all__ = ["LARGE_MACS", "LEFT_OUT", "architecture_job", "family_job", "warm_up"]

# Dense MACs per sample above which checks that run in float64 or train are left out: minutes each on two cores.
LARGE_MACS = 1_500_000_000
# What the contract says does not depend on the image size: checked on smaller images where sites are the same.
CHECKED_INPUT = 128
# Of a model with more parameters copies in float64 need over 18 GiB: checked with fewer blocks, which are all alike.
MOST_PARAMETERS = 300_000_000
SHORTENED = {"depth": 6}
LEFT_OUT = ("compact_float64", "training_steps")
# Those that need no compact model first, then those that need it in float32: a large model is held in few copies.
_ORDER = (
    "identity", "gates_see_channels", "static", "state_dicts", "gradients", "exactly_k", "compact_float32", "macs_fall",
    "deterministic", "samples_independent", "compact_float64", "unwrap", "training_steps",
)  # fmt: skip


def architecture_job(entry: Entry, tell: Tell) -> None:
    """`find_sites` on the meta device; on real zeros where a model cannot be traced there."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    small = sized(entry.model)
    tell({"input": small.shape[-1]})
    try:
        report, device = _sites(small), "meta"
    except Exception:  # noqa: BLE001  tried again for real; what is wrong then is told
        report = find_sites(build(entry.model, "cpu", **small.options), torch.zeros(2, *small.shape))
        device = "cpu"
    tell({**describe(report), "device": device})


def family_job(entry: Entry, tell: Tell) -> None:
    """The contract suite at ratio 0.5, each check's outcome told as soon as it is known."""
    warnings.simplefilter("ignore")
    small = sized(entry.model)
    tell({"input": small.shape[-1]})
    report = _sites(small)
    tell(describe(report))
    if not len(report):
        return
    if small.shape[-1] > CHECKED_INPUT:
        small, report = _smaller(entry, small, report)
    if entry.parameters > MOST_PARAMETERS:
        options = {**small.options, **SHORTENED}
        small = Sized(build(entry.model, **options), options, small.shape)
        report = _sites(small)
        tell({"checked_with": SHORTENED})
    tell({"checked_input": small.shape[-1], "checked_left": round(report.macs_left(0.5) / report.macs, 4)})
    large = report.macs > LARGE_MACS
    options, pixels = small.options, small.shape[-1]
    case = Case(lambda: build(entry.model, "cpu", **options), size=pixels, name=entry.model,
                oracle="columns" if large else "auto", lean=large)  # fmt: skip
    chosen = [name for name in _ORDER if name in CHECKS] + [name for name in CHECKS if name not in _ORDER]
    outcomes: dict[str, Record] = {
        name: {"outcome": "left out" if large and name in LEFT_OUT else "no time"} for name in chosen
    }
    for name in chosen:
        tell({"checks": outcomes})
        if outcomes[name]["outcome"] != "left out":
            outcomes[name] = _checked(name, case)
    tell({"checks": outcomes})


def warm_up() -> None:
    """Trace something, so that what torch imports for that is there before a process is forked for each model."""
    layers = nn.Conv2d(3, 4, 1, device="meta"), nn.Conv2d(4, 4, 1, device="meta")
    find_sites(nn.Sequential(*layers), torch.zeros(2, 3, 4, 4, device="meta"))


def _sites(small: Sized) -> SiteReport:
    return find_sites(small.model, torch.zeros(2, *small.shape, device="meta"))


def _smaller(entry: Entry, small: Sized, report: SiteReport) -> tuple[Sized, SiteReport]:
    """Model and report for images of at most `CHECKED_INPUT` pixels, if the model has the same sites there."""
    try:
        smaller = sized(entry.model, CHECKED_INPUT)
        found = _sites(smaller)
    except Exception:  # noqa: BLE001  then not
        return small, report
    alike = [(s.name, s.channels) for s in found] == [(s.name, s.channels) for s in report]
    return (smaller, found) if alike else (small, report)


def _checked(name: str, case: Case) -> Record:
    begun = time.monotonic()
    try:
        outcome, note = "pass", CHECKS[name](case) or ""
    except Exception as error:  # noqa: BLE001  a model on which a check breaks has failed it
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        outcome, note = "fail", kind + str(error)
    gc.collect()  # hooks and their modules hold each other: copies of the model would pile up
    return {"outcome": outcome, "note": note[:400], "seconds": round(time.monotonic() - begun, 1)}


def describe(report: SiteReport) -> Record:
    """What a table says of a model's sites."""
    total = max(report.macs, 1)
    convolutions = sum(layer.macs for layer in report.layers if layer.op.startswith("conv"))
    rest: dict[str, int] = defaultdict(int)
    for layer in report.layers:
        if not layer.writes and not layer.reads:
            rest[_reason(report, layer.path)] += layer.macs
    heaviest = sorted(rest.items(), key=lambda item: -item[1])[:3]
    return {
        "macs": report.macs,
        "sites": len(report),
        "share": round(report.macs_in_sites / total, 4),
        "left": round(report.macs_left(0.5) / total, 4),
        "convolutions": round(convolutions / total, 4),
        "untouched": {reason: round(macs / total, 4) for reason, macs in heaviest},
    }


def _reason(report: SiteReport, path: str) -> Any:
    return report.skipped.get(
        path, "it writes nothing that could be narrowed" if path else "in the model's own forward()"
    )
