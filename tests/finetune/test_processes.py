"""Trainings in processes of their own: two that train together, one that is killed, one that is told to stop."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import gatedprune
from gatedprune.cli import main
from gatedprune.finetune import FinetuneConfig, finetune

MODEL = """
import os
import signal
import torch
from torch import nn


class Own(nn.Module):  # without batch norm: each process sees a part of the batch
    calls = 0

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        if self.training:
            Own.calls += 1
            if Own.calls == int(os.environ.get("STOP_AT", 0)):
                os.kill(os.getpid(), getattr(signal, os.environ["STOP_BY"]))
        x = self.second(self.first(x).relu()).relu()
        return self.fc(x.mean((2, 3)))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module `own`, in which the test then runs."""
    (tmp_path / "own.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def options(images: Path) -> dict[str, Any]:
    return {"model": "own:Own", "data": str(images), "size": (24, 24), "epochs": 2, "batch_size": 4, "lr": 0.1,
            "straight_through": True, "penalty": 1e-4, "save_every": 0.0}  # fmt: skip


def arguments(images: Path, output: str) -> list[str]:
    return ["finetune", "own:Own", "--data", str(images), "--size", "24", "--epochs", "2", "--batch-size", "4",
            "--lr", "0.1", "--straight-through", "--penalty", "1e-4", "--save-every", "0",
            "--output", output]  # fmt: skip


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                          capture_output=True, text=True, timeout=600, check=False)  # fmt: skip


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = (gatedprune.files.read_tensors(run / "model" / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(images: Path, own: Path) -> None:
    alone = finetune(FinetuneConfig(**options(images), output="one"), progress=False)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gatedprune"]
    done = run([*launch, *arguments(images, "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes, cpu" in done.stderr and done.stdout.count("saved in") == 1
    together = json.loads((own / "two" / "result.json").read_text())
    assert len(together["log"]) == len(alone.log) == 2
    for row, wanted in zip(together["log"], alone.log, strict=True):
        for name in ("train_loss", "val_loss"):
            # Sums of float32 in another order.
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), name
        assert row["top1"] == pytest.approx(wanted["top1"]) and row["ratio"] == wanted["ratio"]
    assert alone.log[1]["train_loss"] != pytest.approx(alone.log[0]["train_loss"], rel=1e-3), "nothing was learnt"


def test_killed_at_a_random_step_and_resumed_it_ends_the_same(images: Path, own: Path) -> None:
    step = random.SystemRandom().randrange(2, 13)
    done = run(["-m", "gatedprune", *arguments(images, "killed")], STOP_AT=str(step), STOP_BY="SIGKILL")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    state = torch.load(own / "killed" / "state.pt", weights_only=True)
    assert 6 * state["epoch"] + state["step"] == step - 1, "the step before the one that was killed is on the disk"
    config = options(images)
    finetune(FinetuneConfig(**config, output="killed"), resume=True, progress=False)
    finetune(FinetuneConfig(**config, output="whole"), progress=False)
    assert_same_weights(own / "killed", own / "whole")


def test_ctrl_c_saves_and_says_how_to_go_on(
    images: Path, own: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("STOP_AT", "3")
    monkeypatch.setenv("STOP_BY", "SIGINT")
    monkeypatch.setattr(sys, "argv", ["/somewhere/gatedprune", *arguments(images, "my run")])
    # A shell starts what runs in the background with Ctrl-C ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    stopped = CliRunner().invoke(main, arguments(images, "my run"))
    assert stopped.exit_code == 130, stopped.output
    said = "Stopped; the state is in my run. Go on with: gatedprune finetune own:Own"
    assert said in stopped.output and stopped.output.rstrip().endswith("--output 'my run' --resume")
    state = torch.load(own / "my run" / "state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, 3), "the step at hand was finished"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = CliRunner().invoke(main, [*arguments(images, "my run"), "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert "resumed at epoch 1, step 4" in resumed.output and "dynamic" in resumed.stdout
    finetune(FinetuneConfig(**options(images), output="whole"), progress=False)
    assert_same_weights(own / "my run", own / "whole")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    arguments = ["finetune", "test_resnet", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1 and "Error: The data" in result.output and "are not there" in result.output
    result = CliRunner().invoke(main, [*arguments, "--ratio", "2"])
    assert result.exit_code == 1 and "The `ratio` of wrap() must be" in result.output
    result = CliRunner().invoke(main, [*arguments, "--size", "12y"])
    assert result.exit_code == 2 and "'12y' is no size in pixels" in result.output
    result = CliRunner().invoke(main, ["finetune", "--help"])
    assert result.exit_code == 0 and "accelerate launch -m gatedprune finetune" in result.output
