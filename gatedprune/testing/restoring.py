"""Checks that gates come off again, and that checkpoints fit with and without them."""

from __future__ import annotations

import torch
from torch import nn

from ..wrapping import is_gated, unwrap
from .case import Case, outputs

__all__ = ["check_state_dicts", "check_unwrap"]


def check_unwrap(case: Case) -> None:
    """After `unwrap` the model is what it was before `wrap`: class, attributes, hooks, tensors, outputs."""
    before, gated = case.original()
    reference = outputs(case.dense(), case.inputs())
    outputs(gated, case.inputs())  # a forward pass must leave nothing behind either
    model = unwrap(gated)
    assert model is gated, f"{case.name}: unwrap() returned another object"
    assert not is_gated(model), f"{case.name}: still gated after unwrap()"
    wrong = before.differences(model)
    assert not wrong, f"{case.name}: after unwrap(), " + "; ".join(wrong[:5])
    for a, b in zip(outputs(model, case.inputs()), reference, strict=True):
        assert torch.equal(a, b), f"{case.name}: the unwrapped model computes something else"


def check_state_dicts(case: Case) -> None:
    """Strictly: the backbone's state dict loads into a gated model and back, a gated one into its like."""
    donor = case.another()
    _loads_a_backbone(case, donor)
    _gives_a_backbone(case)
    _loads_its_like(case, donor)


def _loads_a_backbone(case: Case, donor: nn.Module) -> None:
    gated, args = case.untouched(), case.inputs()
    result = gated.load_state_dict(donor.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys, (
        f"{case.name}: a backbone checkpoint loads, but reports {result}"
    )
    for a, b in zip(outputs(gated, args), outputs(donor, args), strict=True):
        assert torch.equal(a, b), (
            f"{case.name}: at ratio 0, the gated model does not compute what the loaded backbone does"
        )


def _gives_a_backbone(case: Case) -> None:
    wanted, args = list(case.dense().state_dict()), case.inputs()
    backbone = case.gated().backbone_state_dict()
    assert list(backbone) == wanted, f"{case.name}: backbone keys differ: {sorted(backbone.keys() ^ set(wanted))[:5]}"
    fresh = case.another()
    fresh.load_state_dict(backbone, strict=True)
    for a, b in zip(outputs(fresh, args), outputs(case.dense(), args), strict=True):
        assert torch.equal(a, b), (
            f"{case.name}: the dense model that loaded the backbone's part computes something else"
        )


def _loads_its_like(case: Case, donor: nn.Module) -> None:
    source, other, args = case.gated(), case.untouched(), case.inputs()
    other.set_ratio(case.ratio)
    other.load_state_dict(donor.state_dict(), strict=True)  # so that what is loaded next has something to replace
    other.load_state_dict(source.state_dict(), strict=True)
    for a, b in zip(outputs(other, args), outputs(source, args), strict=True):
        assert torch.equal(a, b), f"{case.name}: the gated model that loaded a gated checkpoint computes something else"
    for name, gate in other.gates.items():
        for key, tensor in source.gates[name].state_dict().items():
            assert torch.equal(gate.state_dict()[key], tensor), (
                f"{case.name}, site {name}: {key} of the gate was not loaded"
            )
