"""What `gatedprune compare --finetune` trains before it compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch import nn

from .common import Chosen, either_budget

__all__ = ["trained", "trials_of"]

CALIBRATION_IMAGES = 256


def trials_of(model: Chosen, output: Path, recipe: dict[str, Any], ratios: list[float] | None, gating: dict[str, Any],
              *, epochs: int, lr: float, distill: float) -> Any:  # fmt: skip
    """A dense training, and from it static and dynamic ones for each ratio, or for one share of the MACs."""
    from ..finetune import Trials  # accelerate is optional

    if model.build.kind == "saved":
        raise click.UsageError(f"--finetune starts from a dense model; {model.build.text} has gates.")
    either_budget(ratios, gating["macs"])
    dense = {"model": model.build.text, "pretrained": bool(model.options.get("pretrained")),
             "weights": None if model.weights is None else str(model.weights), "lr": lr}  # fmt: skip
    pruned = {"lr": lr / 3, "distill": distill, "calibrate": CALIBRATION_IMAGES,
              **{name: value for name, value in gating.items() if name != "macs"}}  # fmt: skip
    budget, budgets = ("ratio", ratios or [0.5]) if gating["macs"] is None else ("macs", [gating["macs"]])
    return Trials(output, {**recipe, "epochs": epochs}, dense, pruned, budgets, budget)


def trained(trials: Any) -> nn.Module:
    """Train what is not trained yet; returns the dense model. After Ctrl-C the program ends, and can go on."""
    from ..finetune import Interrupted, load_finetuned

    try:
        trials.train(lambda text: click.echo(text, err=True))
    except Interrupted:
        click.echo(f"Stopped; the state is in {trials.output}. The same command goes on.", err=True)
        click.get_current_context().exit(130)
    dense: nn.Module = load_finetuned(trials.dense_trial(trials.seeds[0]).model)
    return dense
