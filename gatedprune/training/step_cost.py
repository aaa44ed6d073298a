"""What a training step of a gated model costs beside one of the dense model: time, memory and operators.

python -m gatedprune.training.step_cost resnet18 --size 64 --batch 16
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import click
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..wrapping import is_gated, wrap

__all__ = ["StepCost", "step_cost"]


@dataclass(frozen=True)
class StepCost:
    """Of a step of SGD with momentum: forwards, backwards, update; both models in one process, alternating.

    Attributes:
        dense_ms, gated_ms: Medians, milliseconds a step.
        time: Median over the rounds of gated over dense, each pair timed one after the other.
        dense_kept, gated_kept: Bytes of activations kept for the backward pass.
        dense_state, gated_state: Bytes of parameters, buffers, gradients and momentum.
        dense_operators, gated_operators: Forwards and backwards, but for views and empty memory: on a GPU each is a
            launch or more.
        rounds: How many were timed.
    """

    dense_ms: float
    gated_ms: float
    time: float
    dense_kept: int
    gated_kept: int
    dense_state: int
    gated_state: int
    dense_operators: int
    gated_operators: int
    rounds: int

    @property
    def memory(self) -> float:
        """Gated over dense: kept activations and state together."""
        return (self.gated_kept + self.gated_state) / (self.dense_kept + self.dense_state)

    def __str__(self) -> str:
        kept = self.gated_kept / self.dense_kept
        return (
            f"step: dense {self.dense_ms:.1f} ms, gated {self.gated_ms:.1f} ms, ratio {self.time:.3f} "
            f"(median of {self.rounds} pairs)\n"
            f"memory: dense {(self.dense_kept + self.dense_state) / 1e6:.1f} MB, gated "
            f"{(self.gated_kept + self.gated_state) / 1e6:.1f} MB, ratio {self.memory:.3f}; "
            f"kept activations alone {self.dense_kept / 1e6:.1f} and {self.gated_kept / 1e6:.1f} MB, ratio {kept:.3f}\n"
            f"operators: dense {self.dense_operators}, gated {self.gated_operators}"
        )


def step_cost(model: nn.Module, images: Tensor, *, ratio: float = 0.5, rounds: int = 20, warmup: int = 2,
              **options: Any) -> StepCost:  # fmt: skip
    """Measure a step of a dense model, and of a gated copy of it. The model stays as it is.

    Args:
        images: (B, C, H, W), on the model's device.
        rounds, warmup: Timed pairs, and pairs before.
        **options: Those of `gatedprune.wrap`.
    """
    dense = copy.deepcopy(model).train()
    gated = wrap(copy.deepcopy(model), ratio, example_inputs=images[:1], **options).train()
    runs = [_Run(dense, images), _Run(gated, images)]
    for _ in range(warmup):
        for run in runs:
            run.step()
    times: list[tuple[float, float]] = []
    for i in range(rounds):
        took = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            took[j] = runs[j].step()
        times.append((took[0], took[1]))
    one, other = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return StepCost(one, other, statistics.median(b / a for a, b in times), runs[0].kept(), runs[1].kept(),
                    runs[0].state(), runs[1].state(), runs[0].operators(), runs[1].operators(), rounds)  # fmt: skip


class _Counter(TorchDispatchMode):
    """Counts the operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in func.name())
        return func(*args, **(kwargs or {}))


class _Run:
    def __init__(self, model: Any, images: Tensor) -> None:
        self.model, self.images = model, images
        with torch.no_grad():
            classes = copy.deepcopy(model)(images).shape[1]
        self.labels = torch.arange(len(images), device=images.device) % classes
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.images), self.labels)
        return loss + self.model.penalty() if is_gated(self.model) else loss

    def step(self) -> float:
        """Seconds."""
        self._wait()
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()

    def kept(self) -> int:
        """Bytes of the tensors that autograd keeps, each memory counted once, parameters and buffers left out."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        assert loss.requires_grad  # holds what was kept until here: no memory is given out twice
        return sum(sizes.values())

    def operators(self) -> int:
        """How many operators forwards and backwards run."""
        self.optimizer.zero_grad(set_to_none=True)
        with _Counter() as counter:
            self.loss().backward()
        return counter.count

    def state(self) -> int:
        """Bytes of parameters, their gradients and momentum, and buffers."""
        learnt = [p for p in self.model.parameters() if p.requires_grad]
        held = [*self.model.parameters(), *self.model.buffers(), *learnt, *learnt]
        return sum(t.numel() * t.element_size() for t in held)


@click.command()
@click.argument("model")
@click.option("--size", type=click.IntRange(8), default=64, show_default=True, help="Pixels of each side.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--ratio", type=float, default=0.5, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--straight-through", is_flag=True)
@click.option("--device", default="cpu", show_default=True, help="As torch names it: cpu, cuda.")
def main(model: str, size: int, batch: int, ratio: float, rounds: int, threads: int, straight_through: bool,
         device: str) -> None:  # fmt: skip
    """A training step of a timm model with gates, beside one without: time, memory, operators. Weights are random."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = timm.create_model(model).to(device)
    found = step_cost(network, torch.randn(batch, 3, size, size, device=device), ratio=ratio, rounds=rounds,
                      straight_through=straight_through)  # fmt: skip
    where = f"{threads} thread(s)" if device == "cpu" else device
    click.echo(f"{model}, {batch}×3×{size}×{size}, ratio {ratio:g}, {where}, torch {torch.__version__}")
    click.echo(str(found))


if __name__ == "__main__":
    main()
