"""Fine-tuning from options to a saved model: the three modes, exact resumption, and errors before any time is lost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data import resolve_model_data_config
from torch import nn

import gatedprune
from gatedprune.cli.common import Model
from gatedprune.errors import CheckpointError, ConfigError, DataError
from gatedprune.finetune import DivergedError, FinetuneConfig, Interrupted, finetune, load_finetuned
from gatedprune.finetune import command as command_module
from gatedprune.finetune import loop as loop_module
from gatedprune.finetune import models as models_module
from gatedprune.finetune.checkpoint import read_state
from gatedprune.finetune.data import load_splits
from gatedprune.inside import usage

SITES = ("layer1*", "layer2*")
SMALL = f"{__name__}:small"


class Small(nn.Module):
    """One site; quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16)
        self.second, self.drop, self.fc = nn.Conv2d(16, 8, 3), nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.norm(self.first(x)).relu()).relu()
        return self.fc(self.drop(x.mean((2, 3))))


def small() -> nn.Module:
    return Small()


def config(images: Path, output: Path, **options: Any) -> FinetuneConfig:
    """Two epochs of six steps each."""
    return FinetuneConfig(**{"model": SMALL, "data": str(images), "output": str(output), "size": (24, 24), "epochs": 2,
                             "batch_size": 4, "ratio": 0.5, **options})  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return gatedprune.files.read_tensors(folder / "model" / "model.safetensors")


def stopping_after(steps: int) -> Any:
    """In place of `stop_on_signal`: asks to stop after so many steps."""

    class Stop:
        def __init__(self) -> None:
            self.asked = 0

        def __enter__(self) -> Callable[[], bool]:
            return self.ask

        def __exit__(self, *error: object) -> None:
            pass

        def ask(self) -> bool:
            self.asked += 1
            return self.asked >= steps

    return Stop


def test_a_gated_model_comes_out_as_the_table_says(images: Path, tmp_path: Path) -> None:
    options = config(images, tmp_path / "run", model="test_resnet", include=SITES, lr=0.05, schedule="step")
    lines: list[str] = []
    result = finetune(options, progress=False, say=lines.append)
    gated = gatedprune.load(tmp_path / "run" / "model")
    assert set(gated.gates) == {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2"}
    assert all(gate.ratio == 0.5 and bool(gate.weight.any()) for gate in gated.gates.values())
    assert result.macs == gated.site_report.macs_left(dict.fromkeys(SITES, 0.5)) < result.dense_macs

    splits = load_splits(options)
    splits.transform(options, resolve_model_data_config(gated, {"input_size": (3, 24, 24)}))
    x, y = (torch.stack([torch.as_tensor(s[i]) for s in splits.val]) for i in (0, 1))
    with torch.no_grad():
        right = (gated(x).argmax(1) == y).double().mean()
    assert result.top1 == pytest.approx(100 * float(right))

    with open(tmp_path / "run" / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["ratio"]) for row in rows] == [0.5, 0.5]
    assert len(lines) == 2 and "epoch 2/2: train loss" in lines[1]
    seen = usage(gated, [x])
    common = [100 * site.common / site.active for site in seen.sites.values() if site.common is not None]
    assert float(rows[-1]["in_common"]) == pytest.approx(sum(common) / len(common))
    assert f"winners in common {sum(common) / len(common):.0f} %" in lines[1]
    assert float(rows[-1]["top1"]) == result.top1
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["top1"] == result.top1 and written["classes"] == ["blue", "green", "red"]
    assert FinetuneConfig.from_dict(written["options"]) == options
    words = str(result).split()
    assert "dynamic" in words and f"{result.top1:.2f}" in words and str(tmp_path / "run" / "model") in words


EVERYTHING = {
    "ema": 0.5, "mixup": 0.3, "smoothing": 0.1, "accumulate": 2, "straight_through": True, "clip_grad": 1.0,
    "calibrate": 8, "opt": "adamw", "lr": 1e-3, "warmup_epochs": 1, "auto_augment": "rand-m5", "penalty": 1e-4,
    "workers": 1,  # then the images' chance does not seed this process by the way
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_stopped_twice_and_resumed_it_ends_the_same(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    finetune(config(images, tmp_path / "whole", **options), progress=False)
    again = config(images, tmp_path / "parts", **options)
    for steps in (2, 5):  # of six in each epoch: once in the first, once in the second
        with monkeypatch.context() as patch:
            patch.setattr(command_module, "stop_on_signal", stopping_after(steps))
            torch.manual_seed(steps)  # where chance stands elsewhere does not matter
            with pytest.raises(Interrupted):
                finetune(again, resume=True, progress=False)
        assert not (tmp_path / "parts" / "model").exists()
    finetune(again, resume=True, progress=False)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    logs = [json.loads((tmp_path / run / "result.json").read_text())["log"] for run in ("whole", "parts")]
    for row in (*logs[0], *logs[1]):
        del row["seconds"]
    assert logs[0] == logs[1]


def test_predictors_learn_at_rates_of_their_own(images: Path, tmp_path: Path) -> None:
    moved, rates = {}, {}
    for gate_lr in (0.0, 1.0, 2.0):
        output = tmp_path / str(gate_lr)
        finetune(config(images, output, epochs=1, penalty=0.0, gate_lr=gate_lr), progress=False)
        state = read_state(output / "state.pt")
        moved[gate_lr] = float(gatedprune.load(output / "model", small()).gates["first"].weight.detach().abs().max())
        rates[gate_lr] = state["rates"]["first"]
        lrs = [group["initial_lr"] for group in state["optimizer"]["param_groups"]]
        assert lrs[0] == 0.01 and lrs[-2] == pytest.approx(0.01 * rates[gate_lr])  # the other site's is last
    assert rates[2.0] == pytest.approx(2 * rates[1.0]) and rates[1.0] > 0 == rates[0.0]
    assert moved[2.0] > moved[1.0] > 0 == moved[0.0]


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"mode": "dynamic"}], ids=str)
def test_mixed_precision_hides_no_macs(images: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    done = finetune(
        config(images, tmp_path, precision="bf16", epochs=1, **{"mode": "dense", **options}), progress=False
    )
    assert done.dense_macs > 0 and (done.macs == done.dense_macs if done.mode == "dense" else done.macs > 0)


def test_static_and_dense_by_the_same_recipe(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra compare")
    dense = finetune(config(images, tmp_path / "dense", mode="dense", epochs=1), progress=False)
    assert dense.macs == dense.dense_macs
    start = str(tmp_path / "dense" / "model")
    taught = config(images, tmp_path / "static", model=start, mode="static", distill=0.5, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(command_module, "stop_on_signal", stopping_after(2))
        with pytest.raises(Interrupted):
            finetune(taught, progress=False)
    static = finetune(taught, resume=True, progress=False)
    dynamic = finetune(
        config(images, tmp_path / "dynamic", model=start, distill=0.5, teacher=start, epochs=1), progress=False
    )
    assert static.macs < dynamic.macs < dense.macs  # the same k, and predictors on top
    assert static.parameters < dense.parameters < dynamic.parameters
    for file in (tmp_path / "dense").rglob("*.safetensors"):
        file.unlink()  # results stand alone

    pruned, gated = (load_finetuned(tmp_path / mode / "model") for mode in ("static", "dynamic"))
    assert pruned.first.out_channels == gated.gates["first"].active_count == 8
    assert sum(p.numel() for p in pruned.parameters()) == static.parameters
    for model, mode in ((pruned, "static"), (gated, "dynamic")):
        named = Model().convert(str(tmp_path / mode / "model"), None, None)  # what the command line makes of the folder
        other = named("cpu", None)
        assert named.kind == "saved" and all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
        state = weights(tmp_path / mode)
        assert not model.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="is pruned already: go on with it as it is"):
        finetune(config(images, tmp_path / "more", model=str(tmp_path / "static" / "model"), mode="static"))
    with pytest.raises(CheckpointError, match="is no model that `gatedprune finetune` wrote, or is damaged"):
        load_finetuned(tmp_path)
    file = tmp_path / "static" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model cannot be restored: .*cannot be read"):
        load_finetuned(tmp_path / "static" / "model")


def test_a_training_there_already_is_not_touched(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = config(images, tmp_path / "run", epochs=1, mode="dense")
    monkeypatch.setattr(command_module, "stop_on_signal", stopping_after(1))
    with pytest.raises(Interrupted):
        finetune(options, progress=False)
    state = tmp_path / "run" / "state.pt"
    before = state.read_bytes()
    (tmp_path / "run" / ".state.pt.12ab.pt").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="holds a training already. Go on with it by --resume"):
        finetune(options, progress=False)
    assert not (tmp_path / "run" / ".state.pt.12ab.pt").exists(), "a killed writer's rest"
    with pytest.raises(ConfigError, match=r"begun with other options \(lr: 0.01, now 0.5\)"):
        finetune(config(images, tmp_path / "run", epochs=1, mode="dense", lr=0.5), resume=True, progress=False)
    other = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("blue", "green", "red"):
            folder = other / split / name
            folder.mkdir(parents=True)
            for file in list((images / split / name).iterdir())[:2]:
                (folder / file.name).write_bytes(file.read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneConfig, "differences", lambda self, new: [])
        with pytest.raises(ConfigError, match=r"begun on other data: \[24, 9\] images"):
            finetune(config(other, tmp_path / "run", epochs=1, mode="dense"), resume=True, progress=False)
    assert state.read_bytes() == before
    state.write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match="training state .*state.pt cannot be read .*it is damaged"):
        finetune(options, resume=True, progress=False)
    torch.save({"format": 1}, state)
    with pytest.raises(CheckpointError, match="is no training state of this gatedprune"):
        finetune(options, resume=True, progress=False)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def test_a_state_is_never_unpickled(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.save({"format": 1, "model": Evil()}, tmp_path / "run" / "state.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        finetune(config(images, tmp_path / "run"), resume=True, progress=False)
    assert not (tmp_path / "evil").exists()


def test_a_diverging_loss_is_told_and_the_last_good_state_kept(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "CHECK_EVERY", 1)
    with pytest.raises(
        DivergedError, match="The loss became (nan|inf) in epoch 1. Start again with a lower learning rate"
    ):
        finetune(config(images, tmp_path / "run", mode="dense", lr=1e6, sched="constant"), progress=False)
    assert not (tmp_path / "run" / "state.pt").exists()


def five_classes() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def no_model() -> str:
    return "model"


def test_the_learning_rate_may_stay(images: Path, tmp_path: Path) -> None:
    for sched in ("none", "constant"):
        result = finetune(config(images, tmp_path / sched, sched=sched, lr=0.02, epochs=1), progress=False)
        assert result.log[0]["lr"] == 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "test_resnte"}, ConfigError, "no model 'test_resnte'. Did you mean test_resnet"),
        ({"model": "no_such_module:build"}, ConfigError, "'no_such_module:build' cannot be imported"),
        ({"model": f"{__name__}:no_model"}, ConfigError, "returns a str, not a torch.nn.Module"),
        ({"model": f"{__name__}:five_classes"}, DataError, "puts out 5 classes, and the data have 3 classes"),
        ({"model": f"{__name__}:five_classes", "weights": "w.pth"}, ConfigError, "comes with its own weights"),
        ({"model": "test_resnet", "weights": "w.pth"}, CheckpointError, "The weights w.pth are not there"),
        (
            {"model": "test_resnet", "weights": __file__},
            CheckpointError,
            "weights of test_resnet cannot be had from .*test_finetune.py",
        ),
        (
            {"model": "test_resnet", "pretrained": True},
            CheckpointError,
            "from the Hugging Face hub .*Check the connection.*--weights",
        ),
        (
            {"model": "test_resnet", "distill": 0.5, "mode": "dense"},
            ConfigError,
            "classifier that has never seen these classes. Train it dense first",
        ),
        ({"distill": 0.5, "teacher": "nowhere"}, CheckpointError, "nowhere is no model that `gatedprune finetune`"),
        ({"opt": "luck"}, ConfigError, "timm has no optimiser 'luck'"),
        ({"sched": "luck"}, ConfigError, "with the learning rate schedule 'luck'"),
        ({"include": ("layer9",), "ratio": 0.5}, ConfigError, "pattern 'layer9' .* fits no site"),
    ],
)
def test_wrong_models_are_told_before_training(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type, message: str
) -> None:
    def unreachable(*args: Any, **options: Any) -> Any:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", unreachable)
    with pytest.raises(error, match=message):
        finetune(config(images, tmp_path / "run", **options), progress=False)
    assert not (tmp_path / "run").exists()


def test_a_wrong_teacher_is_told_before_calibrating(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models_module, "calibrate", lambda *arguments, **options: pytest.fail("calibrated in vain"))
    for mode in ("dynamic", "static"):
        wrong = config(images, tmp_path / "run", mode=mode, calibrate=8, distill=0.5, teacher="nowhere")
        with pytest.raises(CheckpointError, match="nowhere is no model"):
            finetune(wrong, progress=False)


def strided() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_a_layout_that_damages_memory_is_refused(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided 1×1 convolutions that read fewer than eight channels, channels last, on a CPU."""
    monkeypatch.setattr(loop_module, "_no_device", lambda: True)
    narrow = {"model": f"{__name__}:strided", "mode": "static", "include": ("1",), "channels_last": True, "epochs": 1}
    with pytest.raises(ConfigError, match="strided 1×1 convolution 3 reads 4 channels.*Train without it"):
        finetune(config(images, tmp_path / "narrow", **narrow, ratio=0.75), progress=False)
    finetune(config(images, tmp_path / "wide", **narrow, ratio=0.5), progress=False)
    finetune(config(images, tmp_path / "plain", **{**narrow, "channels_last": False}, ratio=0.75), progress=False)


def half_silent() -> nn.Module:
    """Its first eight channels have the largest weights, and give nothing."""
    model = Small()
    with torch.no_grad():
        model.first.weight[:8] *= 100
        model.second.weight[:, :8] *= 100
        model.norm.weight[:8], model.norm.bias[:8] = 0.0, -1.0
    return model


@pytest.mark.parametrize(("calibrate", "kept"), [(0, range(8)), (8, range(8, 16))])
def test_static_pruning_keeps_what_contributes_most(images: Path, tmp_path: Path, calibrate: int, kept: range) -> None:
    options = config(
        images, tmp_path / "run", model=f"{__name__}:half_silent", mode="static", calibrate=calibrate, epochs=1
    )
    finetune(options, progress=False)
    described = json.loads((tmp_path / "run" / "model" / "finetuned.json").read_text())
    assert sorted(described["kept"]["first"]) == list(kept)


def test_calibrated_training_starts_without_matches(images: Path, tmp_path: Path) -> None:
    """They are in the statistics, where they cost no time: the norm behind a site is another, that before it is not."""
    from gatedprune.finetune.models import build

    torch.manual_seed(0)
    x = torch.randn(6, 3, 64, 64)
    options = {"model": "test_resnet", "calibrate": 6, "ratio": 0.5}
    plain, calibrated = (build(config(images, tmp_path, **options), "abc", images=found).model.eval()
                         for found in (None, lambda dense, example: [x]))  # fmt: skip
    assert calibrated.gate_modules.matched == ()
    norms = [p for p, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    moved = [p for p in norms if not torch.equal(*(m.get_submodule(p).running_mean for m in (plain, calibrated)))]
    assert moved == [p for p in norms if p != "conv1.1"]


def test_weights_of_other_classes_start_all_but_the_classifier(images: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from gatedprune.finetune.models import build

    donor = timm.create_model("test_resnet", num_classes=7)
    save_file(donor.state_dict(), tmp_path / "seven.safetensors")
    start = build(
        config(images, tmp_path, model="test_resnet", mode="dense", weights=str(tmp_path / "seven.safetensors")), "abc"
    )
    assert not start.trained_head and start.model.num_classes == 3
    assert torch.equal(start.model.layer1[0].conv1.weight, donor.layer1[0].conv1.weight)
    start = build(
        config(images, tmp_path, model="test_resnet", mode="dense", weights=str(tmp_path / "seven.safetensors")),
        "abcdefg",
    )
    assert start.trained_head and torch.equal(start.model.fc.weight, donor.fc.weight)


def test_weights_with_names_of_another_library(images: Path, tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    from gatedprune.finetune.models import build

    state = {f"_{name}": value for name, value in timm.create_model("test_resnet").state_dict().items()}
    save_file(state, tmp_path / "other.safetensors")
    options = config(images, tmp_path, model="test_resnet", mode="dense", weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(CheckpointError, match="other.safetensors .*other names than timm's"):
        build(options, "abc")
