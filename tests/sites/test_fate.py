"""What becomes of the memory of a value that is multiplied by a gain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedprune import find_sites
from gatedprune.sites.capture import capture
from gatedprune.sites.fate import fate


class Net(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x))).mean((2, 3))


CASES = {
    "nothing writes": (lambda x: x.sigmoid() * x, "kept"),
    "read": (lambda x: x, "kept"),
    "a rectifier beside": (F.relu, "kept"),
    "a rectifier": (F.relu_, "rectified"),
    "relu6": (lambda x: F.relu6(x, inplace=True), "rectified"),
    "another activation": (lambda x: F.silu(x, inplace=True), None),
    "a rectifier, not alone": (lambda x: x.mean((2, 3), keepdim=True) + F.relu_(x), None),
    "a rectifier of a view": (lambda x: F.relu_(x.flatten(2)).view(-1, 8, 16, 16), "rectified"),
    "half of a view": (lambda x: torch.cat([F.relu_(x.chunk(2, 1)[0]), x.chunk(2, 1)[1]], 1), None),
    "what dropout gives": (lambda x: F.silu(F.dropout(x, 0.5, False), inplace=True), None),
    "an addition": (lambda x: x.add_(1), None),
}


@pytest.mark.parametrize("case", CASES)
def test_of_one_value(case: str) -> None:
    between, wanted = CASES[case]
    captured = capture(Net(between), (torch.zeros(2, 3, 16, 16),))
    first = next(n for n in captured.graph.nodes if n.op == "call_function")
    assert "conv" in str(first.target)
    assert fate(first) == wanted


def test_of_what_leaves_the_model() -> None:
    captured = capture(nn.Conv2d(3, 8, 1), (torch.zeros(2, 3, 16, 16),))
    assert fate(next(n for n in captured.graph.nodes if n.op == "call_function")) is None


def test_places_of_a_site_know_it() -> None:
    for between, wanted in (CASES["a rectifier"], CASES["another activation"]):
        (site,) = find_sites(Net(between).eval(), torch.zeros(2, 3, 16, 16))
        assert [at.fate for at in site.gain_at] == [wanted]
