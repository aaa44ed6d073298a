"""The command line: the program `gatedprune`, one module a command.

A command is a module with a `command`; what several of them need (how MODEL is found, sizes, errors) is in `common`.
"""

from __future__ import annotations

import click

from .._version import __version__
from . import bench, calibrate, compare, export, finetune, inspect, usage

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gatedprune")
def main() -> None:
    """Channels chosen per image: see what a model offers, and what it gains.

    \b
      gatedprune inspect resnet50                     what can be gated, and why the rest cannot
      gatedprune inspect vit_small_patch16_224        attention heads and hidden units of a transformer
      gatedprune inspect mypackage.models:build       a model of your own: what build() returns
      gatedprune compare resnet18 --ratio 0.5         dense, static and dynamic: MACs, parameters, ms
      gatedprune bench resnet50 --ratio 0.3,0.5       the same over ratios, sizes, batches and threads, as a plot
      gatedprune calibrate resnet50 --pretrained --data images/ --ratio 0.3 --output my_model
      gatedprune export my_model                      a saved model as an ONNX file, gates included
      gatedprune finetune resnet18 --data flowers --output runs/a      train gates on a folder of images, resumable
      gatedprune usage my_model --images photos       which channels win, how often, for which classes
    """


main.add_command(inspect.command)
main.add_command(compare.command)
main.add_command(bench.command)
main.add_command(calibrate.command)
main.add_command(export.command)
main.add_command(finetune.command)
main.add_command(usage.command)
