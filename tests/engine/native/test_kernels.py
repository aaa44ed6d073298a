"""The C++ operators against the readable reference, for every instruction set that this CPU has."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatedprune.engine import native
from gatedprune.engine.narrow import ACTIVATIONS
from gatedprune.functional import indexed_conv2d, subsample

from .cases import CLOSE, FUZZ, check_convolution, convolutions, on_threads, ops, rounded, subsets

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

# Fresh memory is NaN, so that what a kernel forgets to write, or reads too much of, shows.
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@given(convolutions())
@FUZZ
def test_convolution(case: dict) -> None:
    check_convolution(case)


@given(convolutions(bfloat16=True))
@FUZZ
def test_bfloat16_weights(case: dict) -> None:
    check_convolution(case)


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
    with on_threads(threads):
        rest = ([1, 1], [1, 1], [1, 1], 1, True, "", False, how == "winograd")
        found = ops.conv2d(x, held, None, *index, None, None, *rest)[0]
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
    with on_threads(threads):
        found, mean = ops.conv2d(x, weight, bias, None, out_index, gain, None, *options, 7, True, activation, True)
    torch.testing.assert_close(found.double(), want, **CLOSE)
    torch.testing.assert_close(mean.double(), subsample(want), **CLOSE)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_of_small_planes(kernel: int, stride: int) -> None:
    """Rows that do not fill a step of four, edges on both sides of a vector, a map that is nearly all padding."""
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 1, kernel, kernel, generator=g), torch.randn(6, generator=g)
    for height, width, padding in [(7, 7, kernel // 2), (14, 13, kernel // 2), (19, 45, 1), (33, 70, 0), (9, 1, 6)]:
        x = torch.randn(2, 6, height, width, generator=g)
        options = ([stride] * 2, [padding] * 2, [1, 1])
        found, mean = ops.conv2d(x, weight, bias, None, None, None, None, *options, 6, True, "relu6", True)
        want = F.conv2d(x.double(), weight.double(), bias.double(), *options, 6).clamp(0, 6)
        torch.testing.assert_close(found.double(), want, **CLOSE)
        torch.testing.assert_close(mean.double(), want.mean((2, 3)), **CLOSE)


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


@pytest.mark.parametrize("shape", [(1, 7, 1), (1, 14, 1), (1, 7, 3), (4, 1, 1), (8, 1, 1), (40, 1, 1)])
def test_long_sums_are_sums_of_sums(shape: tuple[int, int, int]) -> None:
    """The error of one sum of n products after the other grows with √n: here with the root of a block's 256."""
    samples, side, kernel = shape
    x, weight = torch.randn(samples, 2048, side, side), torch.randn(64, 2048, kernel, kernel)
    if side > 1:
        places = [1, 1], [kernel // 2] * 2, [1, 1]
        found, _ = ops.conv2d(x, weight, None, None, None, None, None, *places, 1, False, "", False)
    else:
        found = ops.linear(x[..., 0, 0], weight[..., 0, 0], None, None, None, None, None, "")
    exact = F.conv2d(x.double(), weight.double(), padding=kernel // 2).view_as(found)
    # An addition errs by at most 2⁻²⁴ of its sum, evenly; of n sums, which grow like √i, that leaves √(n/6) · 2⁻²⁴.
    blocks = 2048 * kernel**2 / 256
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2**-24 * math.sqrt((256 + blocks) / 6)


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
@pytest.mark.parametrize("signed", [False, True])
def test_subsample(shape: tuple[int, ...], dim: int, signed: bool) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ops.subsample(x, dim, signed), subsample(x, dim, signed), **CLOSE)


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
     {"winograd": True, "kernel": 7},
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
