"""`gatedprune bench`: the table, the file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

pytest.importorskip("torch_pruning")
Run = Callable[..., Result]


def test_the_table_and_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = ["bench", "test_resnet", "--size", "64", "--ratio", "0.5", "--threads", "1,2", "--repeats", "1"]
    command += ["--rank", "4"]
    ran = run(*command, "--json", file)
    assert ran.exit_code == 0, ran.output
    assert "realised" in ran.stdout and "rank 4" in ran.stdout and ran.stdout.count("64×64") == 2
    written = json.loads(file.read_text())
    assert [c["threads"] for c in written["cells"]] == [1, 2] and written["cells"][0]["speedup"] > 0


@pytest.mark.parametrize(
    ("option", "value"), [("--ratio", "1.5"), ("--threads", "a"), ("--batch", "0"), ("--against", "x")]
)
def test_what_is_refused(run: Run, option: str, value: str) -> None:
    ran = run("bench", "test_resnet", option, value)
    assert ran.exit_code == 2 and value in ran.output
