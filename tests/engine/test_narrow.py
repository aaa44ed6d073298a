"""Narrow operators against the readable reference, with poisoned memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatedprune.engine import NarrowConv2d, NarrowLinear
from gatedprune.engine.narrow import AddInto, NarrowAffine, Widen
from gatedprune.functional import indexed_conv2d

pytestmark = pytest.mark.usefixtures("poisoned_memory")

B, C_IN, C_OUT = 3, 6, 8
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def some(count: int, of: int, samples: int = B) -> Tensor:
    return torch.stack([torch.randperm(of)[:count].sort().values for _ in range(samples)])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_memory_really_is_poisoned() -> None:
    assert bool(torch.empty(100).isnan().all())


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("narrow_in", "narrow_out"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 1), (2, 1), (2, 0), (2, 1)),
        ((3, 3), (1, 1), "same", (2, 2)),
        ((4, 2), (1, 1), "same", (1, 1)),
        ((3, 3), (1, 1), "valid", (1, 1)),
    ],
)
def test_convolution(samples, bias, narrow_in, narrow_out, kernel, stride, padding, dilation) -> None:  # type: ignore[no-untyped-def]
    weight, offset = randn(C_OUT, C_IN, *kernel), randn(C_OUT) if bias else None
    into = some(4, C_IN, samples) if narrow_in else None
    out = some(5, C_OUT, samples) if narrow_out else None
    gain = torch.rand(samples, 5, dtype=torch.float64) if narrow_out else None
    x = randn(samples, 4 if narrow_in else C_IN, 9, 7)
    layer = NarrowConv2d(weight, offset, stride, padding, dilation, 1)
    found = layer(x, into, out, gain)
    wanted = indexed_conv2d(x, weight, offset, into, out, gain, stride, padding, dilation)
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize(("c_in", "c_out", "groups"), [(8, 8, 8), (8, 16, 8), (12, 8, 4), (4, 4, 2)])
def test_grouped_convolution_keeps_whole_groups(c_in: int, c_out: int, groups: int) -> None:
    weight, bias, x = randn(c_out, c_in // groups, 3, 3), randn(c_out), randn(B, c_in, 7, 7)
    per_in, per_out = c_in // groups, c_out // groups
    kept = some(max(1, groups // 2), groups)
    into = (kept[:, :, None] * per_in + torch.arange(per_in)).flatten(1)
    out = (kept[:, :, None] * per_out + torch.arange(per_out)).flatten(1)
    gain = torch.rand(out.shape, dtype=torch.float64)
    narrow = torch.stack([x[b, into[b]] for b in range(B)])
    found = NarrowConv2d(weight, bias, (2, 1), (1, 1), (1, 1), groups)(narrow, into, out, gain)
    full = F.conv2d(x, weight, bias, (2, 1), (1, 1), groups=groups)
    wanted = torch.stack([full[b, out[b]] * gain[b, :, None, None] for b in range(B)])
    torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("shape", [(), (5,), (2, 4)])
def test_linear(shape: tuple[int, ...]) -> None:
    weight, bias = randn(C_OUT, C_IN), randn(C_OUT)
    into, out, gain = some(4, C_IN), some(3, C_OUT), torch.rand(B, 3, dtype=torch.float64)
    x = randn(B, *shape, 4)
    found = NarrowLinear(weight, bias)(x, into, out, gain)
    for b in range(B):
        wanted = (x[b] @ weight[out[b]][:, into[b]].T + bias[out[b]]) * gain[b]
        torch.testing.assert_close(found[b], wanted, **EXACT)


def test_layers_take_non_contiguous_maps() -> None:
    weight, out = randn(C_OUT, C_IN, 3, 3), some(5, C_OUT)
    layer = NarrowConv2d(weight, None, (1, 1), (1, 1), (1, 1), 1)
    x = randn(B, C_IN, 8, 8)
    wanted = layer(x, None, out)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last), None, out), wanted, **EXACT)
    torch.testing.assert_close(layer(x.transpose(2, 3).contiguous().transpose(2, 3), None, out), wanted, **EXACT)


def test_affine_is_the_batch_norm_of_the_active_channels() -> None:
    scale, shift, index = randn(C_IN), randn(C_IN), some(4, C_IN)
    x = randn(B, 4, 5, 5)
    found = NarrowAffine(scale, shift)(x, index)
    for b in range(B):
        s, t = (v[index[b]].view(-1, 1, 1) for v in (scale, shift))
        torch.testing.assert_close(found[b], x[b] * s + t, **EXACT)


@pytest.mark.parametrize("dim", [1, 2])
def test_widen_leaves_zeros(dim: int) -> None:
    index = some(4, C_IN)
    x = randn(B, 4, 4)
    found = Widen(dim, C_IN)(x, index)
    wanted = torch.zeros(B, *(C_IN if d == dim else 4 for d in (1, 2)), dtype=torch.float64)
    for b in range(B):
        for j, c in enumerate(index[b].tolist()):
            wanted[b].select(dim - 1, c).copy_(x[b].select(dim - 1, j))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_add_into_touches_the_winners_alone(inplace: bool) -> None:
    full, x, index = randn(B, C_IN, 4, 4), randn(B, 2, 4, 4), some(2, C_IN)
    before = full.clone()
    found = AddInto(1, inplace)(full, x, index)
    torch.testing.assert_close(found, before + Widen(1, C_IN)(x, index), **EXACT)
    assert (found is full) == inplace
    assert torch.equal(full, before) != inplace
