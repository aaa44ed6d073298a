"""Checkpoints: whole or not at all, rebuilt as they were, and refused by name when they do not belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import gatedprune
from gatedprune.errors import CheckpointError
from gatedprune.examples.kitti.checkpoint import (
    ModelSpec,
    load_model,
    load_state,
    read_spec,
    save_model,
    save_state,
)


@pytest.mark.parametrize("gates", [None, gatedprune.GateConfig(ratio=0.25, exclude=("decoder.*",)).to_dict()])
def test_a_model_comes_back_with_its_gates(spec: ModelSpec, tmp_path: Path, gates: dict | None) -> None:
    spec = replace(spec, gates=gates, decoder_channels=(20, 16, 12, 8, 8))
    model = spec.build().eval()
    save_model(tmp_path / "model.safetensors", model, spec)
    torch.manual_seed(1)
    again, found = load_model(tmp_path / "model.safetensors")
    assert found == spec
    assert gatedprune.is_gated(again) == (gates is not None)
    with torch.no_grad():
        assert torch.equal(again(spec.example()), model(spec.example()))


def test_another_backbone_is_refused_by_name(checkpoint: Path) -> None:
    assert read_spec(checkpoint, backbone="test_resnet").backbone == "test_resnet"
    with pytest.raises(CheckpointError, match=r"on 'test_resnet', but 'resnet50' was asked for"):
        load_model(checkpoint, backbone="resnet50")


def test_what_is_no_checkpoint_of_a_depth_model(tmp_path: Path, spec: ModelSpec) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"does not say which depth model.*--weights"):
        load_model(tmp_path / "backbone.safetensors")
    (tmp_path / "note.safetensors").write_text("no tensors")
    for name in ("note.safetensors", "missing.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
            load_model(tmp_path / name)
    wide = replace(spec, decoder_channels=24)
    save_model(tmp_path / "wrong.safetensors", wide.build(), spec)
    with pytest.raises(CheckpointError, match="do not fit the 'test_resnet' depth model"):
        load_model(tmp_path / "wrong.safetensors")


def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(damaged)


def test_states_hold_plain_data_only(tmp_path: Path, spec: ModelSpec) -> None:
    save_state(tmp_path / "state.pt", {"epoch": 3, "model": {"w": torch.ones(2)}}, spec)
    assert load_state(tmp_path / "state.pt", spec)["epoch"] == 3
    torch.save({"spec": spec.to_json(), "code": Path}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match=r"code\.pt cannot be read"):
        load_state(tmp_path / "code.pt", spec)


def test_the_spec_survives_json() -> None:
    spec = ModelSpec("resnet18", (64, 32, 16, 16, 16), 2.0, 50.0, gates=gatedprune.GateConfig().to_dict())
    assert ModelSpec.from_json(spec.to_json()) == spec
