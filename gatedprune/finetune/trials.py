"""Several trainings that belong together: a dense one, and from it static and dynamic ones at the same budgets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare import Comparison, compare_models
from ..errors import ConfigError
from .command import RESULT, finetune
from .models import load_finetuned
from .options import FinetuneConfig

__all__ = ["WAYS", "Trial", "Trials"]

WAYS = ("static", "dynamic")


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        way: "dense", "static" or "dynamic".
        budget: What is asked for, see `Trials`; 1 for dense.
        seed: Of the dense training and of all that start from it.
        config: What `finetune` is told.
    """

    way: str
    budget: float
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

    def train(self, say: Callable[[str], None] = lambda text: None, *, progress: bool = True) -> None:
        """Train, from where it stopped if it did, unless it is done.

        Raises:
            ConfigError: It is done, with other options. And whatever `finetune` raises.
        """
        result = self.result
        if result is None:
            say(f"{Path(self.config.output).name}:")
            finetune(self.config, resume=True, progress=progress, say=say)
            return
        changed = FinetuneConfig.from_dict(result["options"]).differences(self.config)
        if changed:
            raise ConfigError(
                f"{self.config.output} was trained with other options ({'; '.join(changed)}). Give the same ones, or "
                "another folder."
            )


@dataclass(frozen=True)
class Trials:
    """The trainings of one comparison: static and dynamic start from the same dense network, leave the same, and are
    trained with the same images in the same order, by the same teacher, with the same options.

    Args:
        output: A folder; each training has one in it.
        recipe: Fields of `FinetuneConfig` that all have in common: the data, at least.
        dense: Fields for the dense trainings alone: the model, its weights, epochs, learning rate.
        pruned: Fields for those that start from the dense ones, such as the weight of the distillation.
        budgets: What static and dynamic leave: one training of each for every number and seed.
        budget: "macs": the numbers are shares of the dense MACs; "ratio": shares of channels that are suppressed.
        seeds: One dense training for each.
    """

    output: Path
    recipe: dict[str, Any]
    dense: dict[str, Any]
    pruned: dict[str, Any]
    budgets: Sequence[float]
    budget: str = "macs"
    seeds: Sequence[int] = (0,)

    def __iter__(self) -> Iterator[Trial]:
        for seed in self.seeds:
            yield self.dense_trial(seed)
            for share in self.budgets:
                for way in WAYS:
                    yield self.pruned_trial(way, share, seed)

    def dense_trial(self, seed: int) -> Trial:
        """The dense training of a seed."""
        return Trial("dense", 1.0, seed, self._config(f"dense-{seed}", seed, mode="dense", **self.dense))

    def pruned_trial(self, way: str, budget: float, seed: int) -> Trial:
        """A training that starts from the dense one of its seed, which also teaches it."""
        options = {"mode": way, "model": str(self.dense_trial(seed).model), self.budget: budget, **self.pruned}
        return Trial(way, budget, seed, self._config(f"{way}-{budget:g}-{seed}", seed, **options))

    def _config(self, name: str, seed: int, **fields: Any) -> FinetuneConfig:
        return FinetuneConfig(**{**self.recipe, **fields, "seed": seed, "output": str(self.output / name)})

    def train(self, say: Callable[[str], None] = lambda text: None, *, progress: bool = True) -> None:
        """All that is not done yet, one after the other."""
        for trial in self:
            trial.train(say, progress=progress)

    def compare(self, example_inputs: Any, seed: int | None = None, **options: Any) -> Comparison:
        """The trained models of one seed in one table; those that are not trained yet are left out.

        Args:
            example_inputs: As in `gatedprune.compare`.
            seed: Default: the first one.
            **options: Those of `gatedprune.compare.compare_models`.

        Raises:
            ConfigError: The dense training, or all at the same budget, are not done.
        """
        seed = self.seeds[0] if seed is None else seed
        dense = self.dense_trial(seed)
        models: dict[str, dict[str, Any]] = {way: {} for way in WAYS}
        for budget in self.budgets:
            pair = [self.pruned_trial(way, budget, seed) for way in WAYS]
            if all(trial.result for trial in pair):
                for trial in pair:
                    models[trial.way][f"{budget:g}"] = load_finetuned(trial.model)
        if dense.result is None or not models["dynamic"]:
            raise ConfigError(f"Nothing in {self.output} is trained to its end yet: call train() first.")
        return compare_models(load_finetuned(dense.model), models["static"], models["dynamic"], example_inputs,
                              **options)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What was done, for the record."""
        return {**dataclasses.asdict(self), "output": str(self.output)}
