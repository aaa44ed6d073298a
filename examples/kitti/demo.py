"""The whole path on synthetic streets in a few minutes: write, train, prune both ways, fine-tune, compare,
show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import gatedprune

from .augment import AUGMENTATIONS
from .checkpoint import ModelSpec, save_model
from .compare import SideBySide, prune_both, side_by_side
from .datasets import DepthDataset
from .layouts import find_frames
from .synthetic import write_sample
from .train import TrainConfig, Trainer

__all__ = ["DemoConfig", "run_demo"]


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults fit into a few minutes on two cores.

    The paper's ResNet-50 with fewer decoder channels and smaller images, from random weights, on 60 frames.
    AdamW instead of SGD, because it has to learn in a hundred steps. See docs/kitti.md for what this does and
    does not say.
    """

    backbone: str = "resnet50"
    weights: str | None = None
    decoder_channels: int = 96
    input_size: tuple[int, int] = (64, 208)
    train_streets: int = 20
    test_streets: int = 4
    frames: int = 3
    epochs: int = 9
    finetune_epochs: int = 3
    batch_size: int = 4
    lr: float = 1.5e-3
    finetune_lr: float = 5e-4
    ratio: float = 0.5
    threads: int = 1
    seed: int = 0
    training_seconds: float | None = 100.0
    """Limit of the dense training, and 0.4 of it of each fine-tuning, so that a slow machine gets through;
    None: no limit."""


def run_demo(out: Path, config: DemoConfig | None = None, *, progress: bool = True) -> SideBySide:
    """Run the demo; everything it writes is under `out`: data, checkpoints, comparison.json, table.txt,
    picture.png.
    """
    config = config or DemoConfig()
    began = time.monotonic()
    torch.manual_seed(config.seed)
    print(f"1. Writing street scenes in the KITTI raw layout to {out / 'data'}")
    sample = write_sample(
        out / "data",
        train_streets=config.train_streets,
        test_streets=config.test_streets,
        frames=config.frames,
        seed=config.seed,
        progress=progress,
    )
    dataset = DepthDataset(
        find_frames(sample.root, split=sample.train),
        image_size=config.input_size,
        input_size=config.input_size,
        augmentation=AUGMENTATIONS["mild"],
        seed=config.seed,
        cache=True,
    )
    start = "random weights" if config.weights is None else config.weights
    print(f"2. Training the dense {config.backbone} depth model from {start}: {len(dataset)} frames")
    spec = ModelSpec(
        config.backbone, config.decoder_channels, image_size=config.input_size, input_size=config.input_size
    )
    dense = spec.build(weights=config.weights)
    limit = config.training_seconds
    train = TrainConfig(
        config.epochs,
        config.batch_size,
        config.lr,
        optimizer="adamw",
        schedule="cosine",
        weight_decay=0.01,
        seed=config.seed,
        max_seconds=limit,
    )
    Trainer(dense, dataset, train, spec=spec).fit(label="training, dense     ", progress=progress)
    save_model(out / "dense.safetensors", dense, spec)
    print(
        f"3. Pruning {config.ratio:.0%} of each site's channels, statically and dynamically, and fine-tuning both alike"
    )
    finetune = replace(
        train,
        epochs=config.finetune_epochs,
        lr=config.finetune_lr,
        seed=config.seed + 1,
        max_seconds=None if limit is None else limit * 0.4,
    )
    trio = prune_both(
        dense,
        spec,
        gatedprune.GateConfig(ratio=config.ratio),
        dataset=dataset,
        finetune=finetune,
        progress=progress,
    )
    save_model(out / "gated.safetensors", trio.gated, trio.gated_spec)
    print("4. Compacting the gated model, evaluating, counting and timing all three")
    result = side_by_side(
        trio,
        find_frames(sample.root, split=sample.test),
        threads=config.threads,
        picture=out / "picture.png",
        progress=progress,
    )
    result.comparison.to_json(out / "comparison.json")
    (out / "table.txt").write_text(f"{result}\n", encoding="utf-8")
    print(f"\n{result}\n")
    print(
        "These are synthetic streets and a training of a minute: the numbers show that it works, and nothing of KITTI."
    )
    print(f"Picture: {out / 'picture.png'}, table: {out / 'table.txt'}, in {time.monotonic() - began:.0f} s.")
    return result
