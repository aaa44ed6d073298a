"""What a training step of a gated model costs beside one of the dense model: time, memory and operators.

python -m gatedprune.training.step_cost resnet18 --size 64 --batch 16
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..wrapping import is_gated, wrap

__all__ = ["StepCost", "step_cost"]

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepCost:
    """Of a step of SGD with momentum: forwards, backwards, update; both models in one process, alternating.

    Attributes:
        dense_ms, gated_ms: Medians, milliseconds a step.
        time: Median over the rounds of gated over dense, each pair timed one after the other.
        dense_kept, gated_kept: Bytes of activations kept for the backward pass.
        dense_state, gated_state: Bytes of parameters, buffers, gradients and momentum.
        dense_operators, gated_operators: Forwards and backwards, but for views, constants and empty memory: on a GPU
            each is a launch or more. Without `torch.compile`, which makes fewer of them.
        dense_traffic, gated_traffic: Bytes that these operators read and write, values that are spread over others
            (`expand`) counted once. Where memory is what limits a GPU, times are as these.
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
    dense_traffic: int
    gated_traffic: int
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
            f"operators: dense {self.dense_operators}, gated {self.gated_operators}; they read and write "
            f"{self.dense_traffic / 1e6:.1f} and {self.gated_traffic / 1e6:.1f} MB, "
            f"ratio {self.gated_traffic / self.dense_traffic:.3f}"
        )


def step_cost(model: nn.Module, images: Tensor, *, ratio: float = 0.5, rounds: int = 20, warmup: int = 2,
              compiled: bool = False, autocast: torch.dtype | None = None, **options: Any) -> StepCost:  # fmt: skip
    """Measure a step of a dense model, and of a gated copy of it. The model stays as it is.

    Args:
        images: (B, C, H, W), on the model's device.
        rounds, warmup: Timed pairs, and pairs before.
        compiled: Both models by `torch.compile`.
        autocast: Forwards under autocast with this type.
        **options: Those of `gatedprune.wrap`.
    """
    dense = copy.deepcopy(model).train()
    gated = wrap(copy.deepcopy(model), ratio, example_inputs=images[:1], **options).train()
    runs = [_Run(m, images, compiled, autocast) for m in (dense, gated)]
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
    counts = [run.operators() for run in runs]
    return StepCost(one, other, statistics.median(b / a for a, b in times), runs[0].kept(), runs[1].kept(),
                    runs[0].state(), runs[1].state(), counts[0].count, counts[1].count, counts[0].traffic,
                    counts[1].traffic, rounds)  # fmt: skip


class _Counter(TorchDispatchMode):
    """Counts the operators that compute something, and the bytes that they read and write."""

    count = traffic = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.name() or "scalar_tensor" in func.name()):
            self.count += 1
            self.traffic += sum(_bytes(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


def _bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


class _Run:
    def __init__(self, model: Any, images: Tensor, compiled: bool, autocast: torch.dtype | None) -> None:
        self.model, self.images, self.autocast = model, images, autocast
        self.forward = torch.compile(model) if compiled else model
        with torch.no_grad():
            classes = copy.deepcopy(model)(images).shape[1]
        self.labels = torch.arange(len(images), device=images.device) % classes
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def loss(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(self.images.device.type, self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(forward(self.images), self.labels)
            return loss + self.model.penalty() if is_gated(self.model) else loss

    def step(self) -> float:
        """Seconds."""
        self._wait()
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.forward).backward()
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
            loss = self.loss(self.forward)
        assert loss.requires_grad  # holds what was kept until here: no memory is given out twice
        return sum(sizes.values())

    def operators(self) -> _Counter:
        """Of a step without its update, forwards and backwards."""
        self.optimizer.zero_grad(set_to_none=True)
        with _Counter() as counter:
            self.loss(self.model).backward()
        return counter

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
@click.option("--compile", "compiled", is_flag=True, help="Both by torch.compile; operators are counted without.")
@click.option(
    "--precision",
    type=click.Choice(["no", *PRECISIONS]),
    default="no",
    show_default=True,
    help="Forwards under autocast.",
)
@click.option("--channels-last", is_flag=True)
@click.option("--device", default="cpu", show_default=True, help="As torch names it: cpu, cuda.")
def main(model: str, size: int, batch: int, ratio: float, rounds: int, threads: int, straight_through: bool,
         compiled: bool, precision: str, channels_last: bool, device: str) -> None:  # fmt: skip
    """A training step of a timm model with gates, beside one without: time, memory, operators. Weights are random."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = timm.create_model(model).to(device, memory_format=layout)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    found = step_cost(network, images, ratio=ratio, rounds=rounds, compiled=compiled,
                      autocast=PRECISIONS.get(precision), straight_through=straight_through)  # fmt: skip
    how = [f"{threads} thread(s)" if device == "cpu" else device, *(["compiled"] if compiled else []),
           *([precision] if precision != "no" else []), *(["channels last"] if channels_last else [])]  # fmt: skip
    click.echo(f"{model}, {batch}×3×{size}×{size}, ratio {ratio:g}, {', '.join(how)}, torch {torch.__version__}")
    click.echo(str(found))


if __name__ == "__main__":
    main()
