"""The description of machine and versions."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import gatedprune
from gatedprune.measure import environment
from gatedprune.sweep.__main__ import _versions

# By name: `gatedprune.measure.environment` is the function.
module = importlib.import_module("gatedprune.measure.environment")


def test_names_versions_and_machine() -> None:
    found = environment()
    assert found.packages["gatedprune"] == gatedprune.__version__
    assert found.packages["torch"] == torch.__version__.split("+")[0] or found.packages["torch"] == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.processor
    assert json.loads(json.dumps(found.to_dict()))["python"] == found.python


def test_commit_is_that_of_this_checkout(root: Path) -> None:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: there is no commit to name")
    commit = environment().commit
    assert commit is not None and re.fullmatch(r"[0-9a-f]{40}\+?", commit)


def test_no_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert environment().commit is None


def test_a_package_that_is_not_there_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("a-package-nobody-has",))
    assert environment().packages == {"a-package-nobody-has": None}


def test_a_checkout_is_changed_where_one_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    def git(folder: Path, *arguments: str) -> str:
        changed = " M docs/table.md" if arguments[-1] in (":/", "docs") else ""
        return {"rev-parse": "0123456789abcdef", "status": changed}.get(arguments[0], "")

    monkeypatch.setattr(module, "_git", git)
    assert module.checkout_commit() == module.checkout_commit("docs") == "0123456789abcdef+"
    assert module.checkout_commit("gatedprune") == "0123456789abcdef"
    assert _versions()["commit"] == "0123456789"
    monkeypatch.setattr(module, "_git", lambda folder, *arguments: "0123456789abcdef")
    assert _versions()["commit"] == "0123456789-dirty"
