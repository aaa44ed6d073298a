"""Is what was written what was meant? The file is run again, and compared with the compact model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..engine import CompactModel
from ..errors import ExportError, GatedPruneError
from .formats import Runner

__all__ = ["Checked", "compare_file", "first_line", "random_inputs"]

# A runtime may lose as much to rounding as plain PyTorch does, several times over: other sums, other polynomials for
# exp and erf, about 1e-7 a step. A wrong channel is off by the size of the output itself.
_ROUNDING_FACTOR = 10.0
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Checked:
    """What `compare_file` saw; see `Exported`."""

    difference: float | None
    active_sets: int | None
    sizes: tuple[tuple[int, ...], ...]
    runtimes: tuple[str, ...]


def compare_file(runners: Mapping[str, Runner], fast: CompactModel, args: tuple[Any, ...], batch: int | None,
                 any_size: bool, name: str) -> Checked:  # fmt: skip
    """Run the file and the compact model on random inputs; raises where they differ by more than rounding."""
    generator = torch.Generator().manual_seed(0)
    exact = copy.deepcopy(fast).double()
    worst, checked = 0.0, []
    chosen: dict[str, set] = {site: set() for site in fast.gates}
    for sized, samples in _trials(args, batch, any_size):
        inputs = tuple(random_inputs(a, samples, generator) for a in sized)
        try:
            wanted, precise = _outputs(fast, inputs), _outputs(exact, tuple(_double(a) for a in inputs))
        except (RuntimeError, GatedPruneError):
            if sized is args:
                raise
            continue  # a size that the model itself does not take
        checked.append(tuple(next(a.shape[2:] for a in inputs if isinstance(a, Tensor) and a.dim())))
        for site, active in fast.last_active.items():
            chosen[site].update(map(tuple, active.tolist()))
        for runtime, run in runners.items():
            file = f"{name} file, in {runtime}," if runtime else f"{name} file"
            hint = " Try a fixed number of samples, such as batch=1." if batch is None else ""
            worst = max(worst, _difference(run, inputs, wanted, precise, file, hint))
    if any_size and len(set(checked)) < 2:
        raise ExportError("The model takes no other image size: export it without any_size.")
    sets = max((len(s) for s in chosen.values() if s), default=1)
    return Checked(worst, sets, tuple(dict.fromkeys(checked)), tuple(name for name in runners if name))


def _trials(args: tuple[Any, ...], batch: int | None, any_size: bool) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Arguments and numbers of samples. An exported graph must not hold those that it was traced with."""
    for samples in (1, 3) if batch is None else (batch,) * max(2, 4 // batch):
        yield args, samples
    for more in ((32, 32), (64, 0), (17, 9)) if any_size else ():  # odd ones: padding may depend on the size
        yield tuple(
            a.new_zeros(*a.shape[:2], a.shape[2] + more[0], a.shape[3] + more[1])
            if isinstance(a, Tensor) and a.dim() == 4 else a
            for a in args
        ), batch or 2  # fmt: skip


def _difference(run: Runner, inputs: tuple[Any, ...], wanted: list[Tensor], precise: list[Tensor], name: str,
                hint: str) -> float:  # fmt: skip
    """Largest difference of a file's outputs to the compact model's, relative to the largest output."""
    try:
        found = run(*inputs)
    except ImportError:
        raise
    except Exception as error:
        shapes = [tuple(a.shape) for a in inputs if isinstance(a, Tensor)]
        raise ExportError(f"The {name} does not run on inputs of shape {shapes}: {first_line(error)}{hint}") from error
    shapes = [[tuple(y.shape) for y in ys] for ys in (found, wanted)]  # type: ignore[misc]
    if shapes[0] != shapes[1]:
        raise ExportError(f"The {name} returns tensors of shapes {shapes[0]}, the compact model {shapes[1]}.")
    worst = 0.0
    for ours, theirs, best in zip(wanted, found, precise, strict=True):
        scale = float(best.abs().max()) or 1.0
        rounding = float((ours - best).abs().max()) / scale
        difference = float((theirs - ours).abs().max()) / scale
        if not difference <= _ROUNDING_FACTOR * rounding + _ROUNDING:
            raise ExportError(
                f"The {name} does not compute what the compact model computes: off by {difference:.1e} of the largest "
                f"output (rounding alone: {rounding:.1e}). It was not kept. Please report this with the model's name."
            )
        worst = max(worst, difference)
    return worst


def random_inputs(a: Any, samples: int, generator: torch.Generator) -> Any:
    """Samples of different mean and contrast in each channel, so that gates choose differently."""
    if not isinstance(a, Tensor) or not a.dim() or not a.is_floating_point():
        return a.expand(samples, *a.shape[1:]).clone() if isinstance(a, Tensor) and a.dim() else a
    x = torch.randn(samples, *a.shape[1:], generator=generator)
    style = (samples, *a.shape[1:2], *[1] * (a.dim() - 2))
    return (x * torch.rand(style, generator=generator) + torch.randn(style, generator=generator)).to(a.dtype)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor)]


def _double(a: Any) -> Any:
    return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch.onnx puts the cause last, under advice for its developers
    cause = next((line for line in lines if "DispatchError" in line), lines[0] if lines else "")
    text = f"{type(error).__name__}: {cause[:300]}"
    return text if text.endswith(".") else text + "."
