"""The C++ operators against the readable reference, for every instruction set that this CPU has."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatedprune.engine import native
from gatedprune.engine.narrow import ACTIVATIONS
from gatedprune.engine.selection import ChannelGain, ChannelIndex
from gatedprune.functional import indexed_conv2d, subsample
from gatedprune.gates import Gate

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

ops = torch.ops.gatedprune
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
FUZZ = settings(max_examples=60, deadline=None)


# Fresh memory is NaN, so that what a kernel forgets to write, or reads too much of, shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def subsets(samples: int, channels: int, count: int, generator: torch.Generator) -> Tensor:
    rows = [torch.randperm(channels, generator=generator)[:count].sort().values for _ in range(samples)]
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.long)


def rounded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """To numbers that bfloat16 holds: float32 holds their products, and such a kernel meets the same tolerance."""
    return tuple(t.bfloat16().float() for t in tensors)


@st.composite
def convolutions(draw: st.DrawFn, winograd: bool = False, bfloat16: bool = False) -> dict:
    kernel = draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (5, 5), (1, 7), (3, 1), (2, 2), (4, 3)]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    if winograd:
        kernel, dilation, stride = (3, 3), (1, 1), (1, 1)
    room = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    return {
        "seed": draw(st.integers(0, 10_000)), "batch": draw(st.integers(1, 3)), "threads": draw(st.integers(1, 2)),
        "channels": draw(st.tuples(st.integers(1, 80), st.integers(1, 80))),
        "ratio": draw(st.tuples(st.floats(0, 1), st.floats(0, 1))),
        "given": draw(st.tuples(*[st.booleans()] * 5)),
        "kernel": kernel, "dilation": dilation, "stride": stride, "winograd": winograd, "bfloat16": bfloat16,
        "padding": draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        "size": (draw(st.integers(room[0], 40)), draw(st.integers(room[1], 70))),
        "activation": draw(st.sampled_from(["", *ACTIVATIONS])),
        "layout": draw(st.sampled_from(["plain", "channels_last", "strided"])),
    }  # fmt: skip


@given(convolutions())
@FUZZ
def test_convolution(case: dict) -> None:
    check_convolution(case)


@given(convolutions(winograd=True))
@FUZZ
def test_winograd(case: dict) -> None:
    check_convolution(case)


@given(convolutions(bfloat16=True))
@FUZZ
def test_bfloat16_weights(case: dict) -> None:
    check_convolution(case)


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
    weight = torch.randn(cout, cin, *case["kernel"], generator=g) / (cin * 3) ** 0.5
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
    before = torch.get_num_threads()
    torch.set_num_threads(case["threads"])
    try:
        weight = weight.bfloat16() if case["bfloat16"] else weight
        rest = (*options, 1, True, case["activation"], True, case["winograd"])
        found, mean = ops.conv2d(x, weight, bias, in_index, out_index, gain, residual, *rest)
        torch.testing.assert_close(found.double(), want, **CLOSE)
        torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)
        if residual is not None:
            mean = ops.conv2d_into(x, weight, bias, in_index, out_index, gain, residual, *rest)
            assert torch.equal(residual, found)
            torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", [(56, 56), (7, 7), (1, 1), (15, 20), (3, 200)])
@pytest.mark.parametrize("channels", [(300, 513), (513, 12), (1, 1)])
@pytest.mark.parametrize(("kernel", "how"), [(1, ""), (3, ""), (3, "winograd"), (1, "bfloat16"), (3, "bfloat16")])
def test_convolution_over_several_blocks(size: tuple[int, int], channels: tuple[int, int], kernel: int,
                                         how: str) -> None:  # fmt: skip
    """More input channels than a block holds, more weights than a cache: groups of panels, blocks that add up."""
    g = torch.Generator().manual_seed(0)
    cin, cout = channels
    kin, kout = (cin + 1) // 2, (cout + 1) // 2
    x = torch.randn(2, kin, *size, generator=g)
    weight = torch.randn(cout, cin, kernel, kernel, generator=g) / (cin * kernel**2) ** 0.5
    if how == "bfloat16":
        x, weight = rounded(x, weight)
    index = subsets(2, cin, kin, g), subsets(2, cout, kout, g)
    options = ((1, 1), (kernel // 2,) * 2, (1, 1))
    want = indexed_conv2d(x.double(), weight.double(), None, *index, None, *options)
    weight = weight.bfloat16() if how == "bfloat16" else weight
    found, mean = ops.conv2d(x, weight, None, *index, None, None, *options, 1, True, "", True, how == "winograd")
    torch.testing.assert_close(found.double(), want, **CLOSE)
    torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("channels", [(512, 32), (512, 512), (70, 40)])
def test_winograd_on_more_threads_than_panels(threads: int, channels: tuple[int, int]) -> None:
    """Of fewer rows, groups of panels are smaller, and transformed weights are kept where those of all are not."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, channels[0], 14, 20, generator=g), torch.randn(*channels[::-1], 3, 3, generator=g) / 30
    want = F.conv2d(x.double(), weight.double(), padding=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "", False, True)
        found = ops.conv2d(x, weight, *[None] * 5, *rest)[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), want, **CLOSE)


@pytest.mark.parametrize("how", ["", "winograd", "bfloat16"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (30, 40)])
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_of_suppressed_channels_are_not_used(how: str, size: tuple[int, int], threads: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, held = torch.randn(1, 150, *size, generator=g), torch.full((90, 300, 3, 3), torch.nan)
    index = subsets(1, 300, 150, g), subsets(1, 90, 45, g)
    weight = torch.randn(45, 150, 3, 3, generator=g) / 30
    if how == "bfloat16":
        x, weight, held = *rounded(x, weight), held.bfloat16()
    held[index[1][0][:, None], index[0][0]] = weight.to(held.dtype)
    want = F.conv2d(x.double(), weight.double(), padding=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "", False, how == "winograd")
        found = ops.conv2d(x, held, None, *index, None, None, *rest)[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), want, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("per_group", "stride"), [((1, 1), 1), ((1, 1), 2), ((4, 6), 1), ((16, 16), 2), ((1, 3), 1)])
def test_groups(dtype: torch.dtype, whole: bool, per_group: tuple[int, int], stride: int) -> None:
    g = torch.Generator().manual_seed(1)
    groups, (a, b) = 10, per_group
    weight, bias = torch.randn(groups * b, a, 3, 3, generator=g), torch.randn(groups * b, generator=g)
    weight = weight.to(dtype)
    options = ((stride, stride), (1, 1), (1, 1))
    if whole:  # active groups are there with all their channels
        active = subsets(2, groups, 4, g)
        out_index = (active[:, :, None] * b + torch.arange(b)).flatten(1)
        x = torch.randn(2, 4 * a, 9, 37, generator=g).to(dtype).float()
        want = torch.cat([
            F.conv2d(x[i : i + 1].double(), weight[out_index[i]].double(), bias[out_index[i]].double(), *options, 4)
            for i in range(2)
        ])  # fmt: skip
        found, _ = ops.conv2d(x, weight, bias, None, out_index, None, None, *options, groups, True, "", False)
    else:  # every group has the same number of active channels
        kin, kout = max(1, a // 2), max(1, b // 2)
        in_index = subsets(2, a, kin, g)
        out_index = (torch.arange(groups)[None, :, None] * b + subsets(2, b, kout, g)[:, None]).flatten(1)
        x = torch.randn(2, groups * kin, 9, 37, generator=g).to(dtype).float()
        want = torch.cat([
            F.conv2d(x[i : i + 1].double(), weight[out_index[i]][:, in_index[i]].double(),
                     bias[out_index[i]].double(), *options, groups)
            for i in range(2)
        ])  # fmt: skip
        found, _ = ops.conv2d(x, weight, bias, in_index, out_index, None, None, *options, groups, False, "", False)
    torch.testing.assert_close(found.double(), want, **CLOSE)


@given(
    seed=st.integers(0, 10_000), size=st.tuples(st.integers(1, 30), st.integers(1, 70)),
    kernel=st.sampled_from([(3, 3), (5, 5), (7, 7), (1, 9), (9, 1), (2, 2), (3, 1)]), stride=st.integers(1, 3),
    dilation=st.integers(1, 2), padding=st.integers(0, 3), activation=st.sampled_from(["", *ACTIVATIONS]),
    threads=st.integers(1, 2),
)  # fmt: skip
@FUZZ
def test_depthwise(seed: int, size: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, padding: int,
                   activation: str, threads: int) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    room = [(k - 1) * dilation + 1 - 2 * padding for k in kernel]
    height, width = (max(n, r) for n, r in zip(size, room, strict=True))
    weight, bias = torch.randn(7, 1, *kernel, generator=g), torch.randn(7, generator=g)
    out_index, gain = subsets(2, 7, 5, g), torch.rand(2, 5, generator=g)
    x = torch.randn(2, 5, height, width, generator=g)
    options = ((stride, stride), (padding, padding), (dilation, dilation))
    want = torch.cat([
        F.conv2d(x[i : i + 1].double(), weight[out_index[i]].double(), bias[out_index[i]].double(), *options, 5)
        for i in range(2)
    ]) * gain.double()[:, :, None, None]  # fmt: skip
    want = ACTIVATIONS[activation](want) if activation else want
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, mean = ops.conv2d(x, weight, bias, None, out_index, gain, None, *options, 7, True, activation, True)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), want, **CLOSE)
    torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)


@given(
    seed=st.integers(0, 10_000), batch=st.integers(1, 3), tokens=st.integers(1, 150), cin=st.integers(1, 200),
    cout=st.integers(1, 90), some=st.tuples(*[st.booleans()] * 5), columns=st.tuples(st.booleans(), st.booleans()),
    activation=st.sampled_from(["", *ACTIVATIONS]), bfloat16=st.booleans(),
)  # fmt: skip
@FUZZ
def test_linear(seed: int, batch: int, tokens: int, cin: int, cout: int, some: tuple[bool, ...],
                columns: tuple[bool, bool], activation: str, bfloat16: bool) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    kin, kout = (cin + 1) // 2 if some[0] else cin, (cout + 1) // 2 if some[1] else cout
    in_index = subsets(batch, cin, kin, g) if some[0] else None
    out_index = subsets(batch, cout, kout, g) if some[1] else None
    x = torch.randn(batch, tokens, kin, generator=g)
    weight, bias = torch.randn(cout, cin, generator=g) / cin**0.5, torch.randn(cout, generator=g) if some[2] else None
    if bfloat16:
        x, weight = rounded(x, weight)
    gain = torch.rand(batch, kout, generator=g) if some[3] and (some[0] or some[1]) else None
    residual = torch.randn(batch, tokens, kout, generator=g) if some[4] and not columns[1] else None
    rows = []
    for i in range(batch):
        w = weight if out_index is None else weight[out_index[i]]
        w = w if in_index is None else w[:, in_index[i]]
        b = bias if bias is None or out_index is None else bias[out_index[i]]
        y = F.linear(x[i].double(), w.double(), None if b is None else b.double())
        rows.append(y if gain is None else y * gain[i])
    want = torch.stack(rows) if residual is None else torch.stack(rows) + residual
    want = ACTIVATIONS[activation](want) if activation else want
    given_x = x.movedim(-1, 1) if columns[0] else x
    held = weight.bfloat16() if bfloat16 else weight
    found = ops.linear(given_x, held, bias, in_index, out_index, gain, residual, activation, *columns)
    torch.testing.assert_close((found.movedim(1, -1) if columns[1] else found).double(), want, **CLOSE)


@pytest.mark.parametrize("indexed", [False, True])
def test_pixels_are_rounded_to_the_nearest_bfloat16(indexed: bool, instruction_set: str) -> None:
    if not ops.multiplies_bfloat16():
        pytest.skip(f"{instruction_set} on this CPU multiplies in float32")
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 40, 6, 7, generator=g), torch.randn(9, 80 if indexed else 40, 1, 1, generator=g)
    index = subsets(1, 80, 40, g) if indexed else None
    rest = (None, index, None, None, None, [1, 1], [0, 0], [1, 1], 1, True, "", False)
    found = ops.conv2d(x, weight.bfloat16(), *rest)[0]
    torch.testing.assert_close(found, ops.conv2d(*rounded(x, weight), *rest)[0], **CLOSE)
    assert (found - ops.conv2d(x, weight, *rest)[0]).abs().max() > 1e-3
    if index is not None:
        with pytest.raises(RuntimeError, match="ascending"):
            ops.conv2d(x, weight.bfloat16(), None, index.flip(1), *rest[2:])


def test_a_pair_is_no_number() -> None:
    """As one float32 it may be denormal, which this mode takes for zero, or NaN."""
    x, weight = torch.ones(1, 3, 4, 4), torch.tensor([0.5, 0.0, 0.25]).view(1, 3, 1, 1)
    torch.set_flush_denormal(True)
    try:
        found = ops.conv2d(x, weight.bfloat16(), *[None] * 5, [1, 1], [0, 0], [1, 1], 1, True, "", False)[0]
        weight[0, 1] = torch.inf
        infinite = ops.conv2d(x, weight.bfloat16(), *[None] * 5, [1, 1], [0, 0], [1, 1], 1, True, "", False)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, torch.full_like(found, 0.75)) and infinite.isinf().all()


@given(
    seed=st.integers(0, 1000), size=st.tuples(st.integers(3, 40), st.integers(3, 80)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil=st.booleans(), padded=st.booleans(), nan=st.booleans(),
)  # fmt: skip
@FUZZ
def test_max_pool(seed: int, size: tuple, kernel: tuple, stride: tuple, ceil: bool, padded: bool, nan: bool) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    if nan:
        x[0, 0, 1, 1] = torch.nan
    padding = [k // 2 if padded else 0 for k in kernel]
    want = F.max_pool2d(x, kernel, stride, padding, 1, ceil)
    torch.testing.assert_close(ops.max_pool2d(x, kernel, stride, padding, ceil), want, rtol=0, atol=0, equal_nan=True)


@given(
    seed=st.integers(0, 1000), size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    to=st.tuples(st.integers(1, 45), st.integers(1, 90)), factors=st.tuples(st.floats(0.6, 3.2), st.floats(0.6, 3.2)),
    corners=st.booleans(), by_factors=st.booleans(), threads=st.integers(1, 2),
)  # fmt: skip
@FUZZ
def test_upsample_bilinear(seed: int, size: tuple, to: tuple, factors: tuple, corners: bool, by_factors: bool,
                           threads: int) -> None:  # fmt: skip
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(seed))
    if by_factors:
        to = tuple(max(1, int(n * f)) for n, f in zip(size, factors, strict=True))
    scales = factors if by_factors else (None, None)
    want = torch.ops.aten.upsample_bilinear2d(x, to, corners, *scales)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = ops.upsample_bilinear2d(x.transpose(2, 3).contiguous().transpose(2, 3), to, corners,
                                        factors if by_factors else None)  # fmt: skip
    finally:
        torch.set_num_threads(before)
    # Where a pixel lies is rounded, to 4e-6 at 64, and values lie several units apart.
    torch.testing.assert_close(found, want, rtol=1e-6, atol=5e-5)


def test_upsample_of_nothing_and_of_what_it_cannot_do() -> None:
    assert ops.upsample_bilinear2d(torch.zeros(0, 3, 4, 4), [8, 8], False, None).shape == (0, 3, 8, 8)
    for x, size, factors in [
        (torch.zeros(1, 3, 0, 4), [8, 8], None), (torch.zeros(1, 3, 4, 4), [0, 8], None),
        (torch.zeros(3, 4, 4), [8, 8], None), (torch.zeros(1, 3, 4, 4).double(), [8, 8], None),
        (torch.zeros(1, 3, 4, 4), [8, 8], [2.0]),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError):
            ops.upsample_bilinear2d(x, size, False, factors)


@pytest.mark.parametrize("activation", ["", *ACTIVATIONS])
def test_activations_over_their_range(activation: str) -> None:
    """From underflow to overflow, and NaN and infinities as PyTorch has them."""
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, 3e38])
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.linspace(-6, 6, 4001), special])[None, None]
    ones, none = torch.ones(1), torch.zeros(1)
    found, _ = ops.affine(x, ones, none, None, activation, False)
    want = ACTIVATIONS[activation](x.double().clone()) if activation else x.double()
    if activation in ("gelu", "silu", "hardswish"):  # the far end of float32, where exp underflows to what is left
        finite = x.isfinite() & (x.abs() < 200)
        torch.testing.assert_close(found[finite].double(), want[finite], rtol=2e-6, atol=3e-7)
        assert found[x.isnan()].isnan().all()
    else:
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("activation", ["", "gelu"])
@pytest.mark.parametrize("winograd", [False, True])
def test_small_sums_survive_a_large_bias(activation: str, winograd: bool) -> None:
    """It is added last: sums that began with it would round to its precision a thousand times."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 1000, 8, 8, generator=g), torch.randn(4, 1000, 3, 3, generator=g) / 1e4
    bias = torch.full((4,), 10.0)
    want = F.conv2d(x.double(), weight.double(), bias.double(), 1, 1)  # gelu(10) is 10
    rest = ([1, 1], [1, 1], [1, 1], 1, True, activation, False, winograd)
    found = ops.conv2d(x, weight, bias, None, None, None, None, *rest)[0]
    assert (found.double() - want).abs().max() < 2 * 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("activation", ["", "relu", "relu6"])
@pytest.mark.parametrize("pixels", [3, 16, 70])
def test_bounds_keep_nan_and_infinity(activation: str, pixels: int) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 7.0])
    x = special.repeat(12)[:pixels].view(1, 1, 1, pixels)
    scales = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    found, mean = ops.conv2d(x, scales, None, None, None, None, None, [1, 1], [0, 0], [1, 1], 1, True, activation, True)
    want = ACTIVATIONS[activation](x * scales.view(1, 2, 1, 1)) if activation else x * scales.view(1, 2, 1, 1)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)
    assert mean.isnan().all()


@pytest.mark.parametrize("shape", [(2, 7, 5, 6), (1, 3, 50, 41), (3, 6, 10)])
def test_affine(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x, scale, shift = torch.randn(*shape, generator=g), torch.randn(20, generator=g), torch.randn(20, generator=g)
    index = subsets(shape[0], 20, shape[1], g)
    found, mean = ops.affine(x, scale, shift, index, "relu", True)
    view = (*index.shape, *[1] * (x.dim() - 2))
    want = (x * scale[index].view(view) + shift[index].view(view)).relu()
    torch.testing.assert_close(found, want, **CLOSE)
    torch.testing.assert_close(mean, subsample(want), **CLOSE)


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 5, 33, 29), 1), ((2, 700, 37), 2), ((3, 9, 11, 40), 3), ((1, 4, 1, 1), 1)]
)
def test_subsample(shape: tuple[int, ...], dim: int) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.subsample(x, dim), subsample(x, dim), **CLOSE)


@pytest.mark.parametrize("k", [1, 5, 16])
@pytest.mark.parametrize("boost", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0, -0.5])
@pytest.mark.parametrize("bound", [None, 1.1])
def test_gate(k: int, boost: bool, strength: float, bound: float | None) -> None:
    """Ties go to the lower index, as in the reference; most saliencies here are zero, and so tie."""
    g = torch.Generator().manual_seed(k)
    gate = Gate(16, 8, k, importance=torch.rand(16, generator=g), boost=boost, max_gain=bound)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(16, 8, generator=g))
        gate.strength.fill_(strength)
    s = torch.rand(6, 8, generator=g)
    found = ops.gate(s, gate.weight, gate.bias, gate.start, gate.strength, None, k, boost, bound)
    active, gain, _ = gate.select(s)
    assert bound is None or not boost or strength < 1 or float(gain.detach().max()) == pytest.approx(bound)
    assert torch.equal(found[0], active)
    torch.testing.assert_close(found[1], gain, rtol=0, atol=0)
    index = subsets(6, 8, 3, g)
    narrow = ops.gate(s.gather(1, index), gate.weight, gate.bias, gate.start, gate.strength, index, k, boost)
    wide = torch.zeros_like(s).scatter(1, index, s.gather(1, index))
    assert torch.equal(narrow[0], gate.select(wide)[0])


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("narrow", [False, True])
def test_gate_of_low_rank(samples: int, narrow: bool) -> None:
    g = torch.Generator().manual_seed(samples)
    gate = Gate(16, 8, 5, rank=3)
    assert gate.reduce is not None
    with torch.no_grad():
        gate.weight.copy_(torch.randn(16, 3, generator=g))
    s = torch.rand(samples, 8, generator=g)
    index = subsets(samples, 8, 6, g) if narrow else None
    seen = s if index is None else s.gather(1, index)
    wide = s if index is None else torch.zeros_like(s).scatter(1, index, seen)
    found = ops.gate(seen, gate.weight, gate.bias, gate.start, gate.strength, index, 5, True, None, None, gate.reduce)
    active, gain, _ = gate.select(wide)
    assert torch.equal(found[0], active)
    torch.testing.assert_close(found[1], gain, **CLOSE)


@given(
    seed=st.integers(0, 1000), channels=st.integers(1, 90), inputs=st.integers(1, 150), rank=st.integers(0, 40),
    narrow=st.booleans(), threads=st.integers(1, 2),
)  # fmt: skip
@FUZZ
def test_saliencies_of_one_sample(seed: int, channels: int, inputs: int, rank: int, narrow: bool, threads: int) -> None:
    """A product of our own: rows and columns that fill no vector, no memory read that is not there."""
    torch.manual_seed(seed)
    index = torch.randperm(inputs)[: (inputs + 1) // 2].sort().values[None] if narrow else None
    s = torch.rand(1, inputs if index is None else index.shape[1])
    reduce = torch.randn(rank, inputs) if rank else None
    weight, bias = torch.randn(channels, rank or inputs), torch.randn(channels)
    full = s if index is None else torch.zeros(1, inputs).scatter(1, index, s)
    low = (full if reduce is None else full @ reduce.T).double()
    wanted = (low @ weight.double().T + bias).relu()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        active, gain = ops.gate(
            s, weight, bias, torch.zeros(channels), torch.ones(()), index, channels, True, None, None, reduce
        )
    finally:
        torch.set_num_threads(before)
    assert active.tolist() == [list(range(channels))]
    torch.testing.assert_close(gain.double(), 1 + wanted, rtol=1e-4, atol=1e-4 * float(wanted.max() + 1))


@pytest.mark.parametrize(
    "change",
    [
        {"s": torch.rand(1, 5)},
        {"index": torch.tensor([[0, 1, 9, 3]])},
        {"bias": torch.zeros(7)},
        {"reduce": torch.zeros(3, 4)},
        {"weight": torch.zeros(8, 4, dtype=torch.float64)},
    ],
)
def test_gates_that_do_not_fit_are_refused(change: dict) -> None:
    given = {"s": torch.rand(1, 4), "weight": torch.zeros(8, 4), "bias": torch.zeros(8), "start": torch.zeros(8),
             "strength": torch.ones(()), "index": None, "k": 4, "boost": True, "max_gain": None, "channel_dim": None,
             "reduce": None}  # fmt: skip
    ops.gate(*given.values())
    with pytest.raises((RuntimeError, IndexError)):
        ops.gate(*(given | change).values())


@pytest.mark.parametrize(("shape", "dim"), [((1, 8, 5, 4), 1), ((3, 8, 5, 4), 1), ((1, 70, 8), 2), ((2, 600, 8), 2)])
@pytest.mark.parametrize("narrow", [False, True])
def test_gate_that_subsamples(shape: tuple[int, ...], dim: int, narrow: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight, bias = torch.randn(shape, generator=g), torch.randn(40, 8, generator=g), torch.randn(40, generator=g)
    rest = (bias, torch.zeros(40), torch.ones(()))
    index = subsets(shape[0], 12, 8, g) if narrow else None
    if index is not None:
        weight = torch.randn(40, 12, generator=g)
    found = ops.gate(x, weight, *rest, index, 11, True, None, dim)
    s = subsample(x, dim)
    if index is not None:
        s = torch.zeros(shape[0], 12).scatter(1, index, s)
    saliency = (s @ weight.T + bias).relu()
    assert torch.equal(found[0], saliency.topk(11).indices.sort().values)
    torch.testing.assert_close(found[1], 1 + saliency.gather(1, found[0]), **CLOSE)


def test_channel_gain() -> None:
    g = torch.Generator().manual_seed(0)
    units = [torch.tensor([0, 1, -1, 1, 2, 2]), torch.tensor([-1, 0, 0, -1, 1, -1])]
    plain, native_ = ChannelGain(units, [3, 2]), ChannelGain(units, [3, 2], native=True)
    # The second site's sets are of their own lengths: 2 is no unit.
    given_ = (torch.tensor([[0, 2], [1, 2]]), torch.rand(2, 2, generator=g) + 1,
              torch.tensor([[1, 2], [0, 1]]), torch.rand(2, 2, generator=g) + 1)  # fmt: skip
    for index in (None, torch.tensor([[0, 2, 5], [1, 3, 4]])):
        assert torch.equal(plain(index, *given_), native_(index, *given_))
    for index, active in ((torch.tensor([[6]]), given_[0]), (None, torch.tensor([[0, 4], [0, 1]]))):
        with pytest.raises((RuntimeError, IndexError), match="outside"):
            native_(index, active, *given_[1:])


def test_channel_index() -> None:
    tables, fixed = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[6], [5]])], torch.tensor([4, 7])
    plain, native_ = ChannelIndex(tables, fixed, 8), ChannelIndex(tables, fixed, 8, native=True)
    active = torch.tensor([[1], [0]]), torch.tensor([[0], [1]])
    assert torch.equal(plain(*active), native_(*active))
    assert native_(*active).tolist() == [[2, 3, 4, 6, 7], [0, 1, 4, 5, 7]]


def test_empty_batch() -> None:
    weight = torch.randn(4, 3, 3, 3)
    y, mean = ops.conv2d(torch.zeros(0, 3, 8, 8), weight, None, None, None, None, None, [1, 1], [1, 1], [1, 1], 1, True,
                         "", True)  # fmt: skip
    assert y.shape == (0, 4, 8, 8) and mean.shape == (0, 4)
    assert ops.linear(torch.zeros(0, 5, 3), torch.zeros(4, 3), None, None, None, None, None, "").shape == (0, 5, 4)


@pytest.mark.parametrize(
    ("index", "message"),
    [(torch.tensor([[0, 9]]), "outside"), (torch.tensor([[-1, 0]]), "outside"), (torch.tensor([0, 1]), "must be")],
)
def test_indices_out_of_range_are_refused(index: Tensor, message: str) -> None:
    x, weight = torch.zeros(1, 2, 5, 5), torch.zeros(4, 3, 1, 1)
    for indices in ((index, None), (torch.tensor([[0, 1]]), index)):
        with pytest.raises((RuntimeError, IndexError), match=message):
            ops.conv2d(x, weight, None, *indices, None, None, [1, 1], [0, 0], [1, 1], 1, True, "", False)


@pytest.mark.parametrize(
    "change",
    [{"x": torch.zeros(1, 5, 6, 6)}, {"bias": torch.zeros(2)}, {"gain": torch.zeros(2, 2)}, {"kernel": 9},
     {"residual": torch.zeros(1, 2, 3, 3)}, {"x": torch.zeros(1, 2, 6, 6).double()},
     {"weight": torch.zeros(16, 4, 3)}, {"winograd": True, "kernel": 2}, {"winograd": True, "stride": [2, 2]},
     {"winograd": True, "weight": torch.zeros(4, 3, 3, 3, dtype=torch.bfloat16)}],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(change: dict) -> None:
    size = change.get("kernel", 3)
    with pytest.raises(RuntimeError):
        ops.conv2d(change.get("x", torch.zeros(1, 2, 6, 6)), change.get("weight", torch.zeros(4, 3, size, size)),
                   change.get("bias"),
                   torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), change.get("gain"), change.get("residual"),
                   change.get("stride", [1, 1]), [1, 1], [1, 1], 1, True, "", False, change.get("winograd", False)
                   )  # fmt: skip


@pytest.mark.parametrize("winograd", [False, True])
def test_several_python_threads_at_once(winograd: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, 3, 3, generator=g)
    jobs = [(torch.randn(1, 32, 20, 20, generator=g), subsets(1, 64, 32, g), subsets(1, 96, 48, g)) for _ in range(8)]

    def run(job: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, i, o = job
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "", False, winograd)
        y: Tensor = ops.conv2d(x, weight, None, i, o, None, None, *rest)[0]
        return y

    alone, wrong = [run(job) for job in jobs], []

    def repeatedly(n: int) -> None:
        for _ in range(30):
            if not torch.equal(run(jobs[n]), alone[n]):
                wrong.append(n)

    threads = [threading.Thread(target=repeatedly, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_operators_are_well_registered() -> None:
    """Schemas, fake kernels and mutation, as torch.library checks them: what compile and export rely on."""
    g = torch.Generator().manual_seed(0)
    x, weight, i, o = torch.randn(2, 3, 8, 8), torch.randn(6, 5, 3, 3), subsets(2, 5, 3, g), subsets(2, 6, 4, g)
    checks = ["test_schema", "test_faketensor"]
    residual = torch.randn(2, 4, 8, 8)
    for mean, winograd in ((True, False), (False, True)):
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "relu", mean, winograd)
        torch.library.opcheck(ops.conv2d.default, (x, weight, None, i, o, None, None, *rest), test_utils=checks)
        torch.library.opcheck(
            ops.conv2d_into.default, (x, weight, None, i, o, None, residual, *rest), test_utils=checks
        )
    tokens, w = torch.randn(2, 7, 3), torch.randn(6, 5)
    for columns in ((False, False), (False, True)):
        torch.library.opcheck(
            ops.linear.default, (tokens, w, None, i, o, None, None, "gelu", *columns), test_utils=checks
        )
    torch.library.opcheck(ops.subsample.default, (x, 1), test_utils=checks)
    torch.library.opcheck(ops.max_pool2d.default, (x, [3, 3], [2, 2], [1, 1], False), test_utils=checks)
    torch.library.opcheck(ops.upsample_bilinear2d.default, (x, [5, 20], False, None), test_utils=checks)
    for mean in (True, False):
        torch.library.opcheck(ops.affine.default, (x, torch.ones(5), torch.ones(5), i, "", mean), test_utils=checks)
    s = torch.rand(2, 5)
    torch.library.opcheck(
        ops.gate.default,
        (s, torch.randn(6, 5), torch.ones(6), torch.ones(6), torch.ones(()), None, 3, True, 4.0),
        test_utils=checks,
    )
    torch.library.opcheck(
        ops.gate.default,
        (x, torch.randn(6, 3), torch.ones(6), torch.ones(6), torch.ones(()), None, 3, True, None, 1),
        test_utils=checks,
    )
    units, active = torch.tensor([0, 1, -1, 1]), torch.tensor([[1]])
    torch.library.opcheck(
        ops.channel_gain.default, ([units], [active], [torch.rand(1, 1)], [2], active), test_utils=checks
    )
    table, fixed = torch.tensor([[0], [1], [2]]), torch.tensor([3])
    torch.library.opcheck(ops.channel_index.default, ([table], fixed, [torch.tensor([[0, 2]])], 4), test_utils=checks)
