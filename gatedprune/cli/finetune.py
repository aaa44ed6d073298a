"""`gatedprune finetune`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import GatedPruneError
from .common import Size

__all__ = ["command"]


def _option(*names: str, **settings: Any) -> Any:
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings.setdefault("show_default", True)
    return click.option(*names, **settings)


_OPTIONS = [
    _option(
        "--data", required=True, metavar="FOLDER|TAR|NAME", help="Folder of class folders, .tar, or torch/cifar10 …"
    ),
    _option("--val-data", metavar="FOLDER|TAR", help="Validation images, where --data holds the training split alone."),
    _option("--train-split", default="train", help="Name of the split to train on."),
    _option("--val-split", default="val", help="Name of the split to validate on."),
    _option("--data-dir", type=click.Path(file_okay=False), help="Where named data sets lie.  [default: data]"),
    _option("--download", is_flag=True, help="Fetch a named data set."),
    _option("--num-classes", type=click.IntRange(2), help="Where the data set does not tell."),
    _option("--output", required=True, type=click.Path(file_okay=False), help="Folder for all that is written."),
    _option("--resume", is_flag=True, help="Go on where a training in --output stopped."),
    _option("--mode", type=click.Choice(["dynamic", "static", "dense"]), default="dynamic", help="What is trained."),
    _option("--ratio", type=float, help="Share of each site's channels that is suppressed.  [default: 0.5]"),
    _option("--macs", type=float, help="Instead: the share of the dense MACs that may be left."),
    _option("--include", multiple=True, metavar="PATTERN", help="Gate only these sites; may be given several times."),
    _option("--exclude", multiple=True, metavar="PATTERN", help="Never gate these sites; may be given several times."),
    _option("--signed", is_flag=True, help="Gates see means, not means of absolute values."),
    _option("--rank", type=click.IntRange(1), help="Of predictors.  [default: whole matrices]"),
    _option("--straight-through", is_flag=True, help="Losers' saliencies get a gradient too."),
    _option(
        "--calibration-images",
        "calibrate",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Choose channels on N images first.",
    ),
    _option(
        "--calibration",
        type=click.Choice(["static", "dynamic"]),
        default="static",
        help="How calibrated gates start: with the best static choice, or choosing by image at once.",
    ),
    _option(
        "--schedule", type=click.Choice(["constant", "step", "cosine"]), default="cosine", help="How the ratio rises."
    ),
    _option("--rise", type=float, default=0.5, help="Share of the epochs over which it does."),
    _option("--levels", type=click.IntRange(1), help="How many ratios above 0 it takes."),
    _option("--penalty", type=float, default=1e-8, help="Weight of the L1 term on saliencies."),
    _option("--pretrained", is_flag=True, help="Start from timm's weights."),
    _option("--weights", type=click.Path(dir_okay=False), help="Start from the weights in this file."),
    _option("--size", type=Size(), help="Image size in pixels; default: the one timm configures."),
    _option("--distill", type=float, default=0.0, help="Weight of the loss against a dense teacher, in [0, 1]."),
    _option("--teacher", type=click.Path(file_okay=False), help="OUTPUT/model of a dense run; default: the start."),
    _option("--temperature", type=float, default=2.0, help="Of the teacher's logits."),
    _option("--epochs", type=click.IntRange(1), default=10, help="Passes over the training images."),
    _option("--batch-size", type=click.IntRange(1), default=64, help="Images a step, over all processes and parts."),
    _option("--accumulate", type=click.IntRange(1), default=1, help="Parts that a batch is computed in, one by one."),
    _option("--lr", type=float, default=0.01, help="Learning rate."),
    _option(
        "--gate-lr", type=float, default=1.0, help="Of predictors, in units of --lr over their inputs' mean square."
    ),
    _option("--opt", default="sgd", help="Any optimiser that timm knows."),
    _option("--momentum", type=float, default=0.9, help="Of the optimiser."),
    _option("--weight-decay", type=float, default=1e-4, help="Of the optimiser."),
    _option("--clip-grad", type=float, help="Largest norm of the gradient."),
    _option("--sched", default="cosine", help="Any learning rate schedule that timm knows."),
    _option("--warmup-epochs", type=click.IntRange(0), default=0, help="Over which the learning rate rises."),
    _option("--smoothing", type=float, default=0.0, help="Label smoothing."),
    _option("--mixup", type=float, default=0.0, help="Mixup's α."),
    _option("--min-crop", type=float, default=0.35, help="Smallest share of an image that a random crop takes."),
    _option("--auto-augment", metavar="POLICY", help="timm's policy, such as rand-m9-mstd0.5."),
    _option("--hflip", type=float, default=0.5, help="Chance of a horizontal flip."),
    _option("--ema", type=float, help="Decay of a moving average of the weights, which then is the result."),
    _option("--precision", type=click.Choice(["no", "bf16", "fp16"]), help="Mixed precision; default: accelerate's."),
    _option("--channels-last", is_flag=True, help="Memory layout."),
    _option("--compile", is_flag=True, help="torch.compile; once for each of --levels (then 5)."),
    _option("--seed", type=click.IntRange(0), default=0, help="Every random draw follows from it."),
    _option("--workers", type=click.IntRange(0), default=0, help="Processes that load images."),
    _option("--json", "as_json", is_flag=True, help="Print JSON instead of the table: OUTPUT/result.json."),
    _option("--save-every", type=float, default=5.0, help="Minutes between saves, beside the end of each epoch."),
]


@click.command("finetune")
@click.argument("model", metavar="MODEL")
@click.pass_context
def command(ctx: click.Context, model: str, output: str, resume: bool, as_json: bool, **options: Any) -> None:
    """Train MODEL with gates (or statically pruned, or dense: the same recipe) on a folder of images.

    \b
      gatedprune finetune resnet18 --pretrained --data flowers --macs 0.5 --output runs/dynamic
      gatedprune finetune resnet18 --pretrained --data flowers --mode static --macs 0.5 --output runs/static
      gatedprune finetune resnet18 --pretrained --data flowers --mode dense --output runs/dense
      gatedprune finetune runs/dense/model --data flowers --ratio 0.5 --distill 0.5 --output runs/taught
      accelerate launch -m gatedprune finetune resnet50 --data flowers --output runs/many --precision bf16

    MODEL is a name that timm knows, module:callable, or a saved folder. The folder flowers holds train/ and val/, and
    they hold a folder for each class. Stopped or killed, the same command with --resume goes on exactly. The result
    is OUTPUT/model, which gatedprune.load() takes where it is gated. Needs the extra `train`.
    """
    from ..finetune import RESULT, FinetuneConfig, Interrupted, finetune, is_main_process  # accelerate is optional

    try:
        config = FinetuneConfig(model=model, output=output, **options)
        main = is_main_process()
        result = finetune(config, resume=resume, progress=main,
                          say=lambda text: click.echo(text, err=True) if main else None)  # fmt: skip
    except Interrupted:
        if main:
            click.echo(f"Stopped; the state is in {output}. Go on with: {_again(sys.argv)}", err=True)
        ctx.exit(130)
    except (GatedPruneError, ImportError) as error:
        raise click.ClickException(str(error)) from error
    if main:
        click.echo((Path(output) / RESULT).read_text(encoding="utf-8").rstrip() if as_json else str(result))


def _again(arguments: list[str]) -> str:
    """The command that goes on."""
    program = Path(arguments[0]).name
    start = ["python", "-m", "gatedprune"] if program == "__main__.py" else [program]
    return shlex.join([*start, *(a for a in arguments[1:] if a != "--resume"), "--resume"])


for _each in reversed(_OPTIONS):
    command = _each(command)
