"""Weights from a file fit in every key and shape, or are refused in one line and leave the model as it is."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from gatedprune.errors import CheckpointError
from gatedprune.io import load_weights, pretrained, weights


def model(classes: int = 5) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=classes)


@pytest.mark.parametrize("form", ["state dict", "safetensors", "checkpoint"])
def test_weights_come_back(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state, file = model().state_dict(), tmp_path / "weights.pth"
    if form == "safetensors":
        save_file(state, file := tmp_path / "weights.safetensors")
    else:
        torch.save(
            state if form == "state dict" else {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
            file,
        )
    found = load_weights(model(), file)
    assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


class _Evil:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def _files(folder: Path) -> dict[str, str]:
    """File name → what the error says of it."""
    state = model().state_dict()
    torch.save(state, folder / "whole.pth")
    save_file(state, folder / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        (folder / f"cut.{name}").write_bytes((folder / name).read_bytes()[:3000])
    (folder / "foreign.safetensors").write_text('{"no": "tensors"}')
    (folder / "foreign.pth").write_text("no weights")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "evil.pth").write_bytes(pickle.dumps(_Evil()))
    torch.save({"a": 1}, folder / "numbers.pth")
    torch.save([torch.ones(2)], folder / "list.pth")
    torch.save(model(7).state_dict(), folder / "head.pth")
    torch.save({k: v for k, v in state.items() if "layer1" not in k}, folder / "less.pth")
    torch.save({**state, "extra": torch.ones(1)}, folder / "more.pth")
    return {
        "nowhere.pth": "are not there",
        "cut.whole.pth": "cut off, or no checkpoint",
        "cut.whole.safetensors": "cut off, or no safetensors",
        "foreign.safetensors": "cut off, or no safetensors",
        "foreign.pth": "is damaged, or holds more than tensors",
        "empty.pth": "cut off, or no checkpoint",
        "evil.pth": "holds more than tensors, which is not loaded",
        "numbers.pth": "holds no state dict",
        "list.pth": "holds no state dict",
        "head.pth": r"shape of fc.weight, fc.bias differs \(fc.weight: \(7, 96\) in the file, \(5, 96\) in the model",
        "less.pth": r"it lacks layer1.0.conv1.weight, .* and \d+ more",
        "more.pth": "it has unknown extra",
    }


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    for name, why in _files(tmp_path).items():
        with pytest.raises(CheckpointError, match=why) as raised:
            load_weights(network, tmp_path / name)
        assert "\n" not in str(raised.value), name
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert "unpickled" not in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Name or service not known\nwith a second line")

    monkeypatch.setattr(weights.timm, "create_model", unreachable)
    with pytest.raises(
        CheckpointError, match=r"of resnet18 cannot be had .*Name or service not known\).*file of weights"
    ):
        pretrained("resnet18")
