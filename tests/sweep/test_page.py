"""docs/families.md is what its tables say; and the library asks for no family by its name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import timm

from gatedprune.sweep import Table, families_page

GOOD = {"model": "m", "family": "f", "parameters": 1, "input": 64, "macs": 10**6, "sites": 2, "share": 0.9, "left": 0.5,
        "convolutions": 1.0, "untouched": {}, "seconds": 3.0,
        "checks": {"identity": {"outcome": "pass", "note": "", "seconds": 1.0}}}  # fmt: skip


def test_the_page_is_what_the_generator_makes_of_the_tables(root: Path) -> None:
    data = root / "docs" / "data"
    if not (data / "families.jsonl").exists():
        pytest.skip("no table yet: docs/data/families.jsonl is missing")
    assert (root / "docs" / "families.md").read_text(encoding="utf-8") == families_page(data), (
        "run python -m gatedprune.sweep page"
    )


def page(tmp_path: Path, **changes: object) -> str:
    (tmp_path / "timm.json").write_text('{"timm": "1", "models": {"m": ["f", 1], "n": ["g", 2]}}')
    table = Table(tmp_path / "families.jsonl")
    table.path.unlink(missing_ok=True)
    table.append({**GOOD, **changes})
    return families_page(tmp_path)


def test_the_page_tells_failures(tmp_path: Path) -> None:
    good = page(tmp_path)
    assert "1 of 2 families run. 1 have sites; 1 pass every check that was run, 0 fail" in good and "| 1/1 |" in good
    assert "did not finish\n\nNothing." in good and "None." in good
    bad = page(tmp_path, checks={"unwrap": {"outcome": "fail", "note": "tensor | x changed\nmore", "seconds": 1.0}})
    assert "1 fail" in bad and "- **f** (`m`), `unwrap`: tensor / x changed\n" in bad and "| 0/1 |" in bad
    late = {**GOOD["checks"], "unwrap": {"outcome": "no time"}}
    slow = page(tmp_path, error="no result within 9 s", checks=late, commit="abc")
    assert "no result within 9 s Not reached: `unwrap`." in slow
    assert "0 pass every check that was run, 0 fail a check or break, 1 ran out of time" in slow
    assert "Made on abc (1 rows)." in slow
    for error in ("ValueError: no", "the process ended with exit code -9"):
        assert "1 fail a check or break, 0 ran out" in page(tmp_path, error=error, checks=late)


def test_the_page_tells_what_stands_in_the_way(tmp_path: Path) -> None:
    reasons = {"it is shared": 0.4, "tiny": 0.001}
    assert "**f** (`m`) saves 25%. MACs that no site narrows: 40% it is shared." in page(
        tmp_path, left=0.75, untouched=reasons
    )
    assert "saves" not in page(tmp_path, left=0.69, convolutions=0.1)
    assert "nothing to gate" in page(tmp_path, left=1.0, sites=0, checks={})


def test_the_page_tells_what_was_executed_where_that_differs(tmp_path: Path) -> None:
    note = {"macs_fall": {"outcome": "pass", "note": "61.2% of the MACs left", "seconds": 1.0}}
    assert "| 50% (61%) |" in page(tmp_path, checks=note)
    assert "| 61% |" in page(tmp_path, checks=note, left=0.612)
    broken = {"macs_fall": {"outcome": "fail", "note": "TypeError: no number here", "seconds": 1.0}}
    assert "| 50% |" in page(tmp_path, checks=broken)


def test_architectures_are_counted(tmp_path: Path) -> None:
    page(tmp_path)
    table = Table(tmp_path / "architectures.jsonl")
    table.append({**GOOD, "seconds": 2.0})
    table.append({"model": "n", "family": "g", "seconds": 1.0, "error": "ModelError: cannot be traced"})
    text = families_page(tmp_path)
    assert "2 of 2 architectures looked at; find_sites succeeds on 1, of which 0 have no site." in text
    assert "- `n`: ModelError: cannot be traced" in text


def names_in_code(source: str, names: set[str]) -> list[str]:
    """Names that strings of the code hold, docstrings aside."""
    tree = ast.parse(source)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    strings = [
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    ]
    return sorted({word for text in strings for word in re.findall(r"[a-z0-9_]+", text) if word in names})


def test_no_general_code_names_a_family(root: Path) -> None:
    names = {*timm.list_modules(), *timm.list_models()}
    found = {
        str(file.relative_to(root)): hits
        for file in sorted((root / "gatedprune").rglob("*.py"))
        if (hits := names_in_code(file.read_text(encoding="utf-8"), names))
    }
    assert found == {}


def test_a_name_in_code_is_caught() -> None:
    source = 'def f(model):\n    """Such as resnet18."""\n    return "levit" in type(model).__name__ or model == "x"\n'
    assert names_in_code(source, {"levit", "resnet18"}) == ["levit"]
