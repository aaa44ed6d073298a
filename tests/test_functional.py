"""The mathematics: winners, gains and the reference convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatedprune.errors import ConfigError
from gatedprune.functional import (
    active_mask,
    active_set,
    bounded_gain,
    channel_gain,
    indexed_conv2d,
    saliency,
    scale_batch_normed,
    scale_channels,
    straight_through,
    subsample,
    threshold_set,
    winners_take_all,
)

# Few different values: ties everywhere.
LEVELS = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, 1e-30, 3.4e38])


@st.composite
def saliencies(draw: st.DrawFn) -> tuple[Tensor, int]:
    samples, channels = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    values = draw(st.lists(LEVELS, min_size=samples * channels, max_size=samples * channels))
    return torch.tensor(values).view(samples, channels), draw(st.integers(1, channels))


@given(saliencies())
def test_always_exactly_k_and_ties_go_to_the_lower_index(drawn: tuple[Tensor, int]) -> None:
    g, k = drawn
    active = active_set(g, k)
    assert active.shape == (len(g), k)
    assert active.dtype == torch.int64
    for values, winners in zip(g.tolist(), active.tolist(), strict=True):
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]  # Python's sort is stable
        assert winners == sorted(best)


@given(saliencies())
def test_winners_keep_their_value_and_losers_become_zero(drawn: tuple[Tensor, int]) -> None:
    g, k = drawn
    out, active = winners_take_all(g, k), active_set(g, k)
    won = torch.zeros_like(g, dtype=torch.bool).scatter(1, active, True)
    assert torch.equal(out[won], g[won])
    assert not out[~won].any()
    assert out.isfinite().all()


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ConfigError, match=r"winners `k` must be in \[1, 4\]. Got"):
        active_set(torch.ones(2, 4), k)


def test_nan_saliencies_still_give_k_winners() -> None:
    active = active_set(torch.full((2, 5), torch.nan), 3)
    assert active.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_winners_alone_get_a_gradient() -> None:
    g = torch.tensor([[0.1, 0.9, 0.5]], requires_grad=True)
    winners_take_all(g, 2).sum().backward()
    assert g.grad is not None
    assert g.grad.tolist() == [[0, 1, 1]]


def winners_of(g: Tensor, threshold: float, k: int) -> list[list[int]]:
    """Winners of each row, and the check that C alone fills the rest up."""
    rows = threshold_set(g, torch.tensor(threshold, dtype=g.dtype), k).tolist()
    channels = g.shape[1]
    found = [[c for c in row if c < channels] for row in rows]
    assert all(row == sorted(ones) + [channels] * (channels - len(ones)) for row, ones in zip(rows, found, strict=True))
    return found


@given(st.data())
def test_threshold_winners_are_those_above_and_the_best(data: st.DataObject) -> None:
    samples, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    values = st.lists(st.integers(0, 5), min_size=channels, max_size=channels)  # small integers: many ties
    g = torch.tensor(data.draw(st.lists(values, min_size=samples, max_size=samples)), dtype=torch.float64)
    threshold, k = data.draw(st.integers(-1, 6)), data.draw(st.integers(1, channels))
    for row, found in zip(g.tolist(), winners_of(g, threshold, k), strict=True):
        assert found == ([c for c, v in enumerate(row) if v > threshold] or [row.index(max(row))])
    assert winners_of(g, float("inf"), k) == active_set(g, k).tolist()


def test_rows_that_are_filled_up_have_no_gain() -> None:
    active, values = torch.tensor([[0, 2, 3], [1, 3, 3]]), torch.tensor([[2.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
    assert channel_gain(values, active, None, 3).tolist() == [[2, 0, 3], [0, 4, 0]]
    assert channel_gain(values, active, torch.tensor([2, -1, 0]), 3).tolist() == [[3, 1, 2], [0, 1, 0]]
    assert active_mask(active, 3).tolist() == [[True, False, True], [False, True, False]]


def test_subsample_is_the_mean_absolute_value_per_channel() -> None:
    x = torch.randn(2, 3, 4, 5)
    wanted = torch.stack([x[:, c].abs().sum((1, 2)) / 20 for c in range(3)], 1)
    torch.testing.assert_close(subsample(x), wanted)
    torch.testing.assert_close(subsample(x.flatten(2).transpose(1, 2), channel_dim=2), wanted)
    torch.testing.assert_close(subsample(x.permute(0, 2, 3, 1), channel_dim=-1), wanted)
    assert torch.equal(subsample(-x[:, :, 0, 0]), x[:, :, 0, 0].abs())


def test_saliency_is_a_rectified_linear_map() -> None:
    s, weight, bias = torch.rand(2, 3), torch.randn(4, 3), torch.randn(4)
    wanted = torch.tensor([[max(0.0, float(weight[c] @ s[b] + bias[c])) for c in range(4)] for b in range(2)])
    torch.testing.assert_close(saliency(s, weight, bias), wanted)


def test_channel_gain_spreads_units_and_leaves_foreign_channels() -> None:
    active, values = torch.tensor([[0, 2], [1, 2]]), torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    assert channel_gain(values, active, None, 3).tolist() == [[2, 0, 3], [0, 4, 5]]
    units = torch.tensor([2, 2, -1, 0, 1])
    assert channel_gain(values, active, units, 3).tolist() == [[3, 3, 1, 2, 0], [5, 5, 1, 0, 4]]


@st.composite
def index_sets(draw: st.DrawFn, channels: int, samples: int) -> Tensor:
    k = draw(st.integers(1, channels))
    rows = [
        sorted(draw(st.lists(st.integers(0, channels - 1), min_size=k, max_size=k, unique=True)))
        for _ in range(samples)
    ]
    return torch.tensor(rows)


@given(st.data())
def test_indexed_convolution_is_the_full_one_cut_down(data: st.DataObject) -> None:
    samples, c_in, c_out = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 5)),
        data.draw(st.integers(1, 6)),
    )
    kernel = data.draw(st.sampled_from([1, 3]))
    stride, dilation = (
        data.draw(st.sampled_from([(1, 1), (2, 1)])),
        data.draw(st.sampled_from([(1, 1), (2, 2)])),
    )
    padding = data.draw(st.sampled_from([(0, 0), (1, 2)]))
    x = torch.randn(samples, c_in, 9, 8, dtype=torch.float64)
    weight = torch.randn(c_out, c_in, kernel, kernel, dtype=torch.float64)
    bias = data.draw(st.sampled_from([None, torch.randn(c_out, dtype=torch.float64)]))
    into, out = data.draw(index_sets(c_in, samples)), data.draw(index_sets(c_out, samples))
    gain = torch.rand(out.shape, dtype=torch.float64)

    narrow = torch.stack([x[b, into[b]] for b in range(samples)])
    found = indexed_conv2d(narrow, weight, bias, into, out, gain, stride, padding, dilation)

    silent = torch.zeros_like(x)
    for b in range(samples):
        silent[b, into[b]] = x[b, into[b]]
    full = F.conv2d(silent, weight, bias, stride, padding, dilation)
    wanted = torch.stack([full[b, out[b]] * gain[b, :, None, None] for b in range(samples)])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_indexed_convolution_of_an_empty_batch() -> None:
    out = indexed_conv2d(
        torch.zeros(0, 2, 8, 8), torch.zeros(5, 4, 3, 3), None,
        torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64), padding=(1, 1),
    )  # fmt: skip
    assert out.shape == (0, 3, 8, 8)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(1, 8))
def test_a_bounded_gain_is_the_gain_within_its_bounds(values: list[float], limit: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    wanted = x.relu().clamp(max=limit)
    assert torch.equal(bounded_gain(x, limit), wanted)
    assert torch.equal(bounded_gain(x.requires_grad_(), limit), wanted)
    assert torch.equal(bounded_gain(x, None), x.relu())


def test_beyond_the_bound_only_the_way_back_has_a_gradient() -> None:
    x = torch.tensor([-1.0, 1.0, 5.0, 5.0, 4.0], requires_grad=True)
    # Descent adds the negative gradient: the third gain is asked to shrink, the last two to grow.
    bounded_gain(x, 4.0).backward(torch.tensor([-2.0, -2.0, 2.0, -2.0, -2.0]))
    assert x.grad is not None and x.grad.tolist() == [0, -2, 2, 0, 0]


def test_straight_through_computes_one_thing_and_differentiates_another() -> None:
    value, source = torch.tensor([3.0, -1.0], requires_grad=True), torch.tensor([0.5, 7.0], requires_grad=True)
    out = straight_through(value, source)
    assert torch.equal(out, value)
    out.backward(torch.tensor([1.0, 2.0]))
    assert value.grad is None and source.grad is not None and source.grad.tolist() == [1, 2]


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize(
    ("channel_dim", "signed", "dtype"), [(1, False, None), (2, True, None), (1, False, torch.float32)]
)
def test_a_subsample_has_the_gradient_of_a_mean(
    rectify: bool, channel_dim: int, signed: bool, dtype: torch.dtype | None
) -> None:
    leaf = torch.randn(2, 5, 4, 3, dtype=torch.float64 if dtype is None else torch.bfloat16).requires_grad_()
    weight = torch.randn(2, leaf.shape[channel_dim])

    def gradients(mean: Any) -> Tensor:
        x = leaf.relu() if rectify else leaf * 1
        return torch.autograd.grad((mean(x) * weight).sum() + x.square().sum(), leaf)[0]

    dims = [d for d in (1, 2, 3) if d != channel_dim]
    wanted = gradients(lambda x: (x if signed else x.abs()).mean(dims, dtype=dtype))
    torch.testing.assert_close(gradients(lambda x: subsample(x, channel_dim, signed, dtype)), wanted)


def test_what_a_rectifier_wrote_is_its_own_magnitude() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    found: dict[bool, Any] = {rectified: subsample(x.relu() if rectified else x).grad_fn for rectified in (True, False)}
    assert {rectified: node.as_it_is for rectified, node in found.items()} == {True: True, False: False}


def test_a_mean_of_values_as_they_are_keeps_no_map() -> None:
    leaf = torch.ones(2, 3, 4, requires_grad=True)
    x = leaf * 1
    s = subsample(x, signed=True)
    x.add_(1)
    assert torch.autograd.grad(s.sum(), leaf)[0].eq(1 / 4).all()


def test_a_subsample_may_be_differentiated_twice() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: subsample(x).square(), x)
    assert torch.autograd.gradcheck(lambda x: subsample(x.relu()), x)


def test_a_subsample_may_be_taken_in_another_type() -> None:
    x = torch.randn(2, 3, 64, 64).bfloat16()
    assert subsample(x, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(subsample(x, dtype=torch.float32), subsample(x.float()))
    assert subsample(x[:, :, 0, 0], dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 3, 4, 5), 1), ((2, 4, 5, 3), -1), ((2, 7, 3), 2), ((2, 3), 1),
                                                   ((0, 3, 4, 5), 1)])  # fmt: skip
def test_the_gradient_of_a_subsample_is_that_of_mean_and_absolute_value(shape: tuple[int, ...],
                                                                        channel_dim: int) -> None:  # fmt: skip
    x = torch.randn(shape, dtype=torch.float64).relu().sub(0.1 * torch.rand(shape).double().round()).requires_grad_()
    dims = [d for d in range(1, x.dim()) if d != channel_dim % x.dim()]
    upstream = torch.randn(shape[0], 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(subsample(x, channel_dim), x, upstream)
    (wanted,) = torch.autograd.grad(x.abs().mean(dims) if dims else x.abs(), x, upstream)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_a_subsample_in_another_type_has_the_type_of_its_input() -> None:
    x = torch.randn(2, 3, 8, 8).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(subsample(x, dtype=torch.float32).sum(), x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), x.detach().float().sgn() / 64)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("lies", ["contiguous", "channels last", "gradient otherwise"])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5)])
def test_scaling_a_batch_norm_keeps_nothing_more(shape: tuple[int, ...], lies: str, affine: bool) -> None:
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5, affine=affine).double().train()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)

    def lay(t: Tensor, last: bool) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if last else t

    x = lay(3 * torch.randn(shape, dtype=torch.float64) + 2, lies == "channels last").requires_grad_()
    gain = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    target = lay(torch.randn(shape, dtype=torch.float64), lies != "contiguous")
    found = []
    for scale in (lambda y: scale_channels(y, gain, 1), lambda y: scale_batch_normed(y, gain, norm.bias)):
        kept: set[int] = set()
        inputs = [x, gain, *norm.parameters()]

        def pack(t: Tensor, kept: set[int] = kept) -> Tensor:
            kept.add(t.untyped_storage().data_ptr() if t.dim() == len(shape) and t.shape == shape else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = scale(norm(x))
        gradients = torch.autograd.grad((out * target).sum(), inputs)
        found.append((out.detach(), gradients, len(kept - {0, target.untyped_storage().data_ptr()})))
    torch.testing.assert_close(found[0][:2], found[1][:2])
    assert found[1][2] < found[0][2]  # the norm's output is not kept


def test_scaling_a_batch_norm_under_autocast() -> None:
    """What the gain gets is that of float32, to the bits of what the norm was given; nothing more is kept."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).train()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    gain = torch.rand(6, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(conv(torch.randn(6, 3, 9, 9)))
        out = scale_batch_normed(y, gain, norm.bias)
    assert out.dtype == y.dtype == torch.bfloat16 and type(out.grad_fn).__name__.startswith("_ScaleNormed")
    target = torch.randn(out.shape).bfloat16()
    found = torch.autograd.grad(out, gain, target, retain_graph=True)[0]
    x = y.grad_fn._saved_input.float()  # type: ignore[union-attr]
    exact = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(found, (exact * target.float()).sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_scaling_a_batch_norm_in_eval_mode() -> None:
    norm, gain = nn.BatchNorm2d(5).eval(), torch.rand(2, 5, requires_grad=True)
    y = norm(torch.randn(2, 5, 3, 3))
    torch.testing.assert_close(scale_batch_normed(y, gain, norm.bias), scale_channels(y, gain, 1))
