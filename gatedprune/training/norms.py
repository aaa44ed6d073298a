"""Batch norms' statistics taken anew: what a statically pruned model needs before it can be judged untrained."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..sites import evaluating
from ..wrapping import is_gated
from .matching import ChannelSums, Rows, batch_norms
from .passes import Inputs, model_arguments

__all__ = ["reestimate_norms"]


def reestimate_norms(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None = None) -> tuple[str, ...]:
    """Take the statistics of every batch norm anew, from samples: no labels, no training, in eval mode.

    Where channels were removed, what a norm reads has another mean and variance than those it was trained with. Here
    each gets those of its input over the samples, in one pass, in which a norm already uses what it has seen so far, so
    that those behind it see what they will see later. It is for static pruning what `calibrate` does to a gated model's
    norms. Weights, modes and ``num_batches_tracked`` stay as they are.

    Args:
        model: Any model without gates, such as ``prune_static(…).model``; changed in place.
        batches, inputs: As for `calibrate`; gone through once. Give batches of a few dozen.

    Returns:
        Paths of the norms that ran, all of which have new statistics; those without running statistics are left alone.

    Raises:
        ModelError: The model is gated. DataError: no batches, or activations that are not finite. Statistics are then
            as they were.

    Source: re-estimation after training of slimmable networks (Yu and Huang, ICCV 2019, arXiv 1903.05134:
        post-statistics of batch normalisation).
    """
    if is_gated(model):
        raise ModelError(
            "reestimate_norms() is for models without gates; calibrate() matches the norms of a gated one."
        )
    norms: dict[str, Any] = {**batch_norms(model)}
    before = {path: (norm.running_mean.clone(), norm.running_var.clone()) for path, norm in norms.items()}
    sums = {path: ChannelSums() for path in norms}
    samples = False
    try:
        with torch.no_grad(), evaluating(model), ExitStack() as stack:
            for path, norm in norms.items():
                handle = norm.register_forward_pre_hook(_hook(sums[path]), with_kwargs=True)
                stack.callback(handle.remove)
            for args in model_arguments(model, batches, inputs, "reestimate_norms()"):
                samples = True
                model(*args)
        if not samples:
            raise DataError("The `batches` of reestimate_norms() are empty: give it a few hundred samples.")
        for path, norm in norms.items():
            if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
                raise DataError(f"What the batch norm {path} reads is not finite: check the samples and the weights.")
    except BaseException:
        for path, (mean, var) in before.items():
            _set(norms[path], mean, var)
        raise
    return tuple(path for path in norms if not sums[path].empty)


def _hook(sums: ChannelSums) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        sums.add(Rows.of(args[0] if args else next(iter(kwargs.values()))))
        _set(module, *sums.moments())

    return hook


def _set(norm: Any, mean: Tensor, var: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
