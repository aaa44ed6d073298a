"""Gradients written by hand: those of plain PyTorch, or where they stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatedprune.functional import (
    gain_of,
    scale_batch_normed,
    scale_channels,
    straight_through,
    subsample,
)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(-1, 3), st.floats(1, 8) | st.none())
def test_a_gain_is_within_its_bounds(values: list[float], strength: float, limit: float | None) -> None:
    g, sigma = torch.tensor([values], dtype=torch.float64), torch.tensor(strength, dtype=torch.float64)
    start = torch.linspace(0, 2, len(values), dtype=torch.float64)
    wanted = (1 + max(strength, 0) * (g - start)).clamp(0, limit)
    assert torch.equal(gain_of(g, sigma, start, limit), wanted)
    assert torch.equal(gain_of(g.requires_grad_(), sigma, start, limit), wanted)


def test_the_gradient_of_a_gain_within_its_bounds() -> None:
    g = (torch.rand(4, 3, dtype=torch.float64) + 1).requires_grad_()
    strength = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for limit in (4.0, None):
        assert torch.autograd.gradcheck(lambda g, s, m=limit: gain_of(g, s, torch.ones(3).double(), m), (g, strength))


def test_beyond_the_bound_only_the_way_back_has_a_gradient() -> None:
    g = torch.tensor([[-2.0, 0.0, 4.0, 4.0, 3.0]], requires_grad=True)  # gains of −1, 1, 5, 5, 4
    # Descent adds the negative gradient: the third gain is asked to shrink, the last two to grow.
    gain = gain_of(g, torch.tensor(1.0), torch.zeros(5), 4.0)
    gain.backward(torch.tensor([[-2.0, -2.0, 2.0, -2.0, -2.0]]))
    assert g.grad is not None and g.grad.tolist() == [[0, -2, 2, 0, 0]]


@pytest.mark.parametrize("strength", [-1.0, 0.0, 2.0])
def test_at_and_below_zero_a_strength_has_the_gradient_of_the_way_back(strength: float) -> None:
    for direction in (3.0, -3.0):
        sigma = torch.tensor(strength, requires_grad=True)
        gain_of(torch.tensor([[1.0]]), sigma, torch.zeros(1), None).backward(torch.tensor([[direction]]))
        wanted = direction if strength > 0 or direction < 0 else 0
        assert sigma.grad is not None and float(sigma.grad) == wanted


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
    assert out.dtype == y.dtype == torch.bfloat16 and type(out.grad_fn).__name__.startswith("ScaleNormed")
    target = torch.randn(out.shape).bfloat16()
    found = torch.autograd.grad(out, gain, target, retain_graph=True)[0]
    x = y.grad_fn._saved_input.float()  # type: ignore[union-attr]
    exact = nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    torch.testing.assert_close(found, (exact * target.float()).sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_scaling_a_batch_norm_in_eval_mode() -> None:
    norm, gain = nn.BatchNorm2d(5).eval(), torch.rand(2, 5, requires_grad=True)
    y = norm(torch.randn(2, 5, 3, 3))
    torch.testing.assert_close(scale_batch_normed(y, gain, norm.bias), scale_channels(y, gain, 1))


@pytest.mark.parametrize("overwrite", [None, F.relu_, lambda p: F.relu6(p, inplace=True)])
def test_scaling_keeps_the_product_alone(overwrite: Callable[[Tensor], Tensor] | None) -> None:
    """A rectifier may write over it; where the gain is 0 it gets no gradient."""
    x = 4 * torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    gain, target = torch.rand(3, 5, dtype=torch.float64), torch.randn(x.shape, dtype=torch.float64)
    gain[0, 1] = gain[2, 3] = 0
    gain.requires_grad_()
    found = []
    for fate in ("rectified" if overwrite else "kept", None):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            product = scale_channels(x, gain, 1, fate)
        out = product if overwrite is None else overwrite(product if fate else product.clone())
        gradients = torch.autograd.grad((out * target).sum(), (x, gain))
        found.append((out.detach(), gradients[0], gradients[1] * (gain > 0)))
        assert any(t.data_ptr() == x.data_ptr() for t in kept) == (fate is None)
    torch.testing.assert_close(found[0], found[1])


def test_writing_over_a_kept_product_is_an_error() -> None:
    x, gain = torch.randn(3, 5, 4), torch.rand(3, 5, requires_grad=True)
    out = F.silu(scale_channels(x, gain, 1, "kept"), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_several_rows_for_each_sample_and_channels_last() -> None:
    x, gain = torch.randn(6, 7, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    wanted, found = (torch.autograd.grad(scale_channels(x, gain, 2, f), gain, upstream) for f in (None, "kept"))
    torch.testing.assert_close(found, wanted)
