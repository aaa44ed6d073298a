"""Learning rates of predictors: how far a step moves a gain must not depend on the units in which its gate sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay

from ..errors import ConfigError, DataError
from ..gates import Gate
from ..sites import evaluating
from .contribution import Contributions
from .passes import check_gated, model_arguments

__all__ = ["REACH", "parameter_groups", "predictor_rates"]

REACH = 1.0  # a gain moves as far as a batch norm's scale


def predictor_rates(gated: Any, batches: Iterable[Any], *, reach: float = REACH,
                    inputs: Callable[[Any], Any] | None = None) -> dict[str, float]:  # fmt: skip
    """The learning rate that each predictor's weights φ should have, as a share of the layers': reach / E ‖s(x)‖².

    One step of φ moves the gain for an input x by the learning rate times s(x)·s(x'), summed over the batch's x'; one
    of a batch norm's scale, next to which the gain is multiplied, by the learning rate times 1. What gates see are
    means of absolute values, all of one sign, and ‖s‖² is a few for images of unit variance, but some thousands in
    networks with linear bottlenecks: with the layers' learning rate, gains there are thrown about from the first step.
    Where φ is a product of two matrices, the larger of what the two see counts for both.

    Args:
        gated: A gated model; looked at in eval mode, left as it is.
        batches, inputs: A hundred samples or so, as for `calibrate`; gone through once.
        reach: How many times a batch norm's step a gain's step is. 0: predictors stay as they are.

    Returns:
        Site name → the factor, for `parameter_groups`. 1 where a gate sees nothing but zeros.

    Raises:
        ConfigError: ``reach`` is negative or not finite. ModelError: the model is not gated. DataError: no batches, or
            activations that are not finite.

    Source: gatedprune's own; the step of normalised least mean squares (Widrow and Stearns, Adaptive Signal Processing,
    1985), with the mean of ‖s‖² in place of each input's.
    """
    if isinstance(reach, bool) or not isinstance(reach, Real) or not 0 <= float(reach) < math.inf:
        raise ConfigError(f"`reach` of predictor_rates() must be a number of at least 0. Got {reach!r}.")
    check_gated(gated, "predictor_rates()")
    gates: dict[str, Gate] = gated.gates
    sums: dict[str, Any] = dict.fromkeys(gates, 0.0)  # of squares of what each matrix of the predictor sees
    samples = 0
    try:
        with torch.no_grad(), evaluating(gated), Contributions(gated) as record:
            record.reading = False
            for args in model_arguments(gated, batches, inputs, "predictor_rates()"):
                gated(*args)
                for name, gate in gates.items():
                    s = record.seen[name]
                    values = [s] if gate.reduce is None else [s, F.linear(s, gate.reduce.to(s))]
                    sums[name] += torch.stack([value.square().sum() for value in values])
                samples += len(s)
    finally:
        for gate in gates.values():
            gate.clear()
    if not samples:
        raise DataError("The `batches` of predictor_rates() are empty: give it a hundred samples or so.")
    largest = {name: float(total.max()) for name, total in sums.items()}  # NaN where there is one
    bad = [name for name, total in largest.items() if not math.isfinite(total)]
    if bad:
        raise DataError(f"What the gate of the site {bad[0]} sees is not finite: look for NaN in images and weights.")
    return {name: float(reach) * samples / total if total > 0 else 1.0 for name, total in largest.items()}


def parameter_groups(
    gated: Any, rates: Mapping[str, float], lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """A gated model's parameters for an optimiser: each predictor's weights in a group with a learning rate of its own.

        rates = predictor_rates(gated, batches)
        optimizer = torch.optim.SGD(parameter_groups(gated, rates, lr=0.01), lr=0.01)

    Learning rate schedulers keep the groups' proportions.

    Args:
        gated: A gated model. rates: From `predictor_rates`; a site that is missing has the layers' learning rate.
        lr: The layers' learning rate. weight_decay: Of what timm decays: neither biases nor norms.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``: the layers' first, then one for each gate. Parameters that
        need no gradient are left out.

    Raises:
        ModelError: The model is not gated. ConfigError: ``rates`` names a site that has no gate.
    """
    check_gated(gated, "parameter_groups()")
    gates: dict[str, Gate] = gated.gates
    strange = [name for name in rates if name not in gates]
    if strange:
        raise ConfigError(f"`rates` of parameter_groups() names {strange[0]!r}, which is no gated site.")
    owner = {id(p): name for name, gate in gates.items() for p in (gate.weight, gate.reduce) if p is not None}
    kept: set[str] = getattr(gated, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_weight_decay(gated, weight_decay, no_weight_decay_list=kept)
    predictors: dict[str, dict[str, Any]] = {}
    for group in groups:
        group["lr"] = lr
        for weight in (p for p in group["params"] if id(p) in owner):
            name = owner[id(weight)]
            own = predictors.setdefault(name, {**group, "params": [], "lr": lr * rates.get(name, 1.0)})
            own["params"].append(weight)
        group["params"] = [p for p in group["params"] if id(p) not in owner]
    return [group for group in groups if group["params"]] + [predictors[name] for name in gates if name in predictors]
