"""Options of a fine-tuning: what is refused, and what may change when it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gatedprune.errors import ConfigError
from gatedprune.finetune import FinetuneConfig


def config(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "test_resnet", "data": "images", "output": "runs", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sparse"}, "`mode` of finetune must be one of dynamic, static, dense. Got 'sparse'"),
        ({"schedule": "linear"}, "`schedule` of finetune must be one of constant, step, cosine. Got 'linear'"),
        ({"precision": "fp8"}, "`precision` of finetune must be one of no, bf16, fp16. Got 'fp8'"),
        ({"epochs": 0}, "`epochs` of finetune must be an integer of at least 1. Got 0"),
        ({"batch_size": 2.5}, "`batch_size` of finetune must be an integer of at least 1. Got 2.5"),
        ({"workers": True}, "`workers` of finetune must be an integer of at least 0. Got True"),
        ({"lr": 0}, r"`lr` of finetune must be a number in \[1e-12, 1e\+06\]. Got 0"),
        ({"lr": float("nan")}, "`lr` of finetune must be a number in"),
        ({"distill": 1.5}, r"`distill` of finetune must be a number in \[0, 1\]. Got 1.5"),
        ({"ema": "0.9"}, "`ema` of finetune must be a number in"),
        ({"batch_size": 10, "accumulate": 4}, "10 cannot be split into 4 equal parts"),
        ({"batch_size": 6, "accumulate": 2, "mixup": 0.2}, "`mixup` mixes pairs"),
        ({"pretrained": True, "weights": "w.pth"}, "either `pretrained` or `weights`, not both"),
        ({"teacher": "runs/dense/model"}, "A `teacher` teaches only where `distill`"),
        ({"ratio": 1.2}, r"The `ratio` of wrap\(\) must be a float in \[0, 1\)"),
        ({"ratio": 0.5, "macs": 0.5}, "either `ratio` or `macs`, not both"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_a_round_trip_through_json() -> None:
    one = config(size=[24, 32], include=["layer1*"], ema=0.99, macs=0.5)
    assert one.size == (24, 32) and one.include == ("layer1*",)
    again = FinetuneConfig.from_dict(json.loads(json.dumps(one.to_dict())))
    assert again == one
    assert again.gates().include == ("layer1*",)


def test_what_may_change_when_a_training_goes_on() -> None:
    one = config()
    free = {"output": "elsewhere", "workers": 3, "save_every": 0.5, "download": True}
    assert one.differences(dataclasses.replace(one, **free)) == []
    found = one.differences(dataclasses.replace(one, lr=0.5, epochs=3))
    assert found == ["epochs: 10, now 3", "lr: 0.01, now 0.5"]


def test_a_folder_may_be_called_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("images")
    monkeypatch.chdir(tmp_path)
    one = config()  # data="images"
    for same in ("./images", str(tmp_path / "images"), "link"):
        assert one.differences(config(data=same)) == []
    for other in ("others", "missing"):
        assert one.differences(config(data=other)) == [f"data: images, now {other}"]
    assert one.differences(config(train_split="./train")) == ["train_split: train, now ./train"]


@pytest.mark.parametrize(("mode", "other", "different"), [
    ("static", "static", []), ("dense", "dense", []),
    ("dynamic", "dynamic", ["gate_lr: 1.0, now 3.0", "rise: 0.5, now 0.0"]),
    ("static", "dynamic", ["mode: static, now dynamic", "gate_lr: 1.0, now 3.0", "rise: 0.5, now 0.0"]),
])  # fmt: skip
def test_options_of_gates_make_no_difference_without_gates(mode: str, other: str, different: list[str]) -> None:
    given = {"ratio": 0.5} if mode != "dense" else {}
    assert config(mode=mode, **given).differences(config(mode=other, gate_lr=3.0, rise=0.0, **given)) == different
