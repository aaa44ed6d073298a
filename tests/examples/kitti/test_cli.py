"""The command line, from end to end on tiny models and synthetic streets, and its answers to mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gatedprune.examples.kitti.cli import main
from gatedprune.examples.kitti.demo import DemoConfig, run_demo
from gatedprune.examples.kitti.images import read_depth, read_image
from gatedprune.examples.kitti.options import EXAMPLES, build_parser
from gatedprune.examples.kitti.synthetic import DATE, SyntheticSample

TINY = [
    "--backbone",
    "test_resnet",
    "--no-pretrained",
    "--decoder-channels",
    "16",
    "--image-size",
    "96x32",
    "--input-size",
    "96x32",
]
SHORT = ["--epochs", "1", "--batch-size", "2", "--augmentation", "mild", "--quiet", "--device", "cpu"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(sample: SyntheticSample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dense"
    assert run("train", "--data", sample.root, "--split", sample.train, *TINY, *SHORT, "--out", out) == 0
    return out / "model.safetensors"


def test_train_gated_and_evaluate(
    sample: SyntheticSample, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", sample.root, "--split", sample.train)
    assert run("train", *data, "--start", trained, "--ratio", 0.5, *SHORT, "--out", tmp_path) == 0
    evaluate = ("evaluate", "--data", sample.root, "--split", sample.test, "--quiet", "--device", "cpu")
    picture, numbers = tmp_path / "depth.png", tmp_path / "numbers.json"
    gated = tmp_path / "model.safetensors"
    capsys.readouterr()
    assert run(*evaluate, "--checkpoint", gated, "--picture", picture, "--json", numbers, "--crop", "eigen") == 0
    shown = capsys.readouterr().out
    assert "delta1" in shown and "crop: eigen" in shown and "projected Velodyne points" in shown
    assert json.loads(numbers.read_text())["metrics"]["rms"] > 0
    assert read_image(picture).shape[0] > 200


def test_predict(sample: SyntheticSample, trained: Path, tmp_path: Path) -> None:
    folder = sample.root / DATE / f"{DATE}_drive_0001_sync" / "image_02" / "data"
    assert run("predict", folder, "--checkpoint", trained, "--out", tmp_path, "--depth-png", "--quiet") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"000000000{i}_depth{kind}.png" for i in (0, 1) for kind in ("", "_color")
    ]
    depth = read_depth(tmp_path / "0000000000_depth.png")
    assert depth.shape == (375, 1242) and depth.min() >= 1 and depth.max() <= 80
    assert read_image(tmp_path / "0000000000_depth_color.png").shape == (750, 1242, 3)


def test_compare(sample: SyntheticSample, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("compare", "--checkpoint", trained, "--data", sample.root, "--split", sample.train)
    elsewhere = ("--eval-data", sample.root, "--eval-split", sample.test)
    assert run(*arguments, *elsewhere, *SHORT, "--out", tmp_path) == 0
    table = capsys.readouterr().out
    for words in ("dense", "static", "dynamic", "RMS", "REL", "δ1", "Protocol: 2 images"):
        assert words in table
    rows = {row["name"]: row for row in json.loads((tmp_path / "comparison.json").read_text())["rows"]}
    assert rows["static"]["macs"]["total"] < rows["dynamic"]["macs"]["total"] < 0.8 * rows["dense"]["macs"]["total"]
    assert rows["static"]["parameters"] < rows["dense"]["parameters"] < rows["dynamic"]["parameters"]
    assert read_image(tmp_path / "picture.png").shape[1] > 5 * 400
    assert run("evaluate", "--checkpoint", tmp_path / "gated.safetensors", *arguments[3:], "--quiet") == 0
    capsys.readouterr()
    assert run("compare", "--checkpoint", tmp_path / "gated.safetensors", *arguments[3:]) == 2
    assert "compare starts from a dense one" in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DemoConfig(
        backbone="test_resnet", decoder_channels=16, input_size=(32, 96), train_streets=2, test_streets=1, frames=2,
        epochs=2, finetune_epochs=1, batch_size=2,
    )  # fmt: skip
    result = run_demo(tmp_path, config, progress=False)
    assert [row.name for row in result.comparison.rows] == ["dense", "static", "dynamic"]
    assert all(set(row.metrics) == {"RMS", "REL", "δ1"} for row in result.comparison.rows)
    files = {"data", "dense.safetensors", "gated.safetensors", "comparison.json", "table.txt", "picture.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (tmp_path / "table.txt").read_text().strip() in capsys.readouterr().out


def test_ctrl_c_saves_and_resume_goes_on(sample: SyntheticSample, tmp_path: Path) -> None:
    arguments = [
        "train", "--data", str(sample.root), "--split", str(sample.train), *TINY, "--epochs", "100000",
        "--batch-size", "2", "--quiet", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    command = [sys.executable, "-u", "-m", "gatedprune.examples.kitti", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "Training test_resnet on 4 frames" in process.stdout.readline()
        time.sleep(2)
        os.kill(process.pid, signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Repeat the command with --resume" in error
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt"}


def test_an_old_state_is_not_overwritten_by_accident(
    sample: SyntheticSample, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("train", "--data", sample.root, "--split", sample.train, *TINY, *SHORT, "--out", trained.parent)
    before = trained.stat().st_mtime_ns
    assert run(*again) == 2
    assert "Continue it with --resume, or give another --out" in capsys.readouterr().err
    assert trained.stat().st_mtime_ns == before
    assert run(*again, "--resume") == 0  # finished already: writes the same model again


def test_mistakes_are_answered_in_one_line(
    sample: SyntheticSample, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, checkpoint = ("--data", sample.root), ("--checkpoint", trained)
    cases = [
        (("evaluate", *checkpoint, "--data", tmp_path / "nowhere"), "does not exist"),
        (("evaluate", *checkpoint, *data, "--backbone", "resnet50"), "but 'resnet50' was asked for"),
        (("predict", "--checkpoint", tmp_path / "none.safetensors", sample.train), "cannot be read"),
        (("predict", *checkpoint, tmp_path / "none.png"), "does not exist"),
        (("predict", "--quiet", *checkpoint, sample.root / DATE / "calib_cam_to_cam.txt"), "not an image"),
        (("train", *data, *TINY, *SHORT, "--ratio", "1.5", "--out", tmp_path), r"float in [0, 1). Got 1.5"),
        (("train", *data, *TINY, *SHORT, "--lr", "nan", "--out", tmp_path), "positive learning rate"),
        (("train", *data, "--backbone", "resnet5", "--out", tmp_path), "no model named 'resnet5'"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error, error
        assert "Traceback" not in error


def test_help_teaches_with_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    parser = build_parser()
    count = 0
    for command, text in EXAMPLES.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        assert text.splitlines()[1].strip() in capsys.readouterr().out
        for line in text.replace("\\\n", " ").splitlines():
            if "-m gatedprune.examples.kitti" in line:
                words = line.partition("#")[0].split()
                options = parser.parse_args(words[words.index("gatedprune.examples.kitti") + 1 :])
                assert options.command == command
                count += 1
    assert count >= 12


@pytest.mark.parametrize("arguments", [["train", "--input-size", "320"], ["evaluate"], ["fly"], []])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage:" in capsys.readouterr().err
