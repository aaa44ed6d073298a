"""Saved folders: the same model bit for bit, refused by name where they do not belong, never half there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gatedprune
from gatedprune import files
from gatedprune.adapters.depth import DepthModel
from gatedprune.errors import CheckpointError, ConfigError, ModelError
from gatedprune.io import is_saved


def trained(model: nn.Module, ratio: Any = 0.5, size: int = 64, **options: Any) -> Any:
    """Gated, with parameters and statistics that no constructor gives."""
    gated = gatedprune.wrap(model, ratio, example_inputs=torch.zeros(2, 3, size, size), **options)
    with torch.no_grad():
        for value in gated.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.1 * torch.rand_like(value))
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn_like(gate.weight) * 0.05)
    return gated.eval()


def outputs(model: nn.Module, size: int = 64) -> list[Tensor]:
    parameter = next(model.parameters())
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)).to(parameter)
    with torch.no_grad():
        y = model(x)
    return list(y) if isinstance(y, (list, tuple)) else [y]


def assert_same(one: nn.Module, other: nn.Module, size: int = 64) -> None:
    assert all(torch.equal(a, b) for a, b in zip(outputs(one, size), outputs(other, size), strict=True))
    assert outputs(one, size)[0].abs().sum() > 0
    assert {n: g.active_count for n, g in one.gates.items()} == {n: g.active_count for n, g in other.gates.items()}
    assert one.gate_config == other.gate_config
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][k], v) and states[0][k].dtype == v.dtype for k, v in states[1].items())


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    return gatedprune.save(trained(timm.create_model("test_resnet")), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    config = json.loads((folder / "gatedprune.json").read_text())
    change(config)
    (folder / "gatedprune.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    """Also what a hand that knows the format would write: the checksum fits."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    edit(folder, lambda c: c["weights"].update(sha256=hashlib.sha256(file.read_bytes()).hexdigest()))


@pytest.mark.parametrize(("name", "args", "options"), [
    ("test_resnet", {}, {}),
    ("test_resnet.r160_in1k", {"num_classes": 5, "global_pool": "max"}, {"ratio": {"layer1*": 0.25, "layer2*": 0.75}}),
    ("test_efficientnet", {"features_only": True, "out_indices": (1, 3)}, {"boost": False, "stream": True}),
    ("test_vit", {"img_size": 64, "global_pool": "avg"}, {"round_to": 4}),
    ("test_convnext", {"in_chans": 3, "num_classes": 0}, {"macs": 0.7}),
])  # fmt: skip
def test_a_timm_model_comes_back_bit_for_bit(name: str, args: dict, options: dict, tmp_path: Path) -> None:
    options = {"ratio": None, **options}
    gated = trained(timm.create_model(name, **args), **options)
    state = torch.get_rng_state()
    assert gatedprune.save(gated, tmp_path / "m") == tmp_path / "m"
    again = gatedprune.load(tmp_path / "m")
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m.training for m in again.modules())
    assert type(again)._gatedprune_base is type(gated)._gatedprune_base
    assert_same(gated, again)
    text = json.loads((tmp_path / "m" / "gatedprune.json").read_text())
    assert text["architecture"]["timm"].split(".")[0] == name.split(".")[0]
    assert text["versions"]["timm"] == timm.__version__
    assert sorted(os.listdir(tmp_path / "m")) == ["gatedprune.json", "model.safetensors"]


def test_ratios_set_later_and_the_compact_model_come_back(tmp_path: Path) -> None:
    gated = trained(timm.create_model("test_resnet"))
    gated.set_ratio({"layer1*": 0.25, "layer3*": 0.8})
    again = gatedprune.load(gatedprune.save(gated, tmp_path / "m"))
    assert_same(gated, again)
    shape = torch.zeros(1, 3, 64, 64)
    one, other = (gatedprune.compact(g, shape, backend="torch") for g in (gated, again))
    assert torch.equal(outputs(one)[0], outputs(other)[0])


def test_a_folder_from_before_gains_were_bounded_keeps_its_numbers(folder: Path) -> None:
    assert gatedprune.load(folder).gate_config.max_gain == 4.0
    edit(folder, lambda c: c["gates"].pop("max_gain"))
    old = gatedprune.load(folder)
    assert old.gate_config.max_gain is None
    assert all(gate.max_gain is None for gate in old.gates.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    gated = trained(timm.create_model("test_resnet")).to(dtype)
    assert_same(gated, gatedprune.load(gatedprune.save(gated, tmp_path / "m")))


def test_a_model_of_ones_own_is_given_to_load(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return DepthModel("test_resnet", pretrained=False, decoder_channels=(20, 16, 12, 8, 8))

    gated = trained(build())
    gatedprune.save(gated, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"holds a .*DepthModel, which .*load\(directory, model=my_model\)"):
        gatedprune.load(tmp_path / "m")
    mine = build()
    again = gatedprune.load(tmp_path / "m", mine)
    assert again is mine
    assert_same(gated, again)


class Odd(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_another_model_of_ones_own_is_refused_and_left_alone(tmp_path: Path) -> None:
    gatedprune.save(trained(Odd()), tmp_path / "m")
    for wrong, why in ((Odd(9), r"a.weight is \(8, 3, 3, 3\), not \(9"), (nn.Conv2d(3, 4, 3), "weight is missing"),
                       (Odd().double(), "float32, not torch.float64")):  # fmt: skip
        before = {k: v.clone() for k, v in wrong.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"{why}.*Give the model that was saved"):
            gatedprune.load(tmp_path / "m", wrong)
        assert not gatedprune.is_gated(wrong)
        assert all(torch.equal(before[k], v) for k, v in wrong.state_dict().items())
    with pytest.raises(CheckpointError, match="leave it unwrapped"):
        gatedprune.load(tmp_path / "m", trained(Odd()))
    with pytest.raises(ConfigError, match="model_args"):
        gatedprune.save(trained(Odd()), tmp_path / "n", model_args={})


def test_another_architecture_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds a 'test_resnet.*', but `model` is a 'test_convnext"):
        gatedprune.load(folder, timm.create_model("test_convnext"))
    edit(folder, lambda c: c["architecture"].update(timm="test_efficientnet"))
    with pytest.raises(CheckpointError, match=r"test_efficientnet: .* missing.*more"):
        gatedprune.load(folder)
    edit(folder, lambda c: c["architecture"].update(timm="resnet_of_the_future"))
    with pytest.raises(CheckpointError, match=r"cannot build 'resnet_of_the_future'.*Saved with.*timm"):
        gatedprune.load(folder)


def test_another_format_is_refused_by_name(folder: Path) -> None:
    edit(folder, lambda c: c.update(format=2))
    with pytest.raises(CheckpointError, match=r"has format 2; gatedprune .* reads format 1.*wrote it \(\d"):
        gatedprune.load(folder)


@pytest.mark.parametrize(("change", "why"), [
    (lambda t: t.pop("bn1.bias"), "bn1.bias is missing"),
    (lambda t: t.update(extra=torch.zeros(1)), "extra is foreign"),
    (lambda t: t.update({"bn1.weight": torch.zeros(3)}), r"bn1.weight is \(3,\), not"),
    (lambda t: [t.pop(k) for k in list(t) if k.endswith("conv1/start") or k.endswith(".start")], "start is missing"),
])  # fmt: skip
def test_missing_and_foreign_tensors_are_named(folder: Path, change: Callable, why: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=why):
        gatedprune.load(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        gatedprune.load(folder)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit
    with pytest.raises(CheckpointError, match="is not the file that gatedprune.json was saved with"):
        gatedprune.load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        gatedprune.load(folder)


@pytest.mark.parametrize(("change", "why"), [
    (lambda c: c["sites"][0].update(active=10**6), "is damaged"),
    (lambda c: c["sites"].pop(), "of other sites than this model has"),
    (lambda c: c["sites"][0].update(name="elsewhere"), "only there: elsewhere"),
    (lambda c: c["gates"].update(ratio=7), "is damaged"),
    (lambda c: c["gates"].update(surprise=7), "surprise"),
    (lambda c: c.pop("weights"), "is damaged"),
    (lambda c: c.pop("format"), "does not say which format"),
    (lambda c: c["inputs"][0].update(dtype="complex9"), "is damaged"),
    (lambda c: c.update(macs=1), "a model of 1 MACs"),
])  # fmt: skip
def test_a_damaged_description_is_refused(folder: Path, change: Callable, why: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=why):
        gatedprune.load(folder)


def test_what_is_no_saved_folder(tmp_path: Path, folder: Path) -> None:
    assert is_saved(folder) and not is_saved(tmp_path)
    for other in (tmp_path, tmp_path / "missing", folder / "gatedprune.json"):
        with pytest.raises(CheckpointError, match=r"is no folder that gatedprune.save\(\) wrote"):
            gatedprune.load(other)
    (folder / "gatedprune.json").write_text("{")
    with pytest.raises(CheckpointError, match="it is no JSON"):
        gatedprune.load(folder)


def test_an_interrupted_save_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "log.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    gated = trained(timm.create_model("test_convnext"))

    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: No space left on device")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written .*No space left.*Nothing was changed"):
            gatedprune.save(gated, folder)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_put", killed)
        with pytest.raises(KeyboardInterrupt):
            gatedprune.save(gated, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]
    gatedprune.save(gated, folder)
    assert_same(gated, gatedprune.load(folder))
    assert (folder / "log.txt").read_text() == "mine"


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            gatedprune.save(trained(Odd()), target)
    assert (tmp_path / "file").read_text() == "mine" and len(os.listdir(tmp_path)) == 1
    with pytest.raises(ModelError, match=r"save\(\) takes a model that gatedprune.wrap"):
        gatedprune.save(Odd(), tmp_path / "m")  # type: ignore[arg-type]


def test_arguments_that_leave_no_trace_are_given(tmp_path: Path) -> None:
    args = {"stem_width": 24, "drop_path_rate": 0.1}
    gated = trained(timm.create_model("test_resnet", **args))
    with pytest.warns(UserWarning, match=r"could not be found out .*model_args=dict"):
        gatedprune.save(gated, tmp_path / "m")
    with pytest.raises(CheckpointError, match="model=my_model"):
        gatedprune.load(tmp_path / "m")
    assert_same(gated, gatedprune.load(tmp_path / "m", timm.create_model("test_resnet", **args)))
    with pytest.raises(ConfigError, match="does not build this model: .* differs"):
        gatedprune.save(gated, tmp_path / "n", model_args={"stem_width": 8})
    with pytest.raises(ConfigError, match="must be JSON values"):
        gatedprune.save(gated, tmp_path / "n", model_args={"act_layer": nn.ReLU})
    gatedprune.save(gated, tmp_path / "n", model_args=args)
    assert_same(gated, gatedprune.load(tmp_path / "n"))


def test_the_hub_gets_and_gives_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, seen = trained(timm.create_model("test_resnet")), {}

    def upload(*, repo_id: str, folder_path: Path, **rest: Any) -> str:
        shutil.copytree(folder_path, tmp_path / repo_id)
        seen.update(rest)
        return "address"

    def download(repo_id: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        seen["revision"] = revision
        assert sorted(allow_patterns) == ["gatedprune.json", "model.safetensors"]
        return str(tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo, **options: seen.update(repo=repo, **options))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert gatedprune.push_to_hub(gated, "me/gated", private=True, revision="dev") == "address"
    assert seen["repo"] == "me/gated" and seen["private"] and seen["exist_ok"] and seen["revision"] == "dev"
    assert sorted(os.listdir(tmp_path / "me/gated")) == ["README.md", "gatedprune.json", "model.safetensors"]
    assert 'from_pretrained("me/gated")' in (tmp_path / "me/gated/README.md").read_text()
    assert_same(gated, gatedprune.from_pretrained("me/gated", revision="v1"))
    assert seen["revision"] == "v1"
    assert_same(gated, gatedprune.from_pretrained(tmp_path / "me/gated"))
    with pytest.raises(ConfigError, match="revision: for repositories"):
        gatedprune.from_pretrained(tmp_path / "me/gated", revision="v1")


def test_a_hub_out_of_reach_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("An error happened while trying to locate the files.\nmore lines")

    for name in ("snapshot_download", "create_repo"):
        monkeypatch.setattr(huggingface_hub, name, offline)
    with pytest.raises(
        CheckpointError, match=r"'me/gated' is no folder here.*Check the name, the connection"
    ) as caught:
        gatedprune.from_pretrained("me/gated")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="could not be uploaded to 'me/gated'"):
        gatedprune.push_to_hub(trained(Odd()), "me/gated")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="HFValidationError"):
        gatedprune.from_pretrained("not a/valid/name")
