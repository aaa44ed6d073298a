"""Checks that a gated model trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .case import Case

__all__ = ["check_gradients", "check_training_steps"]

STEPS = 20


def _loss(model: nn.Module, args: tuple, seed: int = 0) -> Tensor:
    """How far every output is from a fixed random target; smooth L1, whose slope is bounded."""
    generator = torch.Generator().manual_seed(seed)
    total = None
    for value in tree_flatten(model(*args))[0]:
        if isinstance(value, Tensor) and value.is_floating_point():
            term = F.smooth_l1_loss(value, torch.randn(value.shape, generator=generator).to(value))
            total = term if total is None else total + term
    assert total is not None
    return total


def _with_gradient(model: nn.Module, args: tuple) -> set[str]:
    model.zero_grad(set_to_none=True)
    _loss(model, args).backward()
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def check_gradients(case: Case) -> str:
    """The winners' rows of every gate get a gradient, and no other row; backbone parameters keep theirs."""
    args = case.inputs(torch.float64)
    before = _with_gradient(case.dense().double(), args)
    gated = case.gated(torch.float64)
    after = _with_gradient(gated, args)
    lost = sorted(before - after)
    assert not lost, f"{case.name}: {len(lost)} backbone parameters get no gradient any more: {', '.join(lost[:5])}"
    for name, gate in gated.gates.items():
        where = f"{case.name}, site {name}"
        if not gate.boost:
            continue
        assert gate.last_active is not None
        winners = torch.zeros(gate.channels, dtype=torch.bool).index_fill_(0, gate.last_active.unique().cpu(), True)
        for kind, parameter in (("φ", gate.weight), ("ρ", gate.bias)):
            grad = parameter.grad
            assert grad is not None, f"{where}: {kind} gets no gradient"
            assert bool(grad.isfinite().all()), f"{where}: the gradient of {kind} is not finite"
            touched = (grad.reshape(gate.channels, -1) != 0).any(1).cpu()
            assert not bool(touched[~winners].any()), f"{where}: {kind} of a channel that never won gets a gradient"
            # A winner may be dead (a relu behind it that is off everywhere), but hardly half of them.
            share = float(touched[winners].double().mean())
            assert share >= 0.5, f"{where}: only {share:.0%} of the winners' rows of {kind} get a gradient"
    if not any(g.boost for g in gated.gates.values()):
        return "boost=False: gates get no gradient"
    return ""


def check_training_steps(case: Case) -> str:
    """Loss and parameters stay finite over twenty steps of SGD in training mode, FBS's penalty included."""
    gated = case.untouched()
    gated.set_ratio(case.ratio)
    gated.train()
    optimiser = torch.optim.SGD(gated.parameters(), lr=1e-2, momentum=0.9)
    args, losses = case.inputs(), []
    for step in range(STEPS):
        optimiser.zero_grad()
        loss = _loss(gated, args) + gated.penalty()
        losses.append(float(loss.detach()))
        assert bool(loss.isfinite()), (
            f"{case.name}: the loss is {losses[-1]} at step {step}; the last were {losses[-4:-1]}"
        )
        loss.backward()
        optimiser.step()
    for name, parameter in gated.named_parameters():
        assert bool(parameter.isfinite().all()), f"{case.name}: {name} is no longer finite after {STEPS} steps"
    assert losses[-1] != losses[0], f"{case.name}: {STEPS} steps did not change the loss"
    return f"loss {losses[0]:.3f} → {losses[-1]:.3f}"
