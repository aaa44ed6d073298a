"""The gate: where it starts, what it ranks, what it remembers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from gatedprune.gates import Gate

IMPORTANCE = torch.tensor([0.3, 2.0, 0.1, 1.1, 0.7])


def chosen(gate: Gate, x: torch.Tensor) -> list[list[int]]:
    wins = gate(x)
    assert gate.last_active is not None and gate.last_wins is wins
    return gate.last_active.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("importance", [None, IMPORTANCE])
def test_every_gain_starts_at_exactly_one(dtype: torch.dtype, importance: torch.Tensor | None) -> None:
    gate = Gate(5, 3, 2, importance=importance, dtype=dtype)
    gate(torch.randn(4, 3, 6, 6, dtype=dtype))
    assert gate.last_gain is not None
    assert gate.last_gain.dtype == dtype
    assert torch.equal(gate.last_gain, torch.ones(4, 2, dtype=dtype))


def test_it_ranks_by_importance_before_training() -> None:
    gate = Gate(5, 3, 2, importance=IMPORTANCE)
    assert chosen(gate, torch.randn(2, 3, 4, 4)) == [[1, 3], [1, 3]]
    assert chosen(Gate(5, 3, 2), torch.randn(1, 3, 4, 4)) == [[0, 1]]


def test_gain_moves_with_the_saliency() -> None:
    gate = Gate(3, 1, 3, importance=torch.tensor([1.0, 2.0, 0.5]))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[0.25], [-5.0], [0.0]]))
        gate.bias[2] += 0.5
    gate(torch.full((1, 1, 2, 2), -1.0))
    assert gate.last_gain is not None
    assert gate.last_saliency is not None
    assert gate.last_saliency.tolist() == [[1.25, 0.0, 1.0]]
    # 1 + g − start, and never negative: 1 + 0 − 2 becomes 0.
    assert gate.last_gain.tolist() == [[1.25, 0.0, 1.5]]


def test_strength_scales_the_gain_and_can_be_trained_from_zero() -> None:
    gate = Gate(3, 1, 3, importance=torch.tensor([1.0, 2.0, 0.5]))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[0.25], [-5.0], [0.0]]))
        gate.strength.fill_(0.5)
    x = torch.full((1, 1, 2, 2), -1.0)
    gate(x)
    assert gate.last_gain is not None
    assert gate.last_gain.tolist() == [[1.125, 0.0, 1.0]]
    with torch.no_grad():
        gate.strength.zero_()
    gate(x)
    assert torch.equal(gate.last_gain, torch.ones(1, 3))
    (-gate.last_gain[0, 0]).backward()
    assert gate.strength.grad is not None
    assert float(gate.strength.grad) == -0.25  # −(g − start) of that channel


def test_a_strength_below_zero_counts_as_zero_and_comes_back() -> None:
    """Otherwise the channels with the largest saliencies would be turned off."""
    gate = Gate(3, 1, 3, importance=torch.tensor([1.0, 2.0, 0.5]))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[0.25], [0.5], [0.0]]))
        gate.strength.fill_(-0.5)
    gate(torch.full((1, 1, 2, 2), 1.0))
    assert gate.last_gain is not None and torch.equal(gate.last_gain, torch.ones(1, 3))
    for direction, grad in ((1, 0.0), (-1, -0.75)):  # descent would lower it further, or raise it
        gate.strength.grad = None
        (direction * gate.last_gain.sum()).backward(retain_graph=True)
        assert gate.strength.grad is not None and float(gate.strength.grad) == grad


def test_a_signed_gate_sees_the_mean() -> None:
    gate = Gate(2, 1, 1, signed=True)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert chosen(gate, x) == [[0], [1]]
    cancels = torch.tensor([2.0, -2.0]).view(1, 1, 1, 2)
    gate(cancels)
    assert gate.last_saliency is not None
    assert gate.last_saliency.tolist() == [[1.0, 1.0]]


def test_different_inputs_choose_different_channels() -> None:
    gate = Gate(2, 2, 1)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(2))
    x = torch.zeros(2, 2, 3, 3)
    x[0, 0], x[1, 1] = -4, 4
    assert chosen(gate, x) == [[0], [1]]


def test_without_boost_the_gain_is_a_mask() -> None:
    gate = Gate(3, 2, 2, boost=False)
    with torch.no_grad():
        gate.weight.normal_()
    gate(torch.randn(5, 2, 3, 3))
    assert gate.last_gain is not None
    assert torch.equal(gate.last_gain, torch.ones(5, 2))


def test_tokens() -> None:
    gate = Gate(4, 3, 2, channel_dim=2)
    with torch.no_grad():
        gate.weight.normal_()
    tokens = torch.randn(2, 7, 3)
    image = Gate(4, 3, 2)
    image.load_state_dict(gate.state_dict())
    assert torch.equal(gate(tokens), image(tokens.transpose(1, 2)))


def test_ratio_is_the_share_of_suppressed_channels() -> None:
    assert Gate(8, 1, 2).ratio == 0.75
    assert Gate(8, 1, 8).ratio == 0


def test_gradients_reach_winners_only() -> None:
    gate = Gate(4, 2, 2, importance=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    gate(torch.rand(3, 2, 5, 5))
    assert gate.last_gain is not None
    gate.last_gain.sum().backward()
    assert gate.bias.grad is not None
    assert gate.weight.grad is not None
    assert gate.bias.grad.tolist() == [0, 0, 3, 3]
    assert gate.weight.grad.any(1).tolist() == [False, False, True, True]


def test_clear_forgets() -> None:
    gate = Gate(4, 2, 2)
    gate(torch.rand(1, 2, 5, 5))
    gate.clear()
    assert gate.last_active is None
    assert gate.last_gain is None
    assert gate.last_saliency is None


def test_copies_and_pickles_after_a_forward_pass() -> None:
    gate = Gate(4, 2, 2, importance=torch.rand(4), boost=True)
    gate(torch.rand(1, 2, 5, 5))  # last_gain is part of a graph now, which cannot be copied
    for other in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert other.last_active is None
        assert other.active_count == 2
        assert torch.equal(other.bias, gate.bias)
        assert other.bias is not gate.bias
        x = torch.rand(3, 2, 5, 5)
        assert torch.equal(other(x), gate(x))
    assert gate.last_active is not None


def test_start_is_kept_in_the_state_dict() -> None:
    gate = Gate(5, 3, 2, importance=IMPORTANCE)
    assert set(gate.state_dict()) == {"weight", "bias", "start", "strength"}
    assert torch.equal(gate.state_dict()["start"], IMPORTANCE)


def bounded(limit: float | None) -> Gate:
    """Of three channels the first has the gain 1 + 8·|x|, the others 1."""
    gate = Gate(3, 1, 3, max_gain=limit)
    with torch.no_grad():
        gate.weight[0] = 8
    return gate


def test_a_bound_holds_and_lets_the_gain_come_back() -> None:
    gate = bounded(4.0)
    gate(torch.ones(1, 1, 2, 2))
    assert gate.last_gain is not None
    assert gate.last_gain.tolist() == [[4, 1, 1]]
    assert torch.equal(gate.select(torch.ones(1, 1))[1], gate.last_gain)
    gate.last_gain.sum().backward()  # asks for smaller gains
    assert gate.weight.grad is not None and gate.weight.grad.flatten().tolist() == [1, 1, 1]
    gate.weight.grad = None
    (-gate.select(torch.ones(1, 1))[1].sum()).backward()  # and for larger ones
    assert gate.weight.grad.flatten().tolist() == [0, -1, -1]
    free = bounded(None)
    free(torch.ones(1, 1, 2, 2))
    assert free.last_gain is not None and free.last_gain.tolist() == [[9, 1, 1]]


def test_straight_through_reaches_losers_in_training_only() -> None:
    gate = Gate(4, 2, 2, importance=torch.tensor([1.0, 2.0, 3.0, 4.0]), straight_through=True)
    gate(torch.rand(3, 2, 5, 5))
    whole = gate.last_whole
    assert whole is not None
    assert torch.equal(whole[:, 2:], torch.ones(3, 2)) and 0 < float(whole.detach()[:, :2].max()) < 1e-30
    whole.sum().backward()
    assert gate.bias.grad is not None and gate.bias.grad.tolist() == [3, 3, 3, 3]
    with torch.no_grad():
        gate(torch.rand(3, 2, 5, 5))
    assert gate.last_whole is None
    gate.eval()(torch.rand(3, 2, 5, 5))
    assert gate.last_whole is None


def test_straight_through_teaches_a_gate_without_a_gain() -> None:
    gate = Gate(3, 2, 1, boost=False, straight_through=True)
    gate(torch.rand(2, 2, 5, 5))
    assert gate.last_whole is not None
    gate.last_whole.sum().backward()
    assert gate.bias.grad is not None and gate.bias.grad.tolist() == [2, 2, 2]


def test_what_never_gets_a_gradient_asks_for_none() -> None:
    """DistributedDataParallel waits for the gradient of every parameter that asks for one."""
    assert Gate(3, 2, 1).strength.requires_grad
    assert not Gate(3, 2, 1, boost=False).strength.requires_grad


def test_saliencies_keep_their_precision_under_autocast() -> None:
    gate = Gate(64, 16, 32)
    with torch.no_grad():
        gate.weight.normal_(std=1e-4)  # as rounded to bfloat16, all saliencies would be 1
    x = torch.rand(4, 16, 8, 8).bfloat16()
    wanted = gate(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate(x)
    assert gate.last_saliency is not None and gate.last_saliency.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not found[:, :32].all()


def test_a_predictor_of_low_rank_is_the_product_of_its_matrices() -> None:
    gate, whole = (Gate(6, 5, 2, rank=r, dtype=torch.float64) for r in (2, None))
    assert gate.reduce is not None and whole.reduce is None
    assert gate.weight.shape == (6, 2) and gate.reduce.shape == (2, 5) and "rank=2" in repr(gate)
    assert not gate.weight.any() and not gate.predictor.any()  # the same ranking for every input, and gain 1, at first
    torch.testing.assert_close(gate.reduce @ gate.reduce.T, 2.5 * torch.eye(2, dtype=torch.float64))
    with torch.no_grad():
        gate.weight.normal_()
    whole.set_predictor(gate.predictor)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64)
    assert torch.equal(gate(x), whole(x))
    torch.testing.assert_close(gate.last_saliency, whole.last_saliency)
    torch.testing.assert_close(gate.last_gain, whole.last_gain)
    gate.last_gain.sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any() and gate.reduce.grad.any()


@pytest.mark.parametrize("rank", [1, 3])
def test_it_takes_the_nearest_matrix_of_its_rank(rank: int) -> None:
    torch.manual_seed(0)
    gate = Gate(7, 6, 2, rank=rank, dtype=torch.float64)
    phi, seen = torch.randn(7, 6, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    for columns in (None, seen):
        gate.set_predictor(phi, columns)
        target = phi if columns is None else phi @ columns
        found = gate.predictor if columns is None else gate.predictor @ columns
        left = torch.linalg.svdvals(target)[rank:].square().sum()  # Eckart and Young
        torch.testing.assert_close((found - target).square().sum(), left)
    start = Gate(7, 6, 2, rank=rank, dtype=torch.float64).state_dict()
    gate.set_predictor(torch.zeros_like(phi))
    assert torch.equal(gate.weight, start["weight"]) and torch.equal(gate.reduce, start["reduce"])
    gate.set_predictor(phi[:, :1] @ phi[:1])  # of less than its rank
    torch.testing.assert_close(gate.predictor, phi[:, :1] @ phi[:1])
