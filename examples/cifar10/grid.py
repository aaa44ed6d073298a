"""The trainings: a dense network for each seed, and from it static and dynamic ones at each share of its MACs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedprune.finetune import RESULT, FinetuneConfig, finetune

__all__ = ["Grid", "Run"]

WAYS = ("static", "dynamic")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        way: "dense", "static" or "dynamic".
        macs: The share of the dense MACs that is asked for; 1 for dense.
        seed: Of the dense training and of all that start from it.
        config: What `finetune` is told.
    """

    way: str
    macs: float
    seed: int
    config: FinetuneConfig

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return Path(self.config.output) / "model"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the training wrote at its end; None before."""
        file = Path(self.config.output) / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def train(self, say: Callable[[str], None]) -> None:
        """Train, from where it stopped if it did, unless it is done."""
        if self.result is None:
            say(f"{Path(self.config.output).name}:")
            finetune(self.config, resume=True, say=say)


@dataclass(frozen=True)
class Grid:
    """All trainings of one comparison.

    Args:
        output: A folder; each training has one in it.
        recipe: What all have in common.
        dense: Fields of `FinetuneConfig` for the dense trainings alone: the model, its weights, epochs, learning rate.
        pruned: Fields for those that start from the dense ones.
        seeds, macs: One dense training for each seed, two more for each share of the MACs.
    """

    output: Path
    recipe: dict[str, Any]
    dense: dict[str, Any]
    pruned: dict[str, Any]
    seeds: Sequence[int]
    macs: Sequence[float]

    def __iter__(self) -> Iterator[Run]:
        for seed in self.seeds:
            yield self.dense_run(seed)
            for share in self.macs:
                for way in WAYS:
                    yield self.pruned_run(way, share, seed)

    def dense_run(self, seed: int) -> Run:
        """The dense training of a seed."""
        return Run("dense", 1.0, seed, self._config(f"dense-{seed}", seed, mode="dense", **self.dense))

    def pruned_run(self, way: str, share: float, seed: int) -> Run:
        """A training that starts from the dense one of its seed, which also teaches it."""
        start = str(self.dense_run(seed).model)
        config = self._config(f"{way}-{share:g}-{seed}", seed, mode=way, model=start, macs=share, **self.pruned)
        return Run(way, share, seed, config)

    def _config(self, name: str, seed: int, **fields: Any) -> FinetuneConfig:
        return FinetuneConfig(**{**self.recipe, **fields, "seed": seed, "output": str(self.output / name)})

    def to_dict(self) -> dict[str, Any]:
        """What was done, for the record."""
        return {**dataclasses.asdict(self), "output": str(self.output)}
