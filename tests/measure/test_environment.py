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
