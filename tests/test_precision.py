"""Inputs to judge rounding on."""

from __future__ import annotations

import torch

from gatedprune.precision import MOST_INPUTS, in_float64, nearby


def test_only_floating_point_goes_to_float64() -> None:
    image, index = torch.rand(1, 3), torch.tensor([1])
    found = in_float64((image, index, "text"))
    assert found[0].dtype is torch.float64 and torch.equal(found[0].float(), image)
    assert found[1] is index and found[2] == "text"


def test_nearby_inputs_start_with_the_very_inputs_and_are_alike_at_every_call() -> None:
    image, flags = torch.rand(2, 3, 4, 4), torch.tensor([True, False])
    found, again = list(nearby((image, flags))), list(nearby((image, flags)))
    assert len(found) == MOST_INPUTS
    assert found[0][0] is image
    for (one, kept), (other, _) in zip(found[1:], again[1:], strict=True):
        assert kept is flags
        assert torch.equal(one, other)
        assert 0.01 < float(((one - image) / image).abs().mean()) < 0.2
    assert not torch.equal(found[1][0], found[2][0])
