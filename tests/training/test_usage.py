"""What a gated model uses most is counted, channel by channel."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.engine import freeze
from gatedprune.errors import DataError, ModelError
from gatedprune.training import most_used


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_the_most_frequent_channels_and_their_gain() -> None:
    gated = gatedprune.wrap(Small(), 0.75, example_inputs=torch.zeros(1, 3, 4, 4)).eval()
    (gate,) = gated.gates.values()
    with torch.no_grad():  # the first colour wakes channel 5, the second 3, the third 7; 1 is always there
        gate.weight.zero_()
        gate.bias.zero_()
        gate.start.zero_()
        for colour, channel in enumerate((5, 3, 7)):
            gate.weight[channel, colour] = 1.0
        gate.bias[1] = 0.5
    x = torch.zeros(6, 3, 4, 4)
    for i, colour in enumerate((0, 0, 0, 1, 1, 2)):
        x[i, colour] = 1.0 + i
    active, gains = most_used(gated, [(x[:4], "labels"), x[4:]])
    (name,) = active
    assert active[name].tolist() == [1, 5]
    # 1 + 1·(g − 0): of channel 1 always 1.5; of channel 5 in three images 2, 3 and 4.
    torch.testing.assert_close(gains[name], torch.tensor([1.5, 3.0], dtype=torch.float64))
    assert gate.last_active is None


def test_frozen_with_these_gains_it_computes_the_masked_model() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        args = {"img_size": 64} if "vit" in name else {}
        gated = gatedprune.wrap(timm.create_model(name, **args).eval().double(), 0.5, example_inputs=x)
        with torch.no_grad():
            for gate in gated.gates.values():
                gate.weight.add_(0.1 * torch.randn_like(gate.weight))
        active, gains = most_used(gated, [x])
        assert any(not torch.equal(g, torch.ones_like(g)) for g in gains.values())
        with torch.no_grad():
            torch.testing.assert_close(freeze(gated, active, (x,), gains)(x), gated(x), rtol=1e-9, atol=1e-9)


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match=r"most_used\(\) takes a model that wrap"):
        most_used(Small(), [])
    gated = gatedprune.wrap(Small(), 0.5, example_inputs=torch.zeros(1, 3, 4, 4))
    with pytest.raises(DataError, match=r"`batches` of most_used\(\) are empty"):
        most_used(gated, [])
