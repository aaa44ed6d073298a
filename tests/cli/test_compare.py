"""`gatedprune compare`: the table, and the files beside it."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from gatedprune.cli.compare import Accuracy
from gatedprune.compare import RANKINGS, Comparison
from gatedprune.data import read_images
from gatedprune.errors import DataError

pytest.importorskip("torch_pruning", reason="needs the extra compare")
Run = Callable[..., Result]


@dataclasses.dataclass(frozen=True)
class Found:
    """Stands for a comparison that took an hour."""

    notes: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    rows: tuple[object, ...] = ()

    to_csv = Comparison.to_csv
    to_json = Comparison.to_json
    plot = Comparison.plot

    def to_dict(self) -> dict:
        return {"rows": []}


def test_the_table_and_the_files(run: Run, saved: Path, images: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv"]
    plot = ["--plot", tmp_path / "r.svg"] if importlib.util.find_spec("matplotlib") else []
    data = ["--data", images, "--calibrate", images, "--static", "activation", "--static", "taylor"]
    timing = ["--batch=2", "--repeats=1", "--size=64"]
    result = run("compare", saved, "--ratio=0.5", *data, *timing, *files, *plot)
    assert result.exit_code == 0, result.output
    rows = ["static, activation", "static, taylor", "dynamic", "static, then dynamic"]
    names = ["dense", *rows]
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[2:7]] == names
    assert "as dense %" in lines[0] and "top1" not in lines[0], "three folders are no labels for a thousand classes"
    assert "no top-1, since there are 3 folders, and the model has 1000 classes" in result.stdout
    assert f"accuracy on 12 images of {images}" in result.stdout
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["inputs"] == [[2, 3, 64, 64]] and written["rows"][0]["metrics"] == {"as dense %": 100.0}
    with (tmp_path / "r.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [row["name"] for row in table] == names
    assert [int(row["macs"]) for row in table] == [row["macs"]["total"] for row in written["rows"]]
    assert not plot or (tmp_path / "r.svg").stat().st_size > 5000


def test_a_dense_model_with_patterns_and_a_budget(run: Run) -> None:
    options = ["--size=64", "--repeats=1", "--no-combined", "--json", "-"]
    result = run("compare", "test_resnet", "--macs=0.8", "--include=layer*", *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["rows"]] == ["dense", "static, magnitude-l2", "dynamic"]
    assert all(name.startswith("layer") for name in found["active"]) and len(found["active"]) == 8
    dense, _, dynamic = (row["macs"]["total"] for row in found["rows"])
    assert 0.7 * dense < dynamic <= 0.8 * dense


def test_accuracy_counts_labels_and_agreement(images: Path) -> None:
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    model.num_classes = 3  # type: ignore[assignment]
    data = read_images(images, model, size=(16, 16), batch=5)
    assert data.labels is not None
    measure = Accuracy(data)
    dense = measure(model)
    with torch.no_grad():
        said = torch.cat([model(x) for x in data]).argmax(1)
    assert dense == {"top1 %": 100 * float((said == data.labels).double().mean()), "as dense %": 100.0}
    with torch.no_grad():
        model[2].weight.neg_()
        model[2].bias.neg_()
    other = torch.cat([model(x) for x in data]).argmax(1)
    assert measure(model)["as dense %"] == pytest.approx(100 * float((said == other).double().mean())) != 100.0
    with pytest.raises(DataError, match="gives no logits"):
        measure(torch.nn.Identity())


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["--ratio", "0.3,x"], 2, "'0.3,x' is no list of numbers"),
        (["--ratio", "0.5", "--macs", "0.5"], 2, "either --ratio or --macs"),
        (["--static", "luck"], 2, "'luck' is not one of"),
        (["--static", "taylor"], 1, "'taylor' of static pruning needs data"),
        (["--data", "nowhere"], 1, "nowhere is not there"),
        (["--repeats", "1", "--no-combined", "--csv", "{file}/r.csv"], 1, "r.csv cannot be written"),
    ],
)
def test_what_is_wrong(run: Run, tmp_path: Path, arguments: list[str], code: int, why: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = run("compare", "test_resnet", "--size=32", *(a.format(file=tmp_path / "file") for a in arguments))
    assert result.exit_code == code, result.output
    assert why in " ".join(result.output.replace("│", " ").split())
    assert [f.name for f in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_a_full_disk_leaves_what_was_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           option: str) -> None:  # fmt: skip
    def full(self: object, *args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "result"
    target.write_text("mine")
    monkeypatch.setattr(sys.modules["gatedprune.compare"], "compare", lambda *a, **k: Found())
    monkeypatch.setattr("os.fsync", full)
    result = run("compare", "test_resnet", option, target)
    assert result.exit_code == 1 and f"{target} cannot be written (No space left on device)" in result.output
    assert target.read_text() == "mine" and [f.name for f in tmp_path.iterdir()] == ["result"]


def test_rankings_are_those_of_the_library() -> None:
    from gatedprune.cli import compare as module  # its choices are written out, so that --help loads nothing

    assert tuple(RANKINGS) == module._STATIC
