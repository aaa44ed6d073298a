"""Tracing takes turns with running: while `torch.export` traces in one thread, it meets the module calls of all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TURNS", "Turns"]


class Turns:
    """One thread traces, or any number run. A thread may do either inside the other, as hooks of a model do."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0  # blocks of all threads, but for threads that wait to trace
        self._waiting = 0  # threads that do
        self._tracer: int | None = None
        self._depth = 0
        self._own = threading.local()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While nobody traces, or this thread does."""
        me, own = threading.get_ident(), getattr(self._own, "blocks", 0)
        with self._changed:
            self._changed.wait_for(lambda: self._tracer == me or (self._tracer is None and (own or not self._waiting)))
            self._running += 1
        self._own.blocks = own + 1
        try:
            yield
        finally:
            self._own.blocks = own
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While no other thread traces or runs."""
        me, own = threading.get_ident(), getattr(self._own, "blocks", 0)
        with self._changed:
            self._running -= own  # its own blocks run nothing meanwhile
            self._waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._tracer in (None, me) and not self._running)
                self._tracer = me
                self._depth += 1
            except BaseException:  # an interrupt
                self._running += own
                raise
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        self._own.blocks = 0
        try:
            yield
        finally:
            self._own.blocks = own
            with self._changed:
                self._depth -= 1
                if not self._depth:
                    self._tracer = None
                self._running += own
                self._changed.notify_all()


TURNS = Turns()
