"""What the tests of the kernels have in common: how close, how many cases, and convolutions with all that follows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gatedprune.engine.narrow import ACTIVATIONS
from gatedprune.functional import indexed_conv2d, subsample

ops = torch.ops.gatedprune
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
FUZZ = settings(max_examples=60)


def subsets(samples: int, channels: int, count: int, generator: torch.Generator) -> Tensor:
    rows = [torch.randperm(channels, generator=generator)[:count].sort().values for _ in range(samples)]
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.long)


def rounded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """To numbers that bfloat16 holds: float32 holds their products, and such a kernel meets the same tolerance."""
    return tuple(t.bfloat16().float() for t in tensors)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@st.composite
def convolutions(draw: st.DrawFn, winograd: int = 0, bfloat16: bool = False) -> dict:
    """`winograd`: with fewer products, for a kernel of that size."""
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (5, 5), (1, 7), (3, 1), (2, 2), (4, 3)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    if winograd:
        kernel, dilation, stride = (winograd,) * 2, (1, 1), {3: (1, 1), 7: (2, 2)}[winograd]
    room = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return {
        "seed": draw(st.integers(0, 10_000)), "batch": draw(st.integers(1, 3)), "threads": draw(st.integers(1, 2)),
        "channels": draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
        "ratio": draw(st.tuples(st.floats(0, 1), st.floats(0, 1))),
        "given": draw(st.tuples(*[st.booleans()] * 5)),
        "kernel": kernel, "dilation": dilation, "stride": stride, "winograd": winograd > 0, "bfloat16": bfloat16,
        "padding": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "size": (draw(st.integers(room[0], 40)), draw(st.integers(room[1], 70))),
        "activation": draw(st.sampled_from(["", *ACTIVATIONS])),
        "layout": draw(st.sampled_from(["plain", "channels_last", "strided"])),
    }  # fmt: skip


def check_convolution(case: dict) -> None:
    g = torch.Generator().manual_seed(case["seed"])
    batch, (cin, cout) = case["batch"], case["channels"]
    some_in, some_out, with_bias, with_gain, with_residual = case["given"]
    kin = max(1, int(cin * case["ratio"][0])) if some_in else cin
    kout = max(1, int(cout * case["ratio"][1])) if some_out else cout
    in_index = subsets(batch, cin, kin, g) if some_in else None
    out_index = subsets(batch, cout, kout, g) if some_out else None
    x = torch.randn(batch, kin, *case["size"], generator=g)
    if case["layout"] == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif case["layout"] == "strided":
        x = torch.stack([x, -x], -1)[..., 0]
    weight = torch.randn(cout, cin, *case["kernel"], generator=g) / (cin * math.prod(case["kernel"]) / 3) ** 0.5
    if case["bfloat16"]:
        x, weight = rounded(x, weight)
    bias = torch.randn(cout, generator=g) if with_bias else None
    per_sample = some_in or some_out
    gain = torch.rand(batch if per_sample else 1, kout, generator=g) if with_gain else None
    options = (case["stride"], case["padding"], case["dilation"])
    wide = None if gain is None else gain.expand(batch, -1)
    want = indexed_conv2d(
        x.double(), weight.double(), None if bias is None else bias.double(), in_index, out_index,
        None if wide is None else wide.double(), *options,
    )  # fmt: skip
    residual = torch.randn(want.shape, generator=g) if with_residual else None
    want = want if residual is None else want + residual
    want = ACTIVATIONS[case["activation"]](want) if case["activation"] else want
    with on_threads(case["threads"]):
        weight = weight.bfloat16() if case["bfloat16"] else weight
        rest = (*options, 1, True, case["activation"], True, case["winograd"])
        found, mean = ops.conv2d(x, weight, bias, in_index, out_index, gain, residual, *rest)
        torch.testing.assert_close(found.double(), want, **CLOSE)
        torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)
        if residual is not None:
            mean = ops.conv2d_into(x, weight, bias, in_index, out_index, gain, residual, *rest)
            assert torch.equal(residual, found)
            torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)
