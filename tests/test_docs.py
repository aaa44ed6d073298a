"""The docs keep their word: code runs, commands are those that CI runs, every public name is described."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
from pathlib import Path

import pytest

import gatedprune

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# Folders of particular machines: a home, a checkout, a virtual environment. Written so as not to match
# itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:wor[k]|opt/g[p]|hom[e]|roo[t]|User[s])/|bash_job[s]|[.]librar[y]/")
TEXT_SUFFIXES = {".py", ".md", ".cfg", ".toml", ".txt", ".yml", ".json", ".csv", ".sh", ".svg", ""}


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the list of files of the project is unknown")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("page", [page for page in PAGES if FENCE.search(page.read_text())], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in FENCE.finditer(text):
        # Blank lines in front keep the line numbers of the page in a traceback.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(page), "exec"), names)


def test_the_readme_shows_code_that_runs() -> None:
    assert FENCE.search(PAGES[0].read_text(encoding="utf-8"))


def readme_commands() -> list[str]:
    return re.findall(r"^python3 -m venv .*$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)


def test_readme_has_one_command_for_the_demo_and_one_for_the_tests() -> None:
    demo, tests = readme_commands()
    assert demo.endswith("-m gatedprune.examples.kitti demo")
    assert tests.endswith("-m pytest -n auto --dist worksteal")


def test_ci_runs_the_readme_command() -> None:
    environment = {**os.environ, "GATEDPRUNE_CI_DRY_RUN": "1"}
    printed = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True, check=True
    ).stdout
    command = re.sub(r"\S*/venv\b", ".venv", printed.removeprefix("+ ").strip())
    assert command == readme_commands()[1]


def test_no_paths_of_a_machine_in_the_tree() -> None:
    found = []
    for file in tracked_files():
        if file.suffix not in TEXT_SUFFIXES:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert found == []
    assert MACHINE_PATH.search("data = '/hom" + "e/someone/kitti'")


def test_public_names_are_few_and_described() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = re.findall(r"^### `(?:gatedprune\.)?(\w+)", page, re.MULTILINE)
    assert len(gatedprune.__all__) <= 20
    assert sorted(described) == sorted(gatedprune.__all__)
    for name in gatedprune.__all__:
        assert hasattr(gatedprune, name)


def test_signatures_on_the_page_are_those_of_the_functions() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### `(\w+)`\n`\1\((.*?)\)`", page, re.MULTILINE | re.DOTALL)
    assert len(shown) >= 14
    for name, text in shown:
        value = getattr(gatedprune, name)
        real = inspect.signature(getattr(value, name, value)).parameters  # `compare` is a package as well
        arguments = ast.parse(f"def f({text}): pass").body[0].args  # type: ignore[attr-defined]
        given = {a.arg for a in (*arguments.args, *arguments.kwonlyargs, arguments.kwarg) if a}
        options = {n for n, p in real.items() if p.kind is p.VAR_KEYWORD} if name == "wrap" else set()
        allowed = {field.name for field in dataclasses.fields(gatedprune.GateConfig)} if options else set()
        assert given - allowed == set(real) - options - allowed, f"docs/api.md: {name}({text})"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
