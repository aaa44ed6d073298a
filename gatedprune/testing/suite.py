"""The named list of checks, and how to run them: at once, or each as a test of pytest's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .case import Case
from .choice import (
    check_deterministic,
    check_exactly_k,
    check_gates_see_channels,
    check_identity,
    check_macs_fall,
    check_samples_independent,
)
from .equivalence import check_compact_float32, check_compact_float64, check_static
from .restoring import check_state_dicts, check_unwrap
from .training import check_gradients, check_training_steps

__all__ = ["CHECKS", "Check", "check_model", "parametrize_checks"]

Check = Callable[[Case], "str | None"]

CHECKS: dict[str, Check] = {
    "identity": check_identity,
    "gates_see_channels": check_gates_see_channels,
    "exactly_k": check_exactly_k,
    "static": check_static,
    "compact_float64": check_compact_float64,
    "compact_float32": check_compact_float32,
    "samples_independent": check_samples_independent,
    "deterministic": check_deterministic,
    "gradients": check_gradients,
    "training_steps": check_training_steps,
    "state_dicts": check_state_dicts,
    "macs_fall": check_macs_fall,
    "unwrap": check_unwrap,  # last: the others share the wrapped model that it takes apart
}


def check_model(
    make: Callable[[], nn.Module] | Case,
    inputs: Any = None,
    *,
    checks: Iterable[str] | None = None,
    **options: Any,
) -> dict[str, str]:
    """Run the contract suite on a model: `check_model(lambda: timm.create_model("resnet18"), ratio=0.5)`.

    Args:
        make: Returns a fresh dense model at every call, or a `Case`.
        inputs: As in `Case`.
        checks: Names from `CHECKS`; default: all.
        **options: As in `Case`: ``ratio``, ``stream``, ``oracle``, the fields of `GateConfig`.

    Returns:
        Check → its note: how it compared, or what it measured. Empty notes included.

    Raises:
        AssertionError: A check failed. All of them run first; the message names each that failed, and the
            site.
    """
    case = make if isinstance(make, Case) else Case(make, inputs, **options)
    notes: dict[str, str] = {}
    failures: list[str] = []
    for name, check in _chosen(checks).items():
        try:
            notes[name] = check(case) or ""
        except AssertionError as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(failures) + len(notes)} checks failed:\n" + "\n".join(failures))
    return notes


def parametrize_checks(
    cases: Iterable[Case],
    checks: Iterable[str] | None = None,
    marks: Mapping[tuple[str, str], Any] | None = None,
) -> Any:
    """A pytest decorator: every case × every check, as arguments ``case`` and ``check`` of a test.

        @parametrize_checks([Case(lambda: timm.create_model("resnet18"), name="resnet18")])
        def test_contract(case, check):
            check(case)

    Args:
        cases: What to check. Give each a ``name``: it becomes part of the test's id.
        checks: Names from `CHECKS`; default: all.
        marks: (case name, check name) → a pytest mark, for what is known to fail.
    """
    import pytest

    parameters = [
        pytest.param(case, check, id=f"{case.label}-{name}", marks=(marks or {}).get((case.label, name), ()))
        for case in cases
        for name, check in _chosen(checks).items()
    ]
    return pytest.mark.parametrize(("case", "check"), parameters)


def _chosen(names: Iterable[str] | None) -> dict[str, Check]:
    if names is None:
        return CHECKS
    names = list(names)
    unknown = [n for n in names if n not in CHECKS]
    if unknown:
        raise ValueError(f"Unknown checks: {', '.join(unknown)}. Known: {', '.join(CHECKS)}.")
    return {n: CHECKS[n] for n in names}
