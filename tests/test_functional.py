"""The mathematics: winners, gains and the reference convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatedprune.errors import ConfigError
from gatedprune.functional import (
    active_mask,
    active_set,
    channel_gain,
    indexed_conv2d,
    saliency,
    subsample,
    threshold_set,
    where_true,
    winners,
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
    for values, chosen in zip(g.tolist(), active.tolist(), strict=True):
        best = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]  # Python's sort is stable
        assert chosen == sorted(best)


@given(saliencies())
def test_winners_keep_their_value_and_losers_become_zero(drawn: tuple[Tensor, int]) -> None:
    g, k = drawn
    out, active = winners_take_all(g, k), active_set(g, k)
    won = torch.zeros_like(g, dtype=torch.bool).scatter(1, active, True)
    assert torch.equal(out[won], g[won])
    assert not out[~won].any()
    assert out.isfinite().all()


@given(saliencies())
def test_winners_are_the_active_set_as_a_mask(drawn: tuple[Tensor, int]) -> None:
    g, k = drawn
    active = active_set(g, k)
    assert torch.equal(winners(g, k), active_mask(active, g.shape[1]))
    assert torch.equal(where_true(winners(g, k))[:, :k], active)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ConfigError, match=r"winners `k` must be in \[1, 4\]. Got"):
        active_set(torch.ones(2, 4), k)
    with pytest.raises(ConfigError, match=r"winners `k` must be in \[1, 4\]. Got"):
        winners(torch.ones(2, 4), k)


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


def test_a_subsample_may_be_taken_in_another_type() -> None:
    x = torch.randn(2, 3, 64, 64).bfloat16()
    assert subsample(x, dtype=torch.float32).dtype == torch.float32
    torch.testing.assert_close(subsample(x, dtype=torch.float32), subsample(x.float()))
    assert subsample(x[:, :, 0, 0], dtype=torch.float32).dtype == torch.float32
