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


def test_trained_first_all_alike(run: Run, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the extra train")
    command = ["compare", "test_resnet", "--finetune=1", "--train", images, "--data", images, "--train-batch=6",
               "--ratio=0.5,0.25", "--include=layer*", "--lr=0.03", "--output", tmp_path / "out", "--size=64",
               "--repeats=1"]  # fmt: skip
    # Nobody validates on what was trained on.
    assert "would use the same images" in run(*command).output
    other = tmp_path / "other"
    for folder in "abc":
        (other / folder).mkdir(parents=True)
        for file in (images / folder).iterdir():
            (other / folder / file.name).write_bytes(file.read_bytes())
    command[command.index("--data") + 1] = other
    result = run(*command, "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r.json").read_text())
    names = ["dense", "static @ 0.5", "dynamic @ 0.5", "static @ 0.25", "dynamic @ 0.25"]
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:  # what training found in the end is what the table says
        way, _, ratio = row["name"].partition(" @ ")
        written = json.loads(
            (tmp_path / "out" / (f"{way}-{ratio}-0" if ratio else "dense-0") / "result.json").read_text()
        )
        assert row["metrics"]["top1 %"] == pytest.approx(written["top1"])
        assert written["options"]["lr"] == pytest.approx(0.03 if way == "dense" else 0.01)
        assert written["epochs"] == 1
    again = run(*command, "--lr=0.05")
    assert again.exit_code == 1 and "trained with other options (lr: 0.03, now 0.05)" in again.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--finetune=1", "--data={images}"], "--finetune needs --train, --data and --output"),
        (["--train={images}"], "--train: for --finetune"),
        (["--finetune=1", "--calibrate={images}"], "--calibrate: not with --finetune"),
    ],
)
def test_what_training_first_needs(run: Run, images: Path, arguments: list[str], why: str) -> None:
    result = run("compare", "test_resnet", "--size=32", *(a.format(images=images) for a in arguments))
    assert result.exit_code == 2 and why in " ".join(result.output.replace("│", " ").split()), result.output


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
