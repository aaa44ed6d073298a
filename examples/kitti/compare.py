"""The dense model beside its static and its dynamic pruning: same sites, same k, same fine-tuning, same
frames.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gatedprune
from gatedprune.compare import Comparison, compare_models

from .checkpoint import ModelSpec
from .datasets import DepthDataset
from .evaluate import Evaluation, Protocol, evaluate
from .layouts import Frame
from .plots import save_picture
from .train import TrainConfig, Trainer

__all__ = ["SideBySide", "Trio", "prune_both", "side_by_side"]

SHOWN_METRICS = {"rms": "RMS", "rel": "REL", "delta1": "δ1"}


@dataclass
class Trio:
    """A dense model, the statically pruned one and the gated one, with the specs that rebuild dense and
    gated.
    """

    dense: nn.Module
    static: nn.Module
    gated: nn.Module
    dense_spec: ModelSpec
    gated_spec: ModelSpec


def prune_both(
    dense: nn.Module,
    spec: ModelSpec,
    gates: gatedprune.GateConfig,
    *,
    dataset: DepthDataset | None = None,
    finetune: TrainConfig | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Trio:
    """Prune a trained model both ways, on the same sites with the same k, and fine-tune both alike.

    Args:
        dense: stays as it is.
        spec: of the dense model.
        gates: ratio and options of the gates.
        dataset, finetune: for the fine-tuning; None: none.

    Returns:
        The three models, in evaluation mode. The dense one is *not* trained further.
    """
    gated = gatedprune.wrap(copy.deepcopy(dense), config=gates, example_inputs=spec.example().to(device))
    static = gatedprune.prune_static(
        gated,
        example_inputs=spec.example().to(device),
        by="torch-pruning",  # to be fine-tuned
    ).model
    gated_spec = replace(spec, gates=gates.to_dict())
    if dataset is not None and finetune is not None:
        dynamic = Trainer(gated, dataset, finetune, spec=spec, device=device)
        dynamic.fit(label="fine-tuning, dynamic", progress=progress)
        # Where time cut the first short, the second gets the same number of steps, however fast they are.
        alike = replace(finetune, max_steps=dynamic.steps_done, max_seconds=None)
        Trainer(static, dataset, alike, spec=spec, device=device).fit(label="fine-tuning, static ", progress=progress)
    return Trio(dense.eval(), static.eval(), gated.eval(), spec, gated_spec)


@dataclass
class SideBySide:
    """The table, and the evaluations behind its metrics, by row name."""

    comparison: Comparison
    evaluations: dict[str, Evaluation]

    def __str__(self) -> str:
        return f"{self.comparison}\nProtocol: {self.evaluations['dense'].describe()}."


def side_by_side(
    trio: Trio,
    frames: Sequence[Frame],
    *,
    protocol: Protocol | None = None,
    threads: int = 1,
    repeats: int = 30,
    picture: Path | None = None,
    picture_rows: int = 4,
    progress: bool = True,
) -> SideBySide:
    """Evaluate, count and time the three models; the dynamic one is evaluated and timed compacted.

    Args:
        frames: to evaluate on.
        threads, repeats: of the timing, at batch 1 and the network's input size.
        picture: where to write the picture of image, ground truth and depth before and after pruning.
        picture_rows: how many frames it shows, evenly spread.
    """
    spec = trio.dense_spec
    device = next(trio.dense.parameters()).device
    names = ["dense", "static", "dynamic"]
    evaluations: dict[str, Evaluation] = {}
    shown = {int(i) for i in np.linspace(0, len(frames) - 1, min(picture_rows, len(frames)))}
    rows: dict[int, tuple[np.ndarray, np.ndarray, list[np.ndarray]]] = {index: (_NONE, _NONE, []) for index in shown}

    def keep(index: int, image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> None:
        if index in rows:
            rows[index] = (image, truth, [*rows[index][2], prediction])

    def measure(model: nn.Module) -> dict[str, float]:
        name = names[len(evaluations)]  # compare_models() asks in the order of its rows
        evaluations[name] = evaluate(
            model,
            frames,
            image_size=spec.image_size,
            input_size=spec.input_size,
            protocol=protocol,
            device=device,
            label=f"evaluating, {name:7}",
            progress=progress,
            see=keep,
        )
        return {title: evaluations[name].metrics[metric] for metric, title in SHOWN_METRICS.items()}

    comparison = compare_models(
        trio.dense,
        trio.static,
        trio.gated,
        spec.example().to(device),
        evaluate=measure,
        threads=threads,
        repeats=repeats,
    )
    if picture is not None:
        titles = ["before pruning (dense)", "after static pruning", "after dynamic pruning"]
        save_picture(picture, [rows[index] for index in sorted(rows)], titles)
    return SideBySide(comparison, evaluations)


_NONE = np.empty(0)
