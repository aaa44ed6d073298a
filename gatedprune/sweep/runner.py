"""One model, one process, one time limit, one line in a table that can be continued."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Job", "Record", "Report", "Table", "run_all", "run_one"]

Record = dict[str, Any]
Tell = Callable[[Record], None]
Job = Callable[[Any, Tell], None]  # (what to do, tell(facts)): facts told before a limit strikes are kept
Report = Callable[[Record, int, int], None]  # (new row, how many are done, of how many)
_LARGE_GIB, _SPARE_GIB = 2.0, 1.0  # a process above the first is ended when the machine has less left than the second
_LOOK_S = 0.2  # how often the memory of a process is looked at; one that fills grows by less than 1 GiB meanwhile


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


def run_one(job: Job, item: Any, seconds: float, gibibytes: float = math.inf) -> Record:
    """Do ``job(item, tell)`` in a process of its own: what it told, ``seconds`` and, where it failed, ``error``.

    The process is ended after that many seconds, and (on Linux) where more memory than ``gibibytes`` is resident, or it
    is large and the machine has next to none left.
    """
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
            if left <= 0:
                found["error"] = f"no result within {seconds:.0f} s"
                break
            held = _resident(process.pid)
            if held > gibibytes or (held > _LARGE_GIB and _available() < _SPARE_GIB):
                found["error"] = f"no result within {min(held, gibibytes):.3g} GiB of memory"
                break
            if not here.poll(min(left, _LOOK_S)):
                continue
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


def _resident(pid: int | None) -> float:
    """GiB of memory that a process holds, shared pages included; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _available() -> float:
    """GiB of memory that the machine can still give; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((int(x.split()[1]) / 2**20 for x in lines if x.startswith("MemAvailable:")), math.inf)


def _child(job: Job, item: Any, pipe: Connection) -> None:
    try:
        job(item, pipe.send)
    except Exception as error:  # noqa: BLE001  a sweep reports whatever goes wrong, and goes on
        pipe.send({"error": f"{type(error).__name__}: {error}"[:1000]})
    pipe.send(None)


def run_all(job: Job, items: Iterable[Any], table: Table, *, seconds: float, facts: Record,
            gibibytes: float = math.inf, again: bool = False,
            report: Report = lambda row, done, of: None) -> int:  # fmt: skip
    """Run the job on every item that has no row yet; returns how many were run.

    Args:
        job: See `Job`.
        items: `Entry` objects.
        table: Where rows are, and go.
        seconds: Time limit for each. gibibytes: memory limit for each.
        facts: Added to every row: versions, commit.
        again: Run also what has a row.
        report: Called with each new row.
    """
    count, before = 0, table.rows()
    waiting = [item for item in items if again or item.model not in before]
    for number, item in enumerate(waiting, 1):
        if not again and item.model in table.rows():  # looked up each time: another shard may have done it
            continue
        row = {"model": item.model, "family": item.family, "parameters": item.parameters, **facts}
        row.update(run_one(job, item, seconds, gibibytes))
        table.append(row)
        report(row, number, len(waiting))
        count += 1
    return count
