"""The last pixels of a map, which are computed along the weights' rows where they would leave a vector nearly empty."""

from __future__ import annotations

import pytest
import torch

from gatedprune.engine import native
from gatedprune.engine.narrow import ACTIVATIONS
from gatedprune.functional import subsample

from .cases import CLOSE, on_threads, ops, rounded, subsets

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(size: tuple[int, int], channels: tuple[int, int], active: tuple[int, int], kernel: int = 1, threads: int = 1,
          activation: str = "relu", bfloat16: bool = False, winograd: bool = False) -> None:  # fmt: skip
    """Two samples, with all that follows the sums. What is suppressed is NaN, so that it shows where it is read."""
    g = torch.manual_seed(0)
    (cin, cout), (kin, kout) = channels, active
    in_index = subsets(2, cin, kin, g) if kin < cin else None
    out_index = subsets(2, cout, kout, g) if kout < cout else None
    x = torch.randn(2, kin, *size)
    weight, bias = torch.randn(cout, cin, kernel, kernel) / (cin * kernel**2) ** 0.5, torch.randn(cout)
    gain = torch.rand(2, kout) if in_index is not None or out_index is not None else None
    residual = torch.randn(2, kout, *size)
    if bfloat16:
        x, weight = rounded(x, weight)
    want, means = [], []
    for i in range(2):
        rows = slice(None) if out_index is None else out_index[i]
        w = weight[rows] if in_index is None else weight[rows][:, in_index[i]]
        y = torch.nn.functional.conv2d(x[i].double()[None], w.double(), bias[rows].double(), padding=kernel // 2)[0]
        y = (y if gain is None else y * gain[i, :, None, None]) + residual[i]
        want.append(ACTIVATIONS[activation](y) if activation else y)
        means.append(subsample(want[-1][None])[0])
    with on_threads(threads):
        for i in range(2):  # one by one, since each suppresses others
            held = weight.clone()
            if in_index is not None:
                held[:, [c for c in range(cin) if c not in set(in_index[i].tolist())]] = torch.nan
            if out_index is not None:
                held[[c for c in range(cout) if c not in set(out_index[i].tolist())]] = torch.nan
            held = held.bfloat16() if bfloat16 else held
            one = [None if t is None else t[i : i + 1] for t in (in_index, out_index, gain, residual)]
            found, mean = ops.conv2d(x[i : i + 1], held, bias, *one, [1, 1], [kernel // 2] * 2, [1, 1], 1, True,
                                     activation, True, winograd)  # fmt: skip
            torch.testing.assert_close(found[0].double(), want[i], **CLOSE)
            torch.testing.assert_close(mean[0].double(), means[i], **CLOSE)


# One to six pixels beyond a vector of 16, 8 or 4, or nothing but those; and as many as fill three vectors and 13 of 16.
@pytest.mark.parametrize(
    "size", [(1, 17), (6, 3), (1, 19), (4, 5), (3, 7), (2, 11), (1, 1), (1, 2), (5, 1), (7, 7), (61, 1)]
)
@pytest.mark.parametrize("active", [(70, 40), (96, 40), (70, 61), (96, 61)])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_number_of_them(size: tuple[int, int], active: tuple[int, int], bfloat16: bool) -> None:
    check(size, (96, 61), active, bfloat16=bfloat16)


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_what_follows_the_sums(activation: str) -> None:
    check((7, 7), (96, 61), (70, 40), activation=activation)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [((520, 90), (261, 45)), ((300, 700), (300, 350)), ((300, 700), (180, 700))])
def test_several_blocks(channels: tuple[tuple[int, int], tuple[int, int]], threads: int, kernel: int) -> None:
    check((7, 7), *channels, kernel=kernel, threads=threads)


@pytest.mark.parametrize("size", [(14, 14), (13, 14), (14, 13), (13, 13), (2, 2), (2, 34), (2, 35), (9, 14), (11, 12)])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("channels", "active"), [((96, 61), (70, 40)), ((150, 40), (150, 40)), ((300, 61), (140, 61))])
def test_the_last_tiles(size: tuple[int, int], activation: str, channels: tuple, active: tuple) -> None:
    """Of F(2×2, 3×3): 49, 18, 35 and 36 tiles are vectors of 16 and one to four more."""
    check(size, channels, active, 3, activation=activation, winograd=True)


@pytest.mark.parametrize("tokens", [1, 17, 50, 197])
@pytest.mark.parametrize("columns", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_tokens(tokens: int, columns: tuple[bool, bool], narrow: bool, bfloat16: bool) -> None:
    g = torch.manual_seed(0)
    x, weight, bias = torch.randn(1, tokens, 90), torch.randn(70, 130) / 10, torch.randn(70)
    index = subsets(1, 130, 90, g) if narrow else None
    weight = weight if narrow else weight[:, :90].contiguous()
    if bfloat16:
        x, weight = rounded(x, weight)
    used = weight if index is None else weight[:, index[0]]
    want = torch.nn.functional.linear(x.double(), used.double(), bias.double()).relu()
    given = x.mT.contiguous() if columns[0] else x
    held = weight.bfloat16() if bfloat16 else weight
    found = ops.linear(given, held, bias, index, None, None, None, "relu", *columns)
    torch.testing.assert_close((found.mT if columns[1] else found).double(), want, **CLOSE)


def test_a_channel_that_is_named_twice() -> None:
    torch.manual_seed(0)
    index = torch.randint(0, 100, (1, 80)).sort().values
    x, weight = torch.randn(1, 80, 7, 7), torch.randn(32, 100, 1, 1) / 10
    want = torch.nn.functional.conv2d(x.double(), weight[:, index[0]].double())
    found = ops.conv2d(x, weight, None, index, *[None] * 3, [1, 1], [0, 0], [1, 1], 1, True, "", False)[0]
    torch.testing.assert_close(found.double(), want, **CLOSE)
