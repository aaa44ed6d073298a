"""Static against dynamic: the same sites, the same number of channels, the same fine-tuning; who is more accurate?

`python -m gatedprune.examples.static_against_dynamic --help`; the page is docs/compare.md.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import nn

import gatedprune
from gatedprune.compare import compare_models
from gatedprune.training import reestimate_norms

from .shapes import CLASSES, make_images, top1, train

__all__ = ["main"]


@click.command(context_settings={"show_default": True})
@click.option("--model", "name", default="test_resnet", help="A name that timm knows.")
@click.option("--ratio", type=click.FloatRange(0, 1, max_open=True), default=0.5, help="Share of suppressed channels.")
@click.option("--size", type=click.IntRange(32), default=48, help="Height and width of the images, in pixels.")
@click.option("--images", "count", type=click.IntRange(64), default=4096, help="Made-up images to train on.")
@click.option("--steps", type=click.IntRange(1), default=150, help="Batches of 32 to train the dense model for.")
@click.option("--finetune", type=click.IntRange(0), default=60, help="Batches to fine-tune each pruned model for.")
@click.option("--test", "held", type=click.IntRange(64), default=512, help="Other images to measure accuracy on.")
@click.option("--seed", type=int, default=0, help="Of weights and batches.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the comparison to a file.")
def main(name: str, ratio: float, size: int, count: int, steps: int, finetune: int, held: int, seed: int,
         file: Path | None) -> None:  # fmt: skip
    """Dense, statically pruned and gated, on made-up pictures of figures: accuracy, MACs, milliseconds.

    Needs the extra `compare` (torch-pruning and thop).
    """
    torch.manual_seed(seed)
    data = make_images(count, size, seed=1)
    test = make_images(held, size, seed=2)

    dense = timm.create_model(name, num_classes=len(CLASSES))
    train(dense, *data, steps=steps, lr=1e-2, seed=seed)
    print(f"dense      trained for {steps} steps: top-1 {top1(dense, *test):.1f}")

    try:
        gated: Any = gatedprune.wrap(copy.deepcopy(dense), ratio, example_inputs=data[0][:2])
        some = data[0][:256].split(32)
        plain = gatedprune.prune_static(gated, example_inputs=data[0][:2]).model
        reestimate_norms(plain, some)
        found = gated.calibrate(some)
        by_image = top1(gated, *test)
        # Training starts best from one choice for all images, with a gain that may follow: the page on fine-tuning.
        gated.calibrate(some, dynamic=False, strength=1.0)
        keep = {name: gate.bias.topk(gate.active_count).indices for name, gate in gated.gates.items()}
        static: nn.Module = gatedprune.prune_static(gated, keep=keep, example_inputs=data[0][:2]).model
        reestimate_norms(static, some)
        print(f"pruned     at ratio {ratio:g}, not fine-tuned: static by weights {top1(plain, *test):.1f}, static, "
              f"calibrated {top1(gated, *test):.1f}, dynamic, calibrated {by_image:.1f} ({found.share:g} of its "
              "predictors)")  # fmt: skip
        for model in (static, gated):
            train(model, *data, steps=finetune, lr=3e-3, seed=seed)
        print(f"fine-tuned from the same choice, alike for {finetune} steps:\n")
        result = compare_models(dense, static, gated, data[0][:1], evaluate=lambda m: {"top1": top1(m, *test)})
    except (gatedprune.GatedPruneError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    print(result)
    if file is not None:
        result.to_json(file)


if __name__ == "__main__":
    main()
