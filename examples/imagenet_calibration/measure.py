"""Top-1 of one gated model by how its channels are chosen: static in several ways, dynamic, per-image oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatedprune.training import OracleChoice, allocate, calibrate, held_out_r2, match_norms
from gatedprune.wrapping import macs_left

from .baselines import RANKINGS, choosing, compensating, reading_means, scores_by

__all__ = ["Views", "measure", "measure_allocated", "top1"]


class Views:
    """The calibration images, view after view, in batches: what `calibrate` goes through, in the same order each time.

    Args:
        views: Each (M, 3, H, W): the images themselves first, then crops of them.
        batch: Images a batch.
    """

    def __init__(self, views: Sequence[Tensor], batch: int) -> None:
        self.views, self.batch = views, batch

    def __iter__(self) -> Any:
        for view in self.views:
            yield from view.split(self.batch)


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Share of the images whose label has the largest logit, in percent."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(batch)])
    return 100 * float((found == labels).double().mean())


def measure(
    gated: Any, ratio: float | Mapping[str, float], calibration: Views, images: Tensor, labels: Tensor, *,
    batch: int = 50, rounds: int = 4, rankings: Sequence[str] = RANKINGS, yardsticks: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Top-1 in percent of the ways to choose channels, at one ratio.

    Args:
        gated: The model; its gates are calibrated anew. "taylor" reads the gradients of its parameters.
        ratio: Of all sites, or of each.
        calibration: Static choices and norms are measured on its first view.
        images: (N, 3, H, W). labels: (N,), of the images.
        batch: Images a forward pass. rounds: of `gatedprune.calibrate`.
        rankings: Of `RANKINGS`. yardsticks: Also measure predictors that are not tempered, the per-image oracle, and
            R² of the former.

    Returns:
        ``macs``, the share of the dense MACs that is left; ``static``, way → top-1; ``dynamic``, ``whole`` and
        ``oracle``, top-1; ``share``, of the dynamic one's `Calibration`; with ``yardsticks`` also ``sites``, site →
        shrinkage and R², cross-validated and on the images, of whole predictors.
    """
    plain = calibration.views[0].split(calibration.batch)
    gated.set_ratio(0.0)
    means = reading_means(gated, calibration.views[0], calibration.batch)
    gated.set_ratio(ratio)
    found: dict[str, Any] = {"macs": macs_left(gated) / gated.site_report.macs, "static": {}}
    for ranking in rankings:
        if ranking == "activation":
            calibrate(gated, plain, rounds=1, dynamic=False, norms=False)
            scores = {name: gate.bias.detach().clone() for name, gate in gated.gates.items()}
        else:
            scores = scores_by(gated, ranking, images[:1])
        with choosing(gated, scores):
            found["static"][ranking] = top1(gated, images, labels, batch)
            if ranking == "activation":
                with compensating(gated, means):
                    found["static"]["activation, suppressed channels at their mean"] = top1(
                        gated, images, labels, batch
                    )
            match_norms(gated, plain)
            found["static"][f"{ranking}, norms matched"] = top1(gated, images, labels, batch)
    calibrate(gated, plain, rounds=rounds, dynamic=False)
    found["static"]["calibrated, constant term alone"] = top1(gated, images, labels, batch)
    fitted = calibrate(gated, calibration, rounds=rounds)
    found["dynamic"], found["share"] = top1(gated, images, labels, batch), fitted.share
    if yardsticks:
        found["oracle"] = top1(OracleChoice(gated), images, labels, batch)
        fitted = calibrate(gated, calibration, rounds=rounds, temper=False)
        found["whole"] = top1(gated, images, labels, batch)
        held_out = held_out_r2(gated, fitted, images.split(batch))
        found["sites"] = {
            name: {"ratio": gated.gates[name].ratio, "shrinkage": site.shrinkage, "r2_cross_validated": site.r2,
                   "r2_held_out": held_out[name]}
            for name, site in fitted.sites.items()
        }  # fmt: skip
    return found


def measure_allocated(
    gated: Any, macs: float, calibration: Views, images: Tensor, labels: Tensor, *, batch: int = 50, rounds: int = 4,
    samples: int = 50,
) -> dict[str, Any]:  # fmt: skip
    """Top-1 of static and dynamic, each with ratios allocated to its sites by its own sensitivity, at the same MACs.

    Args:
        macs: The share of the dense MACs that is left.
        samples: Calibration images to measure sensitivity on. The others are as for `measure`.

    Returns:
        ``static`` and ``dynamic``, top-1; ``ratios``, way → site → ratio.
    """
    found: dict[str, Any] = {"ratios": {}}
    few = calibration.views[0][:samples].split(calibration.batch)
    for way, dynamic in (("static", False), ("dynamic", True)):
        data = calibration if dynamic else calibration.views[0].split(calibration.batch)
        gated.set_ratio(0.0)
        calibrate(gated, data, rounds=1, dynamic=dynamic, norms=False)  # at ratio 0: nothing is tempered
        found["ratios"][way] = dict(allocate(gated, few, macs=macs).ratios)
        calibrate(gated, data, rounds=rounds, dynamic=dynamic)
        found[way] = top1(gated, images, labels, batch)
    return found
