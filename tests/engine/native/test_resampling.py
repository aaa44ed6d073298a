"""Max pooling and bilinear interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gatedprune.engine import native

from .cases import FUZZ, on_threads, ops

if not native.load():
    pytest.skip(f"no native engine here: {native.build_error()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
    with on_threads(threads):
        found = ops.upsample_bilinear2d(x.transpose(2, 3).contiguous().transpose(2, 3), to, corners,
                                        factors if by_factors else None)  # fmt: skip
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
