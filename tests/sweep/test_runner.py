"""A sweep's bookkeeping: one process each, time limits, tables that survive crashes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from gatedprune.sweep import Entry, Table, run_all, runner
from gatedprune.sweep.runner import Tell, _resident, run_one

A, B = Entry("a", "one", 1), Entry("b", "two", 2)


def well(item: Any, tell: Tell) -> None:
    tell({"sites": 3})
    tell({"left": 0.5})


def slow(item: Any, tell: Tell) -> None:
    tell({"sites": 3})
    time.sleep(30)


def broken(item: Any, tell: Tell) -> None:
    tell({"sites": 3})
    raise ValueError("no good")


def killed(item: Any, tell: Tell) -> None:
    tell({"sites": 3})
    os._exit(7)


def greedy(item: Any, tell: Tell) -> None:
    tell({"sites": 3})
    held = []
    while True:
        held.append(b"1" * 2**24)  # written to, hence resident
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say how much memory is held")
def test_a_process_that_takes_too_much_memory_is_ended() -> None:
    limit = 0.5 + _resident(os.getpid())
    row = run_one(greedy, A, 60.0, limit)
    assert row["error"] == f"no result within {limit:.3g} GiB of memory" and row["sites"] == 3 and row["seconds"] < 30
    assert "error" not in run_one(well, A, 60.0, limit)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say how much memory there is")
def test_a_large_process_is_ended_before_the_machine_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < runner._available() < 2**20
    monkeypatch.setattr(runner, "_LARGE_GIB", 0.2 + _resident(os.getpid()))
    monkeypatch.setattr(runner, "_available", lambda: 0.5)
    assert "GiB of memory" in run_one(greedy, A, 60.0)["error"]
    assert "error" not in run_one(well, A, 60.0)


@pytest.mark.parametrize(
    ("job", "error"),
    [(well, None), (slow, "no result within 1 s"), (broken, "ValueError: no good"), (killed, "exit code 7")],
)
def test_what_a_process_told_is_kept_whatever_its_end(job: Any, error: str | None) -> None:
    row = run_one(job, A, 1.0)
    assert row["sites"] == 3 and 0 <= row["seconds"] < 5
    assert ("error" not in row) if error is None else error in row["error"]
    assert ("left" in row) == (job is well)


def test_a_sweep_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    table, seen = Table(tmp_path / "t.jsonl"), []
    assert run_all(well, [A], table, seconds=5, facts={"commit": "c"}) == 1
    assert run_all(well, [A, B], table, seconds=5, facts={}, report=lambda *told: seen.append(told)) == 1
    assert [(row["model"], done, of) for row, done, of in seen] == [("b", 1, 1)]
    assert table.rows()["a"] | {"seconds": 0} == {
        "model": "a", "family": "one", "parameters": 1, "commit": "c", "sites": 3, "left": 0.5, "seconds": 0,
    }  # fmt: skip
    assert run_all(well, [A, B], table, seconds=5, facts={"commit": "d"}, again=True) == 2
    assert table.rows()["a"]["commit"] == "d"  # the last row counts


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "t.jsonl")
    run_all(well, [B, A], table, seconds=5, facts={})
    table.path.write_bytes(table.path.read_bytes()[:-10])
    assert list(table.rows()) == ["b"]
    assert run_all(well, [B, A], table, seconds=5, facts={}) == 1
    assert sorted(table.rows()) == ["a", "b"]
    table.tidy()
    assert [r["model"] for r in table.rows().values()] == ["a", "b"]
    assert len(table.path.read_text().splitlines()) == 2
