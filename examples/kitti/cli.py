"""The command line: `python -m gatedprune.examples.kitti demo|train|evaluate|predict|compare`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

import gatedprune
from gatedprune.errors import CheckpointError, ConfigError, GatedPruneError
from gatedprune.files import write_json
from gatedprune.training import stop_on_signal

from .augment import AUGMENTATIONS
from .checkpoint import ModelSpec, load_model, save_model
from .compare import prune_both, side_by_side
from .datasets import DepthDataset
from .demo import DemoConfig, run_demo
from .evaluate import Protocol, evaluate
from .layouts import Frame, find_frames
from .options import build_parser
from .plots import save_picture
from .predict import find_images, predict_images
from .train import TrainConfig, Trainer

__all__ = ["main"]

INTERRUPTED = 130
"""Exit status of a program that was stopped by Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, 2 for an error the user can mend, 130 when
    interrupted.
    """
    options = build_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except (GatedPruneError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _demo(options: argparse.Namespace) -> int:
    names = ("backbone", "weights", "input_size", "epochs", "finetune_epochs", "ratio", "threads", "seed")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.streets is not None:
        given["train_streets"], given["test_streets"] = options.streets, max(1, options.streets // 5)
    if options.training_seconds is not None:
        given["training_seconds"] = options.training_seconds or None
    run_demo(options.out, replace(DemoConfig(), **given), progress=not options.quiet)
    return 0


def _frames(options: argparse.Namespace, prefix: str = "") -> list[Frame]:
    get = lambda name: getattr(options, prefix + name)  # noqa: E731
    return find_frames(
        get("data"),
        layout=get("layout"),
        split=get("split"),
        annotated=get("annotated"),
        skip_missing=get("skip_missing"),
    )


def _dataset(options: argparse.Namespace, spec: ModelSpec) -> DepthDataset:
    return DepthDataset(
        _frames(options),
        image_size=spec.image_size,
        input_size=spec.input_size,
        augmentation=AUGMENTATIONS[options.augmentation],
        seed=options.seed,
        cache=options.cache,
    )


def _train_config(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        optimizer=options.optimizer,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule,
        penalty=options.penalty,
        seed=options.seed,
        workers=options.workers,
    )


def _train(options: argparse.Namespace) -> int:
    state_file = options.out / "state.pt"
    if state_file.exists() and not options.resume:
        raise ConfigError(
            f"{state_file} holds the state of an earlier training. Continue it with --resume, or give another --out."
        )
    torch.manual_seed(options.seed)
    config = _train_config(options)
    model, spec = _model_to_train(options)
    trainer = Trainer(model, _dataset(options, spec), config, spec=spec, state_file=state_file, device=options.device)
    if options.resume and trainer.resume():
        print(f"Resuming in epoch {trainer.epoch + 1}, step {trainer.step_in_epoch + 1}.")
    print(
        f"Training {spec.backbone} on {len(trainer.dataset)} frames, {config.epochs} epochs, output in {options.out}."
    )
    with stop_on_signal() as stop:
        finished = trainer.fit(progress=not options.quiet, stop=stop)
    if not finished:
        print(
            f"Stopped; the state is in {state_file}. Repeat the command with --resume to go on.",
            file=sys.stderr,
        )
        return INTERRUPTED
    save_model(options.out / "model.safetensors", model, spec)
    print(f"Mean loss by epoch: {', '.join(f'{loss:.3f}' for loss in trainer.losses)}.")
    print(f"Wrote {options.out / 'model.safetensors'}.")
    return 0


def _model_to_train(options: argparse.Namespace) -> tuple[torch.nn.Module, ModelSpec]:
    resuming = options.resume and (options.out / "state.pt").exists()
    if options.start is not None:
        model, spec = load_model(options.start, backbone=options.backbone)
    else:
        spec = ModelSpec(
            backbone=options.backbone or ModelSpec.backbone,
            decoder_channels=options.decoder_channels,
            min_depth=options.min_depth,
            max_depth=options.max_depth,
            image_size=options.image_size,
            input_size=options.input_size,
        )
        fetch = options.pretrained and options.weights is None and not resuming  # the state brings its own weights
        model = spec.build(pretrained=fetch, weights=options.weights)
    if options.ratio is not None:
        if spec.gates is not None:
            raise ConfigError(f"{options.start} is gated already. Leave out --ratio to train it on.")
        gates = gatedprune.GateConfig(ratio=options.ratio, stream=options.stream)
        model = gatedprune.wrap(model, config=gates, example_inputs=spec.example())
        spec = replace(spec, gates=gates.to_dict())
    return model, spec


def _evaluate(options: argparse.Namespace) -> int:
    model, spec = load_model(options.checkpoint, backbone=options.backbone)
    protocol = Protocol(options.crop, options.cap)
    frames = _frames(options)
    if spec.gates is not None:
        model = gatedprune.compact(model, spec.example())
    model = model.to(options.device)
    rows: list = []
    step = max(1, len(frames) // 4)

    def keep(index: int, *maps) -> None:
        if options.picture and index % step == 0 and len(rows) < 4:
            rows.append((maps[0], maps[1], [maps[2]]))

    result = evaluate(
        model,
        frames,
        image_size=spec.image_size,
        input_size=spec.input_size,
        protocol=protocol,
        device=options.device,
        progress=not options.quiet,
        see=keep,
    )
    print(result)
    if options.picture:
        save_picture(options.picture, rows, [spec.backbone if spec.gates is None else f"{spec.backbone}, gated"])
        print(f"Wrote {options.picture}.")
    if options.json:
        write_json({"metrics": result.metrics, "protocol": result.describe()}, options.json)
    return 0


def _predict(options: argparse.Namespace) -> int:
    images = find_images(options.images)
    model, spec = load_model(options.checkpoint, backbone=options.backbone)
    if spec.gates is not None:
        model = gatedprune.compact(model, spec.example())
    written = predict_images(
        model.to(options.device),
        spec,
        images,
        options.out,
        depth_png=options.depth_png,
        device=options.device,
        progress=not options.quiet,
    )
    print(f"Wrote {len(written)} files to {options.out}.")
    return 0


def _compare(options: argparse.Namespace) -> int:
    dense, spec = load_model(options.checkpoint, backbone=options.backbone)
    if spec.gates is not None:
        raise CheckpointError(
            f"{options.checkpoint} holds a gated model; compare starts from a dense one and prunes it both ways."
        )
    protocol = Protocol(options.crop, options.cap)
    frames = _frames(options, "eval_") if options.eval_data else _frames(options)
    finetune = _train_config(options) if options.epochs else None
    dataset = _dataset(options, spec) if finetune else None
    dense = dense.to(options.device)
    gates = gatedprune.GateConfig(ratio=options.ratio, stream=options.stream)
    torch.manual_seed(options.seed)
    trio = prune_both(
        dense,
        spec,
        gates,
        dataset=dataset,
        finetune=finetune,
        device=options.device,
        progress=not options.quiet,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(options.out / "gated.safetensors", trio.gated, trio.gated_spec)
    result = side_by_side(
        trio,
        frames,
        protocol=protocol,
        threads=options.threads,
        picture=options.out / "picture.png",
        progress=not options.quiet,
    )
    result.comparison.to_json(options.out / "comparison.json")
    note = "" if options.eval_data or not finetune else " Fine-tuned and evaluated on the same frames (no --eval-data)."
    text = f"{result}{note}"
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\nWrote table.txt, comparison.json, picture.png and gated.safetensors to {options.out}.")
    return 0


COMMANDS = {"demo": _demo, "train": _train, "evaluate": _evaluate, "predict": _predict, "compare": _compare}
