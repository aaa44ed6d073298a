"""Convolutions with fewer products: 3×3, and 7×7 of stride 2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

from gatedprune.engine import native

from .cases import CLOSE, FUZZ, check_convolution, convolutions, on_threads, ops, subsets

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@given(convolutions(winograd=3))
@FUZZ
def test_3x3(case: dict) -> None:
    check_convolution(case)


@given(convolutions(winograd=7))
@FUZZ
def test_7x7_of_stride_2(case: dict) -> None:
    check_convolution(case)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("channels", [(512, 32), (512, 512), (70, 40)])
def test_winograd_on_more_threads_than_panels(threads: int, channels: tuple[int, int]) -> None:
    """Of fewer rows, groups of panels are smaller, and transformed weights are kept where those of all are not."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, channels[0], 14, 20, generator=g), torch.randn(*channels[::-1], 3, 3, generator=g) / 30
    want = F.conv2d(x.double(), weight.double(), padding=1)
    with on_threads(threads):
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "", False, True)
        found = ops.conv2d(x, weight, *[None] * 5, *rest)[0]
    torch.testing.assert_close(found.double(), want, **CLOSE)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (31, 75), (7, 7)])
@pytest.mark.parametrize(("channels", "rows"), [(3, 32), (1, 1), (20, 70)])
def test_7x7_reads_only_what_is_active(channels: int, rows: int, size: tuple[int, int], threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, held = torch.randn(1, channels, *size, generator=g), torch.full((2 * rows, 2 * channels, 7, 7), torch.nan)
    index = subsets(1, 2 * channels, channels, g), subsets(1, 2 * rows, rows, g)
    weight = torch.randn(rows, channels, 7, 7, generator=g) / (49 * channels) ** 0.5
    held[index[1][0][:, None], index[0][0]] = weight
    want = F.conv2d(x.double(), weight.double(), stride=2, padding=3)
    with on_threads(threads):
        rest = ([2, 2], [3, 3], [1, 1], 1, True, "", True, True)
        found, mean = ops.conv2d(x, held, None, *index, None, None, *rest)
    torch.testing.assert_close(found.double(), want, **CLOSE)
    torch.testing.assert_close(mean.double(), want.abs().mean((2, 3)), **CLOSE)
