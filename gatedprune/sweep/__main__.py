"""`python -m gatedprune.sweep`: all of timm, one model at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import timm
import torch

from ..measure.environment import checkout_commit
from .catalogue import Entry, catalogue, smallest
from .jobs import architecture_job, family_job, warm_up
from .page import families_page
from .runner import Job, Record, Table, run_all

DATA = Path("docs/data")
PAGE = Path("docs/families.md")


class _Shard(click.ParamType):
    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        index, _, count = str(value).partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            self.fail(f"{value!r} is no shard such as 0/4: number (from 0) and how many there are", param, ctx)
        return int(index), int(count)


@click.group()
def main() -> None:
    """Run the library over all of timm, and make docs/families.md of what came out.

    From the root of the checkout:

    \b
      python -m gatedprune.sweep families                      smallest model of each family, contract suite
      python -m gatedprune.sweep architectures --shard 0/2     find_sites on every architecture, every other one
      python -m gatedprune.sweep page                          docs/families.md from the tables

    A sweep goes on where it was stopped. Rows are JSON lines in docs/data.
    """


def _options(limit: float) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for name, settings in (
            ("--data", {"type": click.Path(path_type=Path), "default": DATA, "help": "Folder of the tables."}),
            ("--seconds", {"default": limit, "help": "Time limit for each model."}),
            ("--memory", {"default": 16.0, "help": "Memory limit for each model, in GiB (on Linux)."}),
            ("--shard", {"type": _Shard(), "default": "0/1", "help": "Run every N-th model, from the I-th."}),
            ("--only", {"default": "*", "help": "Models or families whose name fits this pattern."}),
            ("--again", {"is_flag": True, "help": "Run also what has a row already."}),
            ("--failed", {"is_flag": True, "help": "Run again what failed or ran out of time."}),
        ):
            command = click.option(name, show_default=True, **settings)(command)
        return command

    return add


@main.command()
@_options(300.0)
def families(**options: Any) -> None:
    """The contract suite on the smallest model of each family."""
    _sweep("families", family_job, smallest, **options)


@main.command()
@_options(120.0)
def architectures(**options: Any) -> None:
    """`find_sites` on every architecture."""
    _sweep("architectures", architecture_job, list, **options)


@main.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), default=DATA, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=PAGE, show_default=True)
def page(data: Path, out: Path) -> None:
    """Sort the tables and write docs/families.md."""
    for name in ("families", "architectures"):
        if (data / f"{name}.jsonl").exists():
            Table(data / f"{name}.jsonl").tidy()
    out.write_text(families_page(data), encoding="utf-8")
    click.echo(f"wrote {out}")


def _sweep(name: str, job: Job, choose: Callable[[list[Entry]], list[Entry]], *, data: Path, seconds: float,
           memory: float, shard: tuple[int, int], only: str, again: bool, failed: bool) -> None:  # fmt: skip
    data.mkdir(parents=True, exist_ok=True)
    table = Table(data / f"{name}.jsonl")
    entries = choose(catalogue(data / "timm.json"))[shard[0] :: shard[1]]
    chosen = [e for e in entries if fnmatchcase(e.model, only) or fnmatchcase(e.family, only)]
    if failed:
        rows, again = table.rows(), True
        chosen = [e for e in chosen if e.model in rows and not _succeeded(rows[e.model])]
    warm_up()
    count = run_all(job, chosen, table, seconds=seconds, gibibytes=memory, facts=_versions(), again=again,
                    report=_Progress())  # fmt: skip
    click.echo(f"{count} run, {len(chosen) - count} of {len(chosen)} were done before; rows in {table.path}")


def _succeeded(row: Record) -> bool:
    checks = row.get("checks", {}).values()
    return "error" not in row and all(c["outcome"] in ("pass", "left out") for c in checks)


class _Progress:
    """A line for each model that is done: how many there are, and how long the rest takes at this pace."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    def __call__(self, row: Record, done: int, of: int) -> None:
        left = (time.monotonic() - self.begun) / done * (of - done)
        checks = row.get("checks", {})
        bad = [
            f"{name} {found['outcome']}" for name, found in checks.items() if found["outcome"] in ("fail", "no time")
        ]
        parts = [
            f"{done:>{len(str(of))}}/{of}, {timedelta(seconds=round(left))} left",
            f"{row['family']:24} {row['model']:40}",
            f"{row.get('sites', '–'):>4} sites",
            f"{row['seconds']:6.1f} s",
        ]
        click.echo("  ".join([*parts, row.get("error", "")[:200], ", ".join(bad)]).rstrip())


def _versions() -> Record:
    # Of the sources: the sweep itself changes the tables, which lie in the same repository.
    commit = checkout_commit(within=str(Path(__file__).resolve().parents[1])) or "unknown"
    changed = "-dirty" if commit.endswith("+") else ""
    return {"commit": commit[:10] + changed, "timm": timm.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    main()
