"""What is active: a gate's choice on narrow inputs, and the channels and gains that follow, with poisoned memory."""

from __future__ import annotations

import pytest
import torch

from gatedprune.engine import Selector
from gatedprune.engine.narrow import Widen
from gatedprune.engine.selection import ChannelGain, ChannelIndex
from gatedprune.functional import channel_gain
from gatedprune.gates import Gate

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_channel_index_merges_sites_and_fixed_channels() -> None:
    # Channels 0–3: two for each unit of site a; 4 and 7: in no site; 5 and 6: the units of site b.
    module = ChannelIndex([torch.tensor([[0, 1], [2, 3]]), torch.tensor([[6], [5]])], torch.tensor([4, 7]), 8)
    found = module(torch.tensor([[0], [1]]), torch.tensor([[1], [0]]))
    assert found.tolist() == [[0, 1, 4, 5, 7], [2, 3, 4, 6, 7]]


def test_channel_gain_multiplies_sites() -> None:
    units = [torch.tensor([0, 1, -1, 1]), torch.tensor([-1, 0, 0, -1])]
    active, gain = torch.tensor([[1]]), torch.tensor([[3.0]])
    other, more = torch.tensor([[0]]), torch.tensor([[5.0]])
    module = ChannelGain(units, [2, 1])
    assert module(None, active, gain, other, more).tolist() == [[0, 15, 5, 3]]
    assert module(torch.tensor([[1, 3]]), active, gain, other, more).tolist() == [[15, 3]]
    assert torch.equal(ChannelGain(units[:1], [2])(None, active, gain), channel_gain(gain, active, units[0], 2))


def test_selector_counts_missing_channels_as_zero() -> None:
    gate = Gate(5, 6, 2)
    with torch.no_grad():
        gate.weight.normal_()
    x, index = torch.randn(3, 3, 4, 4), torch.stack([torch.randperm(6)[:3].sort().values for _ in range(3)])
    active, gain = Selector(gate)(x, index)
    gate(Widen(1, 6)(x, index))
    assert torch.equal(active, gate.last_active)
    torch.testing.assert_close(gain, gate.last_gain)
