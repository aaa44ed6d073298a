"""Memory that a recorded program keeps from run to run: nobody else's is overwritten, and little is kept."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedprune import compact, wrap
from gatedprune.engine import CompactModel, native
from gatedprune.measure import measure_memory

pytestmark = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")

# Results of 1 MiB: larger than what is left to PyTorch's allocator.
CHANNELS, SIDE = 16, 128


@pytest.fixture(scope="module")
def fast() -> CompactModel:
    torch.manual_seed(0)
    layers = [
        m for _ in range(3) for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    ]
    return compact(wrap(nn.Sequential(*layers).eval(), example_inputs=images()), images())


def images(batch: int = 1) -> Tensor:
    return torch.randn(batch, CHANNELS, SIDE, SIDE)


def recorded(fast: CompactModel, x: Tensor) -> Callable[[Tensor], Tensor]:
    fast(x)
    program = fast._programs.find(fast._programs.key((x,)))
    assert program is not None
    return program


def test_results_are_not_overwritten(fast: CompactModel) -> None:
    run, inputs = recorded(fast, images()), [images() for _ in range(4)]
    kept = [run(x) for x in inputs]
    assert len({y.data_ptr() for y in kept}) == len(kept)
    for x, y in zip(inputs, kept, strict=True):
        torch.testing.assert_close(y, fast.prepare(x)(x), rtol=0, atol=0)


def test_memory_is_used_again(fast: CompactModel) -> None:
    run, x = recorded(fast, images()), images()
    places = set()
    for _ in range(8):
        y = run(x)
        places.add(y.data_ptr())
        del y
    assert len(places) <= 3  # one would be too strict: the smallest block that fits is taken


def test_what_was_in_it_is_not_seen(fast: CompactModel) -> None:
    run, x = recorded(fast, images()), images()
    wanted = run(x).clone()
    with torch.inference_mode():
        run(torch.full_like(x, torch.nan))  # every block holds NaN now
    torch.testing.assert_close(run(x), wanted, rtol=0, atol=0)


def test_results_outlive_the_model() -> None:
    def made() -> tuple[Tensor, Tensor]:
        model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1)).eval()
        short = compact(wrap(model, example_inputs=images()), images())
        y = recorded(short, images())(images())
        return y, y.clone()

    y, wanted = made()
    gc.collect()
    assert torch.equal(y, wanted)
    assert torch.equal(y.add_(1), wanted + 1)


def test_what_it_takes_is_counted(fast: CompactModel) -> None:
    x = images(4)
    graph = fast.prepare(x)
    recorded(fast, x)
    assert measure_memory(fast, x).working == pytest.approx(measure_memory(graph, x).working, rel=0.05)


def test_threads_do_not_share_blocks(fast: CompactModel) -> None:
    run, inputs = recorded(fast, images()), [images() for _ in range(4)]
    wanted: list[Any] = [run(x).clone() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(inputs[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
