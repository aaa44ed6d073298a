"""The step's cost: memory by hand, and the command."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from gatedprune.training.step_cost import main, step_cost


class Small(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16) if norm else nn.Identity()
        self.last = nn.Conv2d(16, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()).mean((2, 3))


@pytest.mark.parametrize("norm", [True, False])
def test_memory_is_counted_once_each(norm: bool) -> None:
    model = Small(norm)
    found = step_cost(model, torch.randn(4, 3, 16, 16), rounds=3, warmup=1)
    maps = 4 * 16 * 16 * 4  # bytes of one channel
    # The image, the norm's input, the rectifier's output; the gated model also what the gain is multiplied on, but that
    # follows from a batch norm's input.
    assert found.dense_kept == pytest.approx((3 + 16 * norm + 16) * maps, rel=0.02)
    assert found.gated_kept - found.dense_kept == pytest.approx(0 if norm else 16 * maps, abs=1.6 * maps)
    parameters, buffers = 3 * 16 * 9 + 2 * 16 * norm + 16 * 4, (2 * 16 * 4 + 8) * norm
    assert found.dense_state == 3 * 4 * parameters + buffers
    gate = 16 * 3 + 16 + 1
    assert found.gated_state - found.dense_state == 3 * 4 * gate + 16 * 4
    assert 1 < found.memory < (1.2 if norm else 2) and found.dense_ms > 0 and found.gated_ms > 0 and found.time > 0
    # Two convolutions, rectifier, mean and the loss's two, each with its backward; one to begin that with. A norm has
    # both, and counts its batches.
    assert found.dense_operators == 2 * 6 + 1 + 3 * norm
    assert 20 < found.gated_operators - found.dense_operators < 60
    # Forwards and backwards: the image with what the first convolution writes, the norm, the rectifier, the last
    # convolution, the mean. The gated model passes over 16 channels to multiply by the gain and its gradient, and for
    # the sums that the gain gets.
    dense = (3 + 16) * 2 + 16 * norm * (2 + 3) + 16 * (2 + 3) + (4 + 16) + (4 + 16 * 2) + 4 * 2
    assert found.dense_traffic == pytest.approx(dense * maps, rel=0.03)
    gated = dense + 16 * (2 + 2 + 2 if norm else 2 + 2 + 4) + 3 * 3  # and s(x): no gradient for an image
    assert found.gated_traffic == pytest.approx(gated * maps, rel=0.03)
    assert all(p.grad is None for p in model.parameters()) and not hasattr(model, "gatedprune")


@pytest.mark.parametrize("more", [(), ("--precision", "bf16", "--channels-last"),
                                  pytest.param(("--compile",), marks=pytest.mark.slow)])  # fmt: skip
def test_the_command(more: tuple[str, ...]) -> None:
    options = ["test_resnet", "--size", "32", "--batch", "2", "--rounds", "1", *more]
    result = CliRunner().invoke(main, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "step: dense" in result.output and "kept activations alone" in result.output
    assert "operators: dense" in result.output and "they read and write" in result.output
    assert "compiled" in result.output if "--compile" in more else "compiled" not in result.output
