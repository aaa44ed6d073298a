"""Checks that a gated model trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..functional import active_mask
from ..sites import Attach, Site
from ..wrapping import GatedModel
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
    """The gate of every winner that the loss can feel gets a gradient, and no loser's; backbone parameters keep theirs.

    Whether the loss feels a winner is seen where its gain is multiplied: behind dead activations it does not.
    """
    args = case.inputs(torch.float64)
    before = _with_gradient(case.dense().double(), args)
    gated = case.gated(torch.float64)
    felt = {site.name: _Felt(gated, site) for site in gated.gated_sites}
    after = _with_gradient(gated, args)
    lost = sorted(before - after)
    assert not lost, f"{case.name}: {len(lost)} backbone parameters get no gradient any more: {', '.join(lost[:5])}"
    winners_felt = winners_all = 0
    for name, gate in gated.gates.items():
        where = f"{case.name}, site {name}"
        if not gate.boost:
            continue
        assert gate.last_active is not None
        winners = active_mask(gate.last_active, gate.channels).any(0).cpu()
        alive = winners & felt[name].units()
        winners_felt, winners_all = winners_felt + int(alive.sum()), winners_all + int(winners.sum())
        for kind, parameter in (("φ", gate.weight), ("ρ", gate.bias)):
            grad = parameter.grad
            if grad is None:
                assert not bool(alive.any()), f"{where}: {kind} gets no gradient"
                continue
            assert bool(grad.isfinite().all()), f"{where}: the gradient of {kind} is not finite"
            touched = (grad.reshape(gate.channels, -1) != 0).any(1).cpu()
            assert not bool(touched[~winners].any()), f"{where}: {kind} of a channel that never won gets a gradient"
            if bool(alive.any()):
                share = float(touched[alive].double().mean())
                assert share == 1, (
                    f"{where}: only {share:.0%} of the rows of {kind} of winners that the loss feels get a gradient"
                )
    if not any(g.boost for g in gated.gates.values()):
        return "boost=False: gates get no gradient"
    assert winners_felt, f"{case.name}: the loss feels no winner of any site, so that nothing can be said"
    return f"the loss feels {winners_felt / winners_all:.0%} of the winners"


class _Felt:
    """Which channels of a site the loss depends on, seen in the tensors that its gain was multiplied on."""

    def __init__(self, gated: GatedModel, site: Site) -> None:
        self.site, self.seen = site, torch.zeros(site.channels + 1, dtype=torch.bool)
        for at in site.gain_at:
            module = gated.get_submodule(at.path)
            if at.side == "output":
                module.register_forward_hook(lambda module, args, y, at=at: self._watch(y, at))
            else:
                module.register_forward_pre_hook(
                    lambda module, args, at=at: (self._watch(args[0], at), *args[1:]) if args else None
                )

    def _watch(self, x: Tensor, at: Attach) -> Tensor:
        held = x.detach()

        def slope(gradient: Tensor) -> None:
            moves = (gradient * held != 0).movedim(at.channel_dim, 0).flatten(1).any(1).cpu()
            units = torch.arange(self.site.channels) if at.units is None else at.units.cpu()
            self.seen[units[moves]] = True

        if x.requires_grad:
            x.register_hook(slope)
        return x.clone()  # an activation behind it may work in place, and the hook and `held` are to stay as they are

    def units(self) -> Tensor:
        """(C,), True where a gain matters."""
        return self.seen[:-1]


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
