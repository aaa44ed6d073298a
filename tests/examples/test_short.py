"""The short examples run from end to end, offline, and say what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import gatedprune
from gatedprune.examples import own_model, quick_start, shapes, static_against_dynamic


def run(command: object, *arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)  # type: ignore[arg-type]
    assert done.exit_code == code, done.output
    return done.output


def test_quick_start(tmp_path: Path) -> None:
    options = ("--model", "test_efficientnet", "--size", 64, "--samples", 8, "--save", tmp_path / "model")
    shown = run(quick_start.main, *options)
    steps = [line.split()[0] for line in shown.splitlines()]
    assert steps == ["look", "calibrate", "choose", "compact", "save", "time"]
    assert gatedprune.is_gated(gatedprune.load(tmp_path / "model"))


def test_quick_start_explains_what_it_cannot_do() -> None:
    assert "Unknown model (resnet_18)" in run(quick_start.main, "--model", "resnet_18", code=1)
    wrong_size = ("--model", "vit_tiny_patch16_224", "--size", 64)
    assert "could not be traced by torch.export" in run(quick_start.main, *wrong_size, code=1)


def test_channels_in_common() -> None:
    active = {"a": torch.tensor([[0, 1], [0, 1]]), "b": torch.tensor([[0, 1], [2, 3]])}
    shared, by_chance = quick_start.in_common(active, {"a": 4, "b": 4})
    assert shared == 0.5  # all of a, nothing of b
    assert by_chance == 0.5


def test_static_against_dynamic(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning")
    out = tmp_path / "result.json"
    small = ("--images", 64, "--size", 32, "--steps", 2, "--finetune", 1, "--test", 64)
    shown = run(static_against_dynamic.main, *small, "--json", out)
    assert "not fine-tuned: static" in shown and "top1" in shown
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "static", "dynamic"]
    assert all(0 <= row["metrics"]["top1"] <= 100 for row in rows)


def test_own_model(tmp_path: Path) -> None:
    shown = run(own_model.main, "--steps", 1, "--save", tmp_path / "figures")
    assert "identity, static, compact_float32 hold" in shown
    assert "its channels are added to the residual stream" in shown
    assert gatedprune.is_gated(gatedprune.load(tmp_path / "figures", model=own_model.FigureNet()))


def test_pictures_are_the_same_every_time_and_hold_every_figure() -> None:
    images, labels = shapes.make_images(64, 32, seed=3)
    again, _ = shapes.make_images(64, 32, seed=3)
    assert images.shape == (64, 3, 32, 32) and torch.equal(images, again)
    assert set(labels.tolist()) == set(range(len(shapes.CLASSES)))
    assert not torch.equal(images, shapes.make_images(64, 32, seed=4)[0])


def test_figures_can_be_told_apart() -> None:
    """Without colour, noise, place and size, no two figures are alike."""
    line = torch.linspace(-1, 1, 32) / 0.7
    figures = shapes._figures(line.view(1, 1, 32), line.view(1, 32, 1)).float().flatten(1)
    apart = torch.cdist(figures, figures, p=0) / figures.shape[1]
    assert float(apart.add_(torch.eye(len(figures))).min()) > 0.05


def test_training_learns_and_leaves_eval_mode() -> None:
    images, labels = shapes.make_images(256, 32)
    model = own_model.FigureNet(width=16, depth=1)
    before = shapes.top1(model.eval(), images, labels)
    shapes.train(model, images, labels, steps=60, lr=1e-2)
    assert not model.training
    assert shapes.top1(model, images, labels) > before + 20
