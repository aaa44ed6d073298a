"""`gatedprune compare`: the table, and the file beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

Run = Callable[..., Result]


def test_compare_prints_the_table_and_writes_the_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run("compare", "test_resnet", "--size=64", "--ratio=0.25", "--batch=2", "--repeats=1", f"--json={file}")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[2:5]] == ["dense", "static", "dynamic"]
    written = json.loads(file.read_text())
    assert written["inputs"] == [[2, 3, 64, 64]]
    assert all(k == channels - channels // 4 for k, channels in written["active"].values())
