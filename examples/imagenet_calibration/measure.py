"""Top-1 of one gated model by how its channels are chosen: static by several rankings, dynamic, per-image oracle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatedprune import prune_static
from gatedprune.training import OracleChoice, calibrate, held_out_r2

__all__ = ["RANKINGS", "measure", "taylor_gradients", "top1"]

# "activation": mean activation times the norm of the reading weights, on the calibration images; the others are
# torch-pruning's.
RANKINGS = ("activation", "magnitude", "magnitude-l1", "batch-norm", "lamp", "taylor")


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    """Share of the images whose label has the largest logit, in percent."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(batch)])
    return 100 * float((found == labels).double().mean())


@contextmanager
def choosing(gated: Any, scores: Mapping[str, Tensor]) -> Iterator[None]:
    """Every gate keeps the channels of the largest score, (C,), not negative, for all images."""
    before = {name: {k: v.clone() for k, v in gated.gates[name].state_dict().items()} for name in scores}
    try:
        with torch.no_grad():
            for name, score in scores.items():
                gate = gated.gates[name]
                gate.weight.zero_()
                gate.bias.copy_(score)
                gate.strength.zero_()
        yield
    finally:
        for name, state in before.items():
            gated.gates[name].load_state_dict(state)


def taylor_gradients(model: nn.Module, images: Tensor, batch: int) -> None:
    """Leave in the parameters the gradient of the loss against the model's own predictions, for Taylor rankings."""
    model.zero_grad(set_to_none=True)
    for x in images.split(batch):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        (loss / len(images)).backward()


def importances() -> dict[str, Any]:
    """torch-pruning's rankings that need no labels; the last needs gradients."""
    import torch_pruning as tp

    return {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "magnitude-l1": tp.importance.GroupMagnitudeImportance(p=1),
        "batch-norm": tp.importance.BNScaleImportance(),
        "lamp": tp.importance.LAMPImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
    }


def measure(
    gated: Any, ratio: float, calibration: Tensor, images: Tensor, labels: Tensor, *, batch: int = 50,
    rounds: int = 3, rankings: Sequence[str] = RANKINGS, yardsticks: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Top-1 in percent of the ways to choose channels at one ratio.

    Args:
        gated: The model; its gates are calibrated anew. "taylor" reads the gradients of its parameters.
        calibration: (M, 3, H, W). images: (N, 3, H, W). labels: (N,), of the images.
        batch: Images a forward pass. rounds: of `gatedprune.calibrate`.
        rankings: Of `RANKINGS`. yardsticks: Also measure the per-image oracle, and R² on the images.

    Returns:
        ``ratio``; ``macs``, the share of the dense MACs that is left; ``static``, ranking → top-1; ``dynamic`` and
        ``oracle``, top-1; ``sites``, site → shrinkage and R², cross-validated and on the images.
    """
    gated.set_ratio(ratio)
    counts = {name: gate.active_count for name, gate in gated.gates.items()}
    fitted = calibrate(gated, calibration.split(batch), rounds=rounds)
    found: dict[str, Any] = {"ratio": ratio, "macs": gated.site_report.macs_with(counts) / gated.site_report.macs}
    found["dynamic"] = top1(gated, images, labels, batch)
    found["static"] = {}
    for ranking in rankings:
        if ranking == "activation":  # the regression's constant term
            scores = {name: gate.start.clone() for name, gate in gated.gates.items()}
        else:
            kept = prune_static(gated, importance=importances()[ranking], example_inputs=images[:1]).kept
            scores = {n: torch.zeros(gated.gates[n].channels).index_fill_(0, k, 1.0) for n, k in kept.items()}
        with choosing(gated, scores):
            found["static"][ranking] = top1(gated, images, labels, batch)
    found["sites"] = {n: {"shrinkage": s.shrinkage, "r2_cross_validated": s.r2} for n, s in fitted.sites.items()}
    if yardsticks:
        found["oracle"] = top1(OracleChoice(gated), images, labels, batch)
        for name, r2 in held_out_r2(gated, fitted, images.split(batch)).items():
            found["sites"][name]["r2_held_out"] = r2
    return found
