"""One model, one process, one time limit, one line in a table that can be continued."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Job", "Record", "Table", "run_all", "run_one"]

Record = dict[str, Any]
Tell = Callable[[Record], None]
Job = Callable[[Any, Tell], None]  # (what to do, tell(facts)): facts told before a time limit strikes are kept


class Table:
    """Rows by model, as JSON lines: appended to in one write each, the last row of a model counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> dict[str, Record]:
        """Model → row. A line that a crash cut off is passed over."""
        found: dict[str, Record] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["model"]] = row
        return found

    def append(self, row: Record) -> None:
        """Add a row: one write to the end of the file, so that shards may share it."""
        text = json.dumps(row, ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
                text = "\n" + text
            os.write(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def tidy(self) -> None:
        """Rewrite the file: one row a model, sorted by family and model. Not while a sweep is writing."""
        rows = sorted(self.rows().values(), key=lambda r: (r["family"], r["model"]))
        scratch = self.path.with_suffix(".part")
        scratch.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
        os.replace(scratch, self.path)


def run_one(job: Job, item: Any, seconds: float) -> Record:
    """Do ``job(item, tell)`` in a process of its own: what it told, ``seconds`` and, where it failed, ``error``."""
    # Forked, so that importing torch is paid once. The parent runs only operators on
    # the meta device and on a handful of numbers, hence has no thread pool to lose.
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    begun = time.monotonic()
    process = context.Process(target=_child, args=(job, item, there), daemon=True)
    process.start()
    there.close()
    found: Record = {}
    try:
        while True:
            left = begun + seconds - time.monotonic()
            if left <= 0 or not here.poll(left):
                found["error"] = f"no result within {seconds:.0f} s"
                break
            facts = here.recv()
            if facts is None:
                break
            found.update(facts)
    except EOFError:
        process.join()
        found["error"] = f"the process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    found["seconds"] = round(time.monotonic() - begun, 1)
    return found


def _child(job: Job, item: Any, pipe: Connection) -> None:
    try:
        job(item, pipe.send)
    except Exception as error:  # noqa: BLE001  a sweep reports whatever goes wrong, and goes on
        pipe.send({"error": f"{type(error).__name__}: {error}"[:1000]})
    pipe.send(None)


def run_all(job: Job, items: Iterable[Any], table: Table, *, seconds: float, facts: Record, again: bool = False,
            report: Callable[[Record], None] = lambda row: None) -> int:  # fmt: skip
    """Run the job on every item that has no row yet; returns how many were run.

    Args:
        job: See `Job`.
        items: `Entry` objects.
        table: Where rows are, and go.
        seconds: Time limit for each.
        facts: Added to every row: versions, commit.
        again: Run also what has a row.
        report: Called with each new row.
    """
    count = 0
    for item in items:
        if not again and item.model in table.rows():  # looked up each time: another shard may have done it
            continue
        row = {"model": item.model, "family": item.family, "parameters": item.parameters, **facts}
        row.update(run_one(job, item, seconds))
        table.append(row)
        report(row)
        count += 1
    return count
