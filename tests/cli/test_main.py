"""What all commands share: how they name models, what they refuse, and how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import gatedprune

Run = Callable[..., Result]


def test_a_name_that_timm_lacks_gets_a_suggestion(run: Run) -> None:
    result = run("inspect", "test_resnte")
    assert result.exit_code == 2
    assert "no model 'test_resnte'. Did you mean test_resnet" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "test_resnet", "--size", "12y"], 2, "'12y' is no size in pixels"),
        (["inspect", "test_resnet", "--size", "0"], 2, "'0' is no size"),
        (["inspect", "no_such_module:build"], 2, "cannot be imported"),
        (["inspect", "timm:no_such_name"], 2, "cannot be imported"),
        (["inspect", "timm:__version__"], 2, "not something that can be called"),
        (["inspect", "timm:list_modules"], 1, "returns a list, not a torch.nn.Module"),
        (["compare", "test_resnet", "--ratio", "1.5", "--size", "64"], 2, "has numbers outside"),
        (["compare", "test_resnet", "--ratio", "0.5", "--macs", "0.5"], 2, "either --ratio or --macs"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(run: Run, arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


def test_other_commands_take_a_saved_folder(run: Run, saved: Path) -> None:
    result = run("inspect", str(saved), "--size", "64", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["model"] == "ResNet" and len(json.loads(result.output)["sites"]) == 10
    pytest.importorskip("torch_pruning", reason="needs the extra compare")
    result = run("compare", str(saved), "--size", "64", "--repeats", "1", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def test_help_teaches_by_example(run: Run) -> None:
    for arguments in (["--help"], ["inspect", "--help"], ["compare", "--help"], ["export", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0 and "  gatedprune " in result.output


def test_python_dash_m(run: Run) -> None:
    done = subprocess.run([sys.executable, "-m", "gatedprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"gatedprune, version {gatedprune.__version__}"
