"""Gates, and what later layers ask of their choices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.engine import native
from gatedprune.engine.selection import ChannelGain, ChannelIndex
from gatedprune.functional import subsample
from gatedprune.gates import Gate

from .cases import CLOSE, FUZZ, on_threads, ops, subsets

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    with on_threads(threads):
        active, gain = ops.gate(
            s, weight, bias, torch.zeros(channels), torch.ones(()), index, channels, True, None, None, reduce
        )
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
