"""Threads that trace wait for those that run, and those for them; nobody waits for itself."""

from __future__ import annotations

import threading
import time

import pytest

from gatedprune.sites.turns import Turns


def in_thread(run: object) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_one_thread_inside_itself() -> None:
    turns, done = Turns(), []

    def run() -> None:
        with turns.running(), turns.running(), turns.tracing(), turns.running(), turns.tracing():
            done.append(True)
        with turns.tracing(), turns.running():
            done.append(True)

    in_thread(run).join(5)
    assert len(done) == 2
    assert turns._running == turns._waiting == turns._depth == 0 and turns._tracer is None


def test_tracing_excludes_the_others() -> None:
    turns, inside, wrong = Turns(), {"run": 0, "trace": 0}, []

    def work(kind: str) -> None:
        for _ in range(40):
            with turns.running() if kind == "run" else turns.tracing():
                inside[kind] += 1
                if inside["trace"] > 1 or (inside["trace"] and inside["run"]):
                    wrong.append(dict(inside))
                time.sleep(0.0005)
                inside[kind] -= 1

    threads = [in_thread(lambda kind=kind: work(kind)) for kind in ("run", "run", "trace", "trace")]
    for thread in threads:
        thread.join(30)
    assert not wrong and not any(t.is_alive() for t in threads)


def test_those_that_run_do_so_together_and_let_a_tracer_in() -> None:
    turns, both, traced = Turns(), threading.Barrier(2, timeout=5), []

    def run() -> None:
        for _ in range(3):
            with turns.running():
                both.wait()  # breaks unless two are inside

    def trace_from_inside() -> None:
        with turns.running():
            both.wait()
            with turns.tracing():  # each would wait for the other's block, if that counted
                traced.append(True)

    for target in (run, trace_from_inside):
        threads = [in_thread(target) for _ in range(2)]
        for thread in threads:
            thread.join(10)
        assert not any(t.is_alive() for t in threads) and not both.broken
    assert len(traced) == 2


def test_errors_leave_no_turn_behind() -> None:
    turns = Turns()
    for turn in (turns.running, turns.tracing):
        with pytest.raises(KeyError), turn():
            raise KeyError
    with turns.tracing():
        pass
    assert turns._running == turns._depth == 0
