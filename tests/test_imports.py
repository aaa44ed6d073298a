"""Imports point one way: each module uses only what stands before it, and nothing goes round in a circle."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# The library from the ground up; a module may import from those before it. A new module takes its place here.
ORDER = (
    "_version", "errors", "files", "config", "gradients", "functional", "precision", "gates", "sites", "wrapping",
    "engine", "measure", "data", "training", "inside", "compare", "export", "io", "finetune", "testing", "sweep", "cli",
    "__main__",
)  # fmt: skip


def module_name(file: Path, top: Path, package: str) -> str:
    parts = file.relative_to(top).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join((package, *parts))


def source_files(root: Path, folder: str, package: str) -> dict[str, Path]:
    return {module_name(file, root / folder, package): file for file in sorted((root / folder).rglob("*.py"))}


def executed_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which names types and imports nothing."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield from executed_nodes(child)


def imported_names(file: Path, module: str) -> set[str]:
    """Absolute dotted names that `file` imports, wherever in the file; `from a import b` gives `a.b`."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in executed_nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                outer = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*outer, base] if base else outer)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def to_module(name: str, modules: dict[str, Path]) -> str | None:
    """The module that an imported dotted name lives in, among `modules`."""
    while name:
        if name in modules:
            return name
        name = name.rpartition(".")[0]
    return None


def imports_of(modules: dict[str, Path]) -> dict[str, set[str]]:
    graph = {}
    for module, file in modules.items():
        targets = {to_module(name, modules) for name in imported_names(file, module)}
        graph[module] = {target for target in targets if target and target != module}
    return graph


def violations(graph: dict[str, set[str]]) -> list[str]:
    """Imports within the library that point the wrong way."""
    found = []
    for module, targets in graph.items():
        if module == "gatedprune":
            continue
        place = ORDER.index(module.split(".")[1])
        for target in targets:
            if target == "gatedprune" or ORDER.index(target.split(".")[1]) > place:
                found.append(f"{module} imports {target}")
    return found


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if cycle := walk(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    for module in sorted(graph):
        if cycle := walk(module, []):
            return cycle
    return []


def is_public(name: str) -> bool:
    """Does the `__all__` of gatedprune, or of a module in it, promise the dotted `name`?"""
    parts = name.split(".")
    if len(parts) == 1:
        return True
    if len(parts) == 2 and parts[1] in importlib.import_module("gatedprune").__all__:
        return True
    if parts[1] not in ORDER or parts[1].startswith("_"):
        return False
    module = importlib.import_module(f"gatedprune.{parts[1]}")
    return len(parts) == 2 or (len(parts) == 3 and parts[2] in getattr(module, "__all__", ()))


def test_each_module_has_its_place(root: Path) -> None:
    modules = source_files(root, "gatedprune", "gatedprune")
    unplaced = {name for name in modules if name != "gatedprune" and name.split(".")[1] not in ORDER}
    assert not unplaced, f"add these to ORDER, where they belong: {sorted(unplaced)}"


def test_imports_point_one_way(root: Path) -> None:
    graph = imports_of(source_files(root, "gatedprune", "gatedprune"))
    assert violations(graph) == []


@pytest.mark.parametrize("folder", ["gatedprune", "adapters", "examples"])
def test_no_imports_in_a_circle(root: Path, folder: str) -> None:
    package = folder if folder == "gatedprune" else f"gatedprune.{folder}"
    assert find_cycle(imports_of(source_files(root, folder, package))) == []


@pytest.mark.parametrize("folder", ["adapters", "examples"])
def test_outer_packages_use_public_names_only(root: Path, folder: str) -> None:
    package = f"gatedprune.{folder}"
    below = ("gatedprune.adapters",) if folder == "examples" else ()
    wrong = []
    for module, file in source_files(root, folder, package).items():
        for name in imported_names(file, module):
            if name.split(".")[0] != "gatedprune" or name.startswith((package, *below)):
                continue
            if not is_public(name):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_wrong_direction_and_circles_are_caught(tmp_path: Path) -> None:
    (tmp_path / "gates.py").write_text("from .wrapping import wrap\n")
    (tmp_path / "wrapping.py").write_text("def wrap():\n    from . import gates\n")
    modules = source_files(tmp_path.parent, tmp_path.name, "gatedprune")
    graph = imports_of({**modules, "gatedprune": tmp_path / "gates.py"} | modules)
    assert violations(graph) == ["gatedprune.gates imports gatedprune.wrapping"]
    assert find_cycle(graph) == ["gatedprune.gates", "gatedprune.wrapping", "gatedprune.gates"]
    assert not is_public("gatedprune.errors.os")
    assert is_public("gatedprune.errors.ModelError")
