"""Static choices: every image keeps the same channels; as they are, with bias compensation, or with matched norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatedprune import prune_static

__all__ = ["RANKINGS", "choosing", "compensating", "reading_means", "scores_by", "taylor_gradients"]

# "activation": mean activation times the norm of the reading weights, on the calibration images; the others are
# torch-pruning's.
RANKINGS = ("activation", "magnitude", "magnitude-l1", "batch-norm", "lamp", "taylor")


@contextmanager
def choosing(gated: Any, scores: Mapping[str, Tensor]) -> Iterator[None]:
    """Every gate keeps the channels of the largest score, (C,), not negative, for all images; no norm is matched."""
    before = {k: v.clone() for k, v in gated.gate_modules.state_dict().items()}
    try:
        gated.gate_modules.clear_matches()
        with torch.no_grad():
            for name, score in scores.items():
                gate = gated.gates[name]
                gate.weight.zero_()
                gate.bias.copy_(score)
                gate.strength.zero_()
        yield
    finally:
        gated.gate_modules.load_state_dict(before)


def taylor_gradients(model: nn.Module, images: Tensor, batch: int) -> None:
    """Leave in the parameters the gradient of the loss against the model's own predictions, for Taylor rankings."""
    model.zero_grad(set_to_none=True)
    for x in images.split(batch):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
        (loss / len(images)).backward()


def scores_by(gated: Any, ranking: str, example: Tensor) -> dict[str, Tensor]:
    """Site name → 1 for the channels that torch-pruning keeps by that ranking, 0 for the others, (C,)."""
    import torch_pruning as tp

    importances: dict[str, Any] = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "magnitude-l1": tp.importance.GroupMagnitudeImportance(p=1),
        "batch-norm": tp.importance.BNScaleImportance(),
        "lamp": tp.importance.LAMPImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance(),
    }
    kept = prune_static(gated, importance=importances[ranking], example_inputs=example).kept
    return {name: torch.zeros(gated.gates[name].channels).index_fill_(0, k, 1.0) for name, k in kept.items()}


def reading_means(gated: Any, images: Tensor, batch: int) -> dict[str, Tensor]:
    """Path of each layer that reads a site → mean of its input channels over images and places, (C,).

    The gates must be at ratio 0.
    """
    sums: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            dims = [d for d in range(args[0].dim()) if d != 1]
            sums[path] = sums.get(path, torch.zeros(())) + args[0].double().mean(dims) * len(args[0])

        return hook

    paths = {edge.path for site in gated.gated_sites for edge in site.consumers}
    handles = [gated.get_submodule(path).register_forward_pre_hook(watch(path)) for path in paths]
    try:
        with torch.no_grad():
            for x in images.split(batch):
                gated(x)
    finally:
        for handle in handles:
            handle.remove()
    return {path: (total / len(images)).float() for path, total in sums.items()}


@contextmanager
def compensating(gated: Any, means: Mapping[str, Tensor]) -> Iterator[None]:
    """Layers that read a site see suppressed channels at their mean: static pruning with bias compensation.

    Up to padding, where a pruned model has a bias instead; 1×1 convolutions have none.
    """

    def fill(gate: Any, edge: Any) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            known = edge.units >= 0
            kept = torch.zeros(len(x), gate.channels, dtype=torch.bool).scatter_(1, gate.last_active, True)
            gone = torch.zeros(len(x), len(known), dtype=torch.bool)
            gone[:, known] = ~kept[:, edge.units[known]]
            view = (..., *[None] * (x.dim() - 2))
            return (torch.where(gone[view], means[edge.path][view], x),)

        return hook

    handles = [
        gated.get_submodule(edge.path).register_forward_pre_hook(fill(gated.gates[site.name], edge))
        for site in gated.gated_sites
        for edge in site.consumers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
