"""Losses that pull a gated model towards the dense one: its logits, its maps, its features."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..wrapping import is_gated, unwrap

__all__ = ["Distillation", "feature_loss", "logit_loss", "map_loss"]


def logit_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T²·KL(teacher ‖ student) of the softened class probabilities, averaged over the batch, a scalar.

    Args:
        student, teacher: Logits, (B, classes).
        temperature: T: larger looks more at the classes that are not the first. T² keeps the gradient's size.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    # In float32: under autocast logits have few bits, and KL is a difference of nearly equal numbers.
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def map_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean absolute difference of dense predictions (depth, say), over the teacher's mean size: a scalar.

    Relative to the teacher's size, so that one weight suits metres and normalised disparities.

    Args:
        student, teacher: Of one shape, (B, 1, H, W). mask: True where they count; default: everywhere.
    """
    student, teacher = student.float(), teacher.float()
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    if not teacher.numel():
        return student.sum()  # no place counts: a zero that has a gradient
    return (student - teacher).abs().mean() / teacher.abs().mean().clamp_min(1e-6)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of feature maps, each over the teacher's mean square, averaged over the maps: a scalar.

    Args:
        student, teacher: As many maps each, of equal shapes: (B, C, H, W) or tokens.
    """
    terms = [
        (s.float() - t.float()).square().mean() / t.float().square().mean().clamp_min(1e-12)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


_LOSSES = {"logits": logit_loss, "map": map_loss}


class Distillation:
    """Runs a student and its teacher on a batch, and says how far apart they are.

        distillation = Distillation(gated)  # a dense copy of the model, as it is now, teaches
        output, loss = distillation(gated, images)
        (loss + gated.penalty()).backward()

    Args:
        teacher: A model in eval mode, without gradients; of a gated model a dense copy is made. Its weights stay as
            they are.
        kind: "logits": (B, classes), `logit_loss`. "map": a dense prediction, `map_loss`.
        temperature: Of the logits.
        layers: Module paths, the same in teacher and student, whose outputs `feature_loss` compares as well. Layers
            that the gates narrow are a poor choice: suppressed channels are zero on purpose. Take the ends of stages.
        feature_weight: What the features' loss is multiplied by.

    Raises:
        ConfigError: An option out of its domain. ModelError: the teacher has no such layer.
    """

    def __init__(self, teacher: nn.Module, *, kind: str = "logits", temperature: float = 2.0,
                 layers: Sequence[str] = (), feature_weight: float = 1.0) -> None:  # fmt: skip
        if not isinstance(teacher, nn.Module):
            raise ConfigError(
                f"The `teacher` of Distillation() must be a torch.nn.Module. Got {type(teacher).__name__}."
            )
        if kind not in _LOSSES:
            raise ConfigError(f"The `kind` of Distillation() must be one of {', '.join(_LOSSES)}. Got {kind!r}.")
        for name, value in (("temperature", temperature), ("feature_weight", feature_weight)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
                raise ConfigError(f"The `{name}` of Distillation() must be a positive number. Got {value!r}.")
        if is_gated(teacher):
            teacher = unwrap(copy.deepcopy(teacher))
        self.teacher = teacher.eval()
        self.kind, self.temperature, self.feature_weight = kind, float(temperature), float(feature_weight)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        _modules(self.teacher, self.layers)

    def __call__(self, student: nn.Module, *inputs: Any, mask: Tensor | None = None) -> tuple[Any, Tensor]:
        """The student's output, and its loss against the teacher's on the same inputs.

        Args:
            student: Any model with the teacher's outputs; also in DistributedDataParallel.
            *inputs: What both are called with.
            mask: For maps: where they count.

        Raises:
            ModelError: The student lacks a layer, or their outputs differ in shape.
        """
        with torch.no_grad(), _watched(self.teacher, self.layers) as wanted:
            target = self.teacher(*inputs)
        with _watched(student, self.layers) as found:
            output = student(*inputs)
        if output.shape != target.shape:
            raise ModelError(
                f"The student's output has shape {tuple(output.shape)}, the teacher's {tuple(target.shape)}: give a "
                "teacher for the same task."
            )
        if self.kind == "logits":
            loss = logit_loss(output, target, self.temperature)
        else:
            loss = map_loss(output, target, mask)
        if self.layers:
            pairs = [(found[name], wanted[name]) for name in self.layers]
            loss = loss + self.feature_weight * feature_loss(*map(list, zip(*pairs, strict=True)))
        return output, loss


def _modules(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    model = getattr(model, "_orig_mod", model)  # torch.compile
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    modules = dict(model.named_modules())
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ModelError(f"{type(model).__name__} has no layer {missing[0]!r} to compare. Its children: "
                         f"{', '.join(name for name, _ in model.named_children())}.")  # fmt: skip
    return {name: modules[name] for name in layers}


@contextmanager
def _watched(model: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
    """While entered, remember what these layers put out."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, output)

    handles = [module.register_forward_hook(remember(name)) for name, module in _modules(model, layers).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
