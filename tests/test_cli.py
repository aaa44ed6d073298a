"""The command line: what it prints, what it refuses, and that its numbers are the library's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from torch import nn

import gatedprune
from gatedprune.cli import main


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_inspect_prints_sites_reasons_and_totals() -> None:
    result = run("inspect", "test_resnet", "--size", "64")
    assert result.exit_code == 0, result.output
    report = gatedprune.find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64))
    words = [line.split() for line in result.output.splitlines()]
    for site in report:
        assert [site.name, site.kind, str(site.channels), f"{site.share:.1%}"] in [w[:4] for w in words]
    for path, reason in report.skipped.items():
        assert path in [w[0] for w in words if w]
        assert f"  {reason}:" in result.output
    assert (
        f"left at ratio 0.5: {report.macs_left(0.5) / 1e6:.3g} MMACs ({report.macs_left() / report.macs:.1%})"
        in result.output
    )


def test_inspect_json_is_the_report() -> None:
    result = run("inspect", "test_vit", "--size", "96x64", "--stream", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    model = timm.create_model("test_vit", img_size=(96, 64))
    report = gatedprune.find_sites(model, torch.zeros(2, 3, 96, 64), stream=True)
    assert found["macs"] == report.macs and found["macs_left"] == {"0.5": report.macs_left(0.5)}
    assert [(s["name"], s["kind"], s["channels"]) for s in found["sites"]] == [
        (s.name, s.kind, s.channels) for s in report
    ]
    assert {s["kind"] for s in found["sites"]} == {"inner", "stream"}
    assert found["not_gated"] == report.skipped
    (first, *_) = found["sites"]
    assert first["narrows"] and all(any(p == layer.path for layer in report.layers) for p in first["narrows"])


def test_compare_prints_the_table_and_writes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = run("compare", "test_resnet", "--size=64", "--ratio=0.25", "--batch=2", "--repeats=1", f"--json={file}")
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()[2:5]] == ["dense", "static", "dynamic"]
    written = json.loads(file.read_text())
    assert written["inputs"] == [[2, 3, 64, 64]]
    assert all(k == channels - channels // 4 for k, channels in written["active"].values())


def test_a_name_that_timm_lacks_gets_a_suggestion() -> None:
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
        (["compare", "test_resnet", "--ratio", "1.5", "--size", "64"], 1, "The `ratio` of wrap() must be"),
        (["compare", "test_resnet", "--ratio", "0.5", "--macs", "0.5"], 1, "either `ratio` or `macs`"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(arguments: list[str], code: int, message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text("import timm\ndef small():\n    return timm.create_model('test_resnet')\n")
    monkeypatch.syspath_prepend(tmp_path)
    result = run("inspect", "own_models:small", "--size", "64", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.output)["sites"]) == 10


def test_a_model_without_sites_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "OneLayer", lambda: nn.Conv2d(3, 8, 3), raising=False)
    result = run("inspect", "torch.nn:OneLayer", "--size", "16")
    assert result.exit_code == 0, result.output
    assert "its channels leave the model as an output" in result.output and "0 sites" in result.output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = timm.create_model("test_resnet")
    gated = gatedprune.wrap(small, 0.25, example_inputs=torch.zeros(1, 3, 64, 64))
    return gatedprune.save(gated, tmp_path_factory.mktemp("cli") / "my_model")


def test_export_takes_a_saved_folder(saved: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    result = run("export", str(saved), "--format", "torch-export", "--output", str(target), "--batch", "1", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.output)
    assert told["path"] == str(target) and told["bytes"] == target.stat().st_size
    assert told["inputs"] == [[1, 3, 64, 64]] and told["difference"] < 1e-5
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.export.load(target).module()(x), gatedprune.load(saved)(x), rtol=1e-4, atol=1e-5
        )


def test_export_wraps_a_model_without_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--format", "torch-export", "--ratio", "0.7", "--size", "32", "--batch", "2", "--no-check"]
    result = run("export", "test_resnet", *arguments)
    assert result.exit_code == 0, result.output
    assert "model.pt2: torch-export" in result.output and "takes 2x3x32x32; not checked" in result.output


def test_export_says_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("export", str(saved), "--format", "torch-export", "--no-check", "--batch", "1",
                 "--output", str(tmp_path / "file" / "m.pt2"))  # fmt: skip
    assert result.exit_code == 1 and "m.pt2 cannot be written" in result.output
    result = run("export", str(saved), "--macs", "0.5")
    assert result.exit_code == 2 and "--macs is for a model without gates" in result.output
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "gatedprune.json").write_text("{")
    result = run("inspect", str(broken))
    assert result.exit_code == 1 and "is damaged" in result.output and "Traceback" not in result.output


def test_other_commands_take_a_saved_folder(saved: Path) -> None:
    result = run("inspect", str(saved), "--size", "64", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["model"] == "ResNet" and len(json.loads(result.output)["sites"]) == 10
    pytest.importorskip("torch_pruning", reason="needs the extra compare")
    result = run("compare", str(saved), "--size", "64", "--repeats", "1", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def test_help_teaches_by_example() -> None:
    for arguments in (["--help"], ["inspect", "--help"], ["compare", "--help"], ["export", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0 and "  gatedprune " in result.output


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "gatedprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"gatedprune, version {gatedprune.__version__}"
