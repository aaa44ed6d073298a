"""What the command line takes: the parser with its help, apart from what is done with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .augment import AUGMENTATIONS
from .datasets import PAPER_IMAGE_SIZE, PAPER_INPUT_SIZE
from .evaluate import CROPS
from .layouts import LAYOUTS

__all__ = ["build_parser"]

PROGRAM = "python -m gatedprune.examples.kitti"
EXAMPLES = {
    "demo": f"""\
examples:
  {PROGRAM} demo                      # ResNet-50 on synthetic streets; needs no data
  {PROGRAM} demo --out my_demo --backbone resnet18 --input-size 320x96
""",
    "train": f"""\
examples (KITTI is the folder with raw/, object/ and annotated/):
  # the paper's training: ResNet-50, ImageNet weights from the hub, SGD 1e-4, batch 8, 30 epochs
  {PROGRAM} train --data $KITTI/raw --split train.txt --out runs/dense
  # without the hub: from a file, or from random weights
  {PROGRAM} train --data $KITTI/raw --weights resnet50.pth --out runs/dense
  {PROGRAM} train --data $KITTI/raw --no-pretrained --out runs/dense
  # go on after Ctrl-C
  {PROGRAM} train --data $KITTI/raw --out runs/dense --resume
  # fine-tune it with gates: half of each site's channels, chosen for each image
  {PROGRAM} train --data $KITTI/raw --start runs/dense/model.safetensors --ratio 0.5 \\
      --epochs 10 --out runs/gated

--out receives model.safetensors (weights, and what model they are of) and state.pt (for --resume).
""",
    "evaluate": f"""\
examples:
  {PROGRAM} evaluate --checkpoint runs/dense/model.safetensors --data $KITTI/object
  {PROGRAM} evaluate --checkpoint runs/gated/model.safetensors --data $KITTI/raw \\
      --split eigen_test_files.txt --skip-missing --crop garg --cap 80 --picture depth.png

The protocol is printed with the numbers. A gated model is evaluated compacted, as it would be used.
""",
    "predict": f"""\
examples:
  {PROGRAM} predict street.jpg --checkpoint runs/gated/model.safetensors --out depth
  {PROGRAM} predict $KITTI/object/training/image_2 --checkpoint runs/gated/model.safetensors --depth-png
""",
    "compare": f"""\
examples:
  # prune half of the channels statically and dynamically, fine-tune both for 3 epochs, evaluate elsewhere
  {PROGRAM} compare --checkpoint runs/dense/model.safetensors --data $KITTI/raw --epochs 3 \\
      --eval-data $KITTI/object --out runs/compare
  # without fine-tuning: what the pruning alone does
  {PROGRAM} compare --checkpoint runs/dense/model.safetensors --data $KITTI/object --epochs 0
""",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Monocular depth on KITTI, dense, statically pruned and dynamically pruned. "
        "Start with `demo`: it needs no data. `COMMAND --help` shows examples.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    descriptions = {
        "demo": "train, prune and compare on synthetic streets, in a few minutes",
        "train": "train a depth model, dense or gated",
        "evaluate": "metrics of a trained model, with their protocol",
        "predict": "depth maps of your own images",
        "compare": "dense, static and dynamic side by side: MACs, parameters, milliseconds, metrics, picture",
    }
    for name, description in descriptions.items():
        command = commands.add_parser(
            name,
            help=description,
            description=description[0].upper() + description[1:] + ".",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        ADD_OPTIONS[name](command)
    return parser


def size(text: str) -> tuple[int, int]:
    """Read `WIDTHxHEIGHT` as (height, width)."""
    width, _, height = text.lower().partition("x")
    try:
        numbers = int(height), int(width)
    except ValueError:
        numbers = (0, 0)
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT, such as 320x224, not {text!r}")
    return numbers


def widths(text: str) -> int | tuple[int, ...]:
    """Read one number, or several between commas."""
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"one number, or several between commas, not {text!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


def _data(command: argparse.ArgumentParser, prefix: str = "", purpose: str = "", required: bool = True) -> None:
    group = command.add_argument_group(f"data{purpose}")
    group.add_argument(f"--{prefix}data", type=Path, required=required, help="folder of one KITTI layout")
    group.add_argument(f"--{prefix}layout", choices=("auto", *LAYOUTS), default="auto", help="default: auto")
    group.add_argument(
        f"--{prefix}split", type=Path, help="file that names the frames: `folder frame side` on each line"
    )
    group.add_argument(
        f"--{prefix}annotated",
        type=Path,
        help="raw layout: take the official annotated depth maps in this folder",
    )
    group.add_argument(f"--{prefix}skip-missing", action="store_true", help="leave out frames whose files are missing")


def _device(command: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", default=default, help=f"default here: {default}")


def _training(command: argparse.ArgumentParser, epochs: int) -> None:
    group = command.add_argument_group("training (defaults: the paper's, where it says)")
    group.add_argument("--epochs", type=int, default=epochs, help=f"default: {epochs}")
    group.add_argument("--batch-size", type=int, default=8, help="default: 8")
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: 1e-4)")
    group.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="default: sgd")
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD (default: 0.9)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="default: 0")
    group.add_argument("--schedule", choices=("constant", "cosine"), default="constant", help="default: constant")
    group.add_argument("--penalty", type=float, default=1e-8, help="of the gates' saliencies, L1 (default: 1e-8)")
    group.add_argument(
        "--augmentation",
        choices=tuple(AUGMENTATIONS),
        default="paper",
        help="default: paper; mild for few frames",
    )
    group.add_argument("--seed", type=int, default=0, help="of order, augmentation and random weights (default: 0)")
    group.add_argument("--workers", type=int, default=0, help="processes that load frames (default: 0)")
    group.add_argument("--cache", action="store_true", help="keep the resized frames in memory (not with --workers)")


def _gates(command: argparse.ArgumentParser, ratio: float | None, help_text: str) -> None:
    group = command.add_argument_group("gates")
    group.add_argument("--ratio", type=float, default=ratio, help=help_text)
    group.add_argument("--stream", action="store_true", help="gate the producers of the residual stream too")


def _protocol(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("protocol")
    group.add_argument("--crop", choices=tuple(CROPS), default="garg", help="default: garg")
    group.add_argument("--cap", type=float, default=80.0, help="largest depth that counts, in metres (default: 80)")


def _checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors written by train")
    command.add_argument("--backbone", help="refuse a checkpoint with another backbone")
    _device(command)


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("kitti_demo"), help="output folder (default: kitti_demo)")
    command.add_argument("--backbone", help="timm model (default: resnet50)")
    command.add_argument("--weights", help="checkpoint of the backbone to start from (default: random weights)")
    command.add_argument("--input-size", type=size, help="WIDTHxHEIGHT (default: 208x64)")
    command.add_argument("--epochs", type=int, help="of the dense training")
    command.add_argument("--finetune-epochs", type=int, help="of static and dynamic, each")
    command.add_argument("--streets", type=int, help="training streets; a fifth as many for testing")
    command.add_argument("--ratio", type=float, help="share of each site's channels to suppress (default: 0.5)")
    command.add_argument("--threads", type=int, help="of the timing (default: 1)")
    command.add_argument("--seed", type=int, help="default: 0")
    command.add_argument(
        "--training-seconds",
        type=float,
        help="limit of the dense training, 0: none (default: 100)",
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    _data(command)
    model = command.add_argument_group("model")
    model.add_argument("--backbone", help="any timm model that gives feature maps (default: resnet50)")
    model.add_argument("--weights", help="checkpoint of the backbone, instead of the hub")
    model.add_argument(
        "--no-pretrained",
        dest="pretrained",
        action="store_false",
        help="start the backbone from random weights",
    )
    model.add_argument("--start", type=Path, help="start from a depth model written by train")
    model.add_argument(
        "--decoder-channels",
        type=widths,
        default=256,
        help="first stage's, then halved; or all (default: 256)",
    )
    model.add_argument("--min-depth", type=float, default=1.0, help="metres (default: 1)")
    model.add_argument("--max-depth", type=float, default=80.0, help="metres (default: 80)")
    model.add_argument(
        "--image-size",
        type=size,
        default=PAPER_IMAGE_SIZE,
        help="images are resized to this first (default: 640x480)",
    )
    model.add_argument(
        "--input-size",
        type=size,
        default=PAPER_INPUT_SIZE,
        help="network input and output (default: 320x224)",
    )
    _gates(command, None, "gate the model, suppressing this share of each site's channels (default: no gates)")
    _training(command, epochs=30)
    command.add_argument("--out", type=Path, required=True, help="output folder")
    command.add_argument("--resume", action="store_true", help="go on from state.pt in --out")
    _device(command)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    _data(command)
    _protocol(command)
    command.add_argument("--picture", type=Path, help="write a picture of some frames")
    command.add_argument("--json", type=Path, help="write the numbers and the protocol")


def _add_predict(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    command.add_argument("images", type=Path, nargs="+", help="images, or folders with images")
    command.add_argument("--out", type=Path, default=Path("depth"), help="output folder (default: depth)")
    command.add_argument("--depth-png", action="store_true", help="also write KITTI depth PNGs (metres times 256)")


def _add_compare(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    _data(command, purpose=" for fine-tuning (and for evaluation, without --eval-data)")
    _data(command, "eval-", " for evaluation", required=False)
    _protocol(command)
    _gates(command, 0.5, "share of each site's channels to suppress (default: 0.5)")
    _training(command, epochs=3)
    command.add_argument("--threads", type=int, default=1, help="of the timing (default: 1)")
    command.add_argument("--out", type=Path, default=Path("kitti_compare"), help="default: kitti_compare")


ADD_OPTIONS = {
    "demo": _add_demo,
    "train": _add_train,
    "evaluate": _add_evaluate,
    "predict": _add_predict,
    "compare": _add_compare,
}
