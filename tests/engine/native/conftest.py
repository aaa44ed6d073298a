"""Every test here runs once with each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gatedprune.engine import native
from gatedprune.errors import BackendError


def _sets() -> list[str]:
    if not native.load():
        return [""]
    best, found = native.instruction_set(), []
    for name in ("generic", "avx2", "avx512"):
        try:
            found.append(native.instruction_set(name))
        except BackendError:
            continue
    native.instruction_set(best)
    return found


@pytest.fixture(params=_sets(), scope="module", autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.instruction_set()
    yield native.instruction_set(request.param)
    native.instruction_set(before)
