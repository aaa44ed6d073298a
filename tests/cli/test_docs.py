"""docs/cli.md names every command and every option, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from gatedprune.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
OPTION = re.compile(r"--[a-z][a-z-]*")


def sections() -> dict[str, str]:
    """Command → its part of the page."""
    parts = re.split(r"^## `gatedprune (\w+) MODEL`$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(command: click.Command) -> set[str]:
    found = {name for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)}
    return found - {"--help", "-h"}


def test_every_command_has_a_section() -> None:
    assert set(sections()) == set(main.commands)
    table = PAGE.read_text(encoding="utf-8").partition("## ")[0]
    assert set(re.findall(r"^\| \[`(\w+)`\]", table, re.MULTILINE)) == set(main.commands)


@pytest.mark.parametrize("name", main.commands)
def test_a_section_names_the_options_of_its_command(name: str) -> None:
    text = re.sub(r"^```bash.*?^```$", "", sections()[name], flags=re.MULTILINE | re.DOTALL)
    rows = "\n".join(line.split("|")[1] for line in text.splitlines() if line.startswith("|"))
    assert set(OPTION.findall(rows)) == options(main.commands[name])


@pytest.mark.parametrize("name", main.commands)
def test_help_teaches_by_example_and_speaks_of_every_option(name: str) -> None:
    command = main.commands[name]
    text = command.get_help(click.Context(command, info_name=name))
    assert re.search(rf"^ +gatedprune {name} \w+", text, re.MULTILINE), "an example"
    for option in command.params:
        assert isinstance(option, click.Argument) or getattr(option, "help", None), option.name
    for example in re.findall(rf"^ +gatedprune {name} (.*)$", text, re.MULTILINE):
        assert set(OPTION.findall(example)) <= options(command), example


def test_every_command_takes_json_and_names_things_alike() -> None:
    meanings: dict[str, set[str]] = {}
    for command in main.commands.values():
        assert "--json" in options(command)
        for parameter in command.params:
            for name in parameter.opts if isinstance(parameter, click.Option) else ():
                meanings.setdefault(name, set()).add(type(parameter.type).__name__)
    # Several sizes, ratios, batches and threads at once are what bench is for; compare takes several ratios, and
    # finetune the names of data sets.
    several = {"--ratio", "--batch", "--threads", "--json", "--data"}
    assert {name for name, kinds in meanings.items() if len(kinds) > 1} <= several
