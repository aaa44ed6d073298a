"""Exported files give the compact model's numbers on inputs with different active sets, or are not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.engine import freeze
from gatedprune.errors import ConfigError, ExportError, ModelError
from gatedprune.export import batched as batched_module
from gatedprune.export import exporter
from gatedprune.export.check import check_model
from gatedprune.export.formats import FORMATS, Format
from gatedprune.functional import active_set
from gatedprune.training import most_used

from ..tiny import OPTIONS, SIZE

# A model of each kind of site: convolutions, depthwise and grouped ones, squeeze-excite, group norms, hidden units,
# heads, a gated residual stream, predictors of low rank.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "resnet": ("test_resnet", {}, {}),
    "one stage": ("test_resnet", {}, {"include": "layer4*"}),
    "stream": ("test_resnet", {}, {"stream": True, "boost": False}),
    "efficientnet": ("test_efficientnet", {}, {}),
    "signed": ("test_efficientnet", {}, {"signed": True}),
    "group norm": ("test_efficientnet_gn", {}, {"round_to": 8}),
    "convnext": ("test_convnext", {}, {"rank": 4}),
    "vit": ("test_vit", OPTIONS["test_vit"], {}),
    "byobnet": ("test_byobnet", {}, {}),
}


def gated_model(case: str, seed: int = 0) -> Any:
    name, args, options = CASES[case]
    torch.manual_seed(seed)
    gated = gatedprune.wrap(
        timm.create_model(name, **args), 0.5, example_inputs=torch.zeros(1, 3, SIZE, SIZE), **options
    )
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn_like(gate.weight) * 0.3)
    return gated.eval()


def small_model(size: int = 12, pool: bool = False) -> Any:
    """Two gates, for what does not hang on the kind of site. With pooling it takes images of any size."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)]
    if pool:
        layers[:2] = nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        layers.append(nn.AdaptiveAvgPool2d(1))
    gated = gatedprune.wrap(nn.Sequential(*layers, nn.Flatten()), 0.5, example_inputs=torch.zeros(1, 3, size, size))
    with torch.no_grad():
        for gate in gated.gates.values():
            gate.weight.add_(torch.randn_like(gate.weight) * 0.3)
    return gated.eval()


def images(samples: int, size: int = SIZE, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, size, size, generator=generator)
    return x * torch.rand(samples, 3, 1, 1, generator=generator) + torch.randn(samples, 3, 1, 1, generator=generator)


def assert_as_compact(run: Any, gated: Any, sizes: tuple[int, ...]) -> None:
    """Against plain PyTorch's masked model, whose choice differs between the samples."""
    for samples in sizes:
        x = images(samples)
        with torch.no_grad():
            wanted = gated(x)
        if samples > 1:
            assert any(len({tuple(row) for row in g.last_active.tolist()}) > 1 for g in gated.gates.values())
        (found,) = run(x)
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_batched_operators_equal_the_engine(case: str, batch: int | None) -> None:
    gated = gated_model(case)
    fast = gatedprune.compact(gated, images(2), backend="torch")
    x = images(batch or 4)
    wanted = fast(x)
    graph = fast.prepare(x)
    exporter.batched(graph, graph.graph, batch)
    with torch.no_grad():
        found = graph(x)
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_torch_export_program_takes_any_batch(tmp_path: Path) -> None:
    gated = gated_model("vit")
    gatedprune.export(gated, tmp_path / "m.pt2", "torch-export", check=False)
    module = torch.export.load(tmp_path / "m.pt2").module()
    assert_as_compact(lambda x: [module(x)], gated, (1, 2, 5))


def test_torchscript_takes_any_batch(tmp_path: Path) -> None:
    gated = gated_model("resnet")
    made = gatedprune.export(gated, tmp_path / "m.pt", "torchscript")
    assert made.active_sets is not None and made.active_sets > 1
    module = torch.jit.load(tmp_path / "m.pt")
    with torch.no_grad():
        assert_as_compact(lambda x: [module(x)], gated, (1, 2, 5))


def test_torchscript_of_views_takes_a_fixed_batch(tmp_path: Path) -> None:
    gated = gated_model("vit")
    with pytest.raises(ExportError, match="torchscript file does not run on inputs .*such as batch=1"):
        gatedprune.export(gated, tmp_path / "m.pt", "torchscript")
    assert not os.listdir(tmp_path)
    made = gatedprune.export(gated, tmp_path / "m.pt", "torchscript", batch=2)
    assert made.batch == 2 and made.active_sets is not None and made.active_sets > 1


@pytest.mark.parametrize(("format", "batch"), [("torch-export", None), ("torchscript", 1)])
def test_any_image_size(format: str, batch: int | None, tmp_path: Path) -> None:
    gated = small_model(SIZE, pool=True)
    made = gatedprune.export(gated, tmp_path / "m", format, any_size=True, batch=batch)
    assert made.inputs == ((batch, 3, None, None),) and len(made.sizes) == 4 and (SIZE, SIZE) in made.sizes
    assert "x3xheightxwidth" in str(made) and "sizes 64x64 96x96" in str(made)
    module = torch.jit.load(tmp_path / "m") if format == "torchscript" else torch.export.load(tmp_path / "m").module()
    x = images(batch or 2, 80)[:, :, :75]
    with torch.no_grad():
        torch.testing.assert_close(module(x), gated(x), rtol=1e-4, atol=1e-5)


class Sized(nn.Module):
    """Padding that is worked out from the size: right for one parity only, once it stands in a graph."""

    def __init__(self, position: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 4, 1)
        self.position = nn.Parameter(torch.zeros(1, 16, 5, 5)) if position else None

    def forward(self, x: Tensor) -> Tensor:
        odd = (x.shape[2] % 2, x.shape[3] % 2)
        x = self.a(nn.functional.pad(x, (0, odd[1], 0, odd[0]))).relu()
        x = x if self.position is None else x + self.position
        return self.b(x).mean((2, 3))


@pytest.mark.parametrize(
    ("position", "format"), [(True, "torch-export"), (False, "torchscript"), (True, "torchscript")]
)
def test_a_size_that_is_written_into_the_graph_is_refused(position: bool, format: str, tmp_path: Path) -> None:
    gated = gatedprune.wrap(Sized(position), 0.5, example_inputs=torch.zeros(1, 3, 11, 11)).eval()
    with pytest.raises(
        ExportError, match="written into its graph|does not compute|takes no other image size|does not run"
    ):
        gatedprune.export(gated, tmp_path / "m", format, any_size=True)
    assert not os.listdir(tmp_path)
    gatedprune.export(gated, tmp_path / "m", format)
    with pytest.raises(ConfigError, match="`any_size` of export.. needs `check`"):
        gatedprune.export(gated, tmp_path / "m", format, any_size=True, check=False)


def test_a_static_model_is_exported_too(tmp_path: Path) -> None:
    gated = small_model()
    active, gains = most_used(gated, [images(6, 12)])
    frozen = freeze(gated, active, (torch.zeros(1, 3, 12, 12),), gains)
    gatedprune.export(frozen, tmp_path / "m.pt2", "torch-export", example_inputs=torch.zeros(1, 3, 12, 12))
    x = images(3, 12, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(x), frozen(x), rtol=1e-4, atol=1e-5)


# Those of the command in docs/save_and_export.md.
TEN_FAMILIES = (
    "resnet18", "mobilenetv2_050", "tf_efficientnet_lite0", "mobilenetv3_small_050", "regnety_002", "densenet121",
    "convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224", "repvgg_a0",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", TEN_FAMILIES)
def test_ten_families_in_onnx_runtime(model: str) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    found = check_model(model, repeats=1)
    assert found.difference < 1e-4 and found.active_sets > 1


def test_the_result_says_what_was_written_and_checked(tmp_path: Path) -> None:
    gated = small_model()
    made = gatedprune.export(gated, tmp_path / "m.pt2", "torch-export")
    assert made.batch is None and made.inputs == ((None, 3, 12, 12),) and made.bytes > 1000
    assert made.difference is not None and made.difference < 1e-5 and made.active_sets == 4
    fast = gatedprune.compact(gated, images(1, 12), backend="torch")
    made = gatedprune.export(fast, tmp_path / "m.pt2", "torch-export", batch=2, example_inputs=images(1, 20))
    assert made.inputs == ((2, 3, 20, 20),) and made.to_dict()["inputs"] == [[2, 3, 20, 20]]
    assert "takes 2x3x20x20; run again and compared" in str(made)


@pytest.mark.parametrize(
    ("case", "batch"), [("one stage", None), ("vit", 1), pytest.param("resnet", None, marks=pytest.mark.slow)]
)
def test_onnx_runtime_gives_the_same_numbers(case: str, batch: int | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
    gated = gated_model(case)
    gatedprune.export(gated, tmp_path / "m.onnx", batch=batch, check=False)
    assert os.listdir(tmp_path) == ["m.onnx"]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    samples, *rest = session.get_inputs()[0].shape
    assert rest == [3, SIZE, SIZE]
    if batch is None and torch.__version__.startswith("2.6."):
        assert isinstance(samples, str)  # free, but torch 2.6 gives it a name of its own
    else:
        assert samples == (batch or "batch")
    assert [value.name for value in session.get_outputs()] == ["output"]

    def run(x: Tensor) -> list[Tensor]:
        parts = [x] if batch is None else x.split(batch)
        return [torch.cat([torch.from_numpy(session.run(None, {"input": p.numpy()})[0]) for p in parts])]

    assert_as_compact(run, gated, (1, 2, 5))


def test_equal_saliencies_are_decided_alike(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    gated = small_model()
    with torch.no_grad():
        for gate in gated.gates.values():  # every channel ranks the same: the lower index must win, also in ONNX
            gate.weight.zero_()
            gate.bias.fill_(1.0)
            gate.start.fill_(1.0)
    made = gatedprune.export(gated, tmp_path / "m.onnx", batch=1)
    assert made.difference is not None and made.difference < 1e-5 and made.active_sets == 1


@pytest.mark.parametrize("channels", [1, 2, 7, 40])
def test_winners_do_not_hang_on_how_a_runtime_orders_equal_values(channels: int) -> None:
    """OpenVINO's TopK has equal values in any order."""
    generator = torch.Generator().manual_seed(channels)
    g = torch.randint(0, 3, (50, channels), generator=generator).float()
    for k in range(1, channels + 1):
        assert torch.equal(batched_module._active_set(g, k), active_set(g, k))


@pytest.mark.parametrize(("whole", "batch"), [(False, None), (True, 1), (False, 2)])
def test_openvino_gives_the_same_numbers(whole: bool, batch: int | None, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip("openvino", reason="needs the package openvino")
    gated = gated_model("resnet") if whole else small_model()
    with torch.no_grad():
        for gate in gated.gates.values():  # every other channel is level with its like
            gate.weight[::2] = 0
            gate.bias[::2] = gate.bias.median()
            gate.start[::2] = gate.bias.median()
    made = gatedprune.export(gated, tmp_path / "m.onnx", batch=batch)
    assert made.runtimes == ("openvino",) and made.active_sets > 1


def broken(monkeypatch: pytest.MonkeyPatch, **replace: Any) -> None:
    one = FORMATS["torch-export"]
    new = Format(one.suffix, replace.get("write", one.write), replace.get("read", one.read))
    monkeypatch.setitem(FORMATS, "torch-export", new)


def test_a_file_with_other_numbers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated, target = small_model(), tmp_path / "m.pt2"
    target.write_text("the one before")
    read = FORMATS["torch-export"].read
    spoilt = [
        (lambda y: y * 1.001, r"does not compute .* It was not kept"),
        (lambda y: y * torch.nan, "does not compute"),
        (lambda y: y[:, :5], r"returns tensors of shapes \[\(1, 5\)\]"),
    ]
    for spoil, why in spoilt:

        def spoiled(path: str, spoil: Any = spoil) -> Any:
            run = read(path)
            return lambda *args: [spoil(y) for y in run(*args)]

        with monkeypatch.context() as patch:
            broken(patch, read=spoiled)
            with pytest.raises(ExportError, match=why):
                gatedprune.export(gated, target, "torch-export", batch=1)
    assert target.read_text() == "the one before" and os.listdir(tmp_path) == ["m.pt2"]


def test_a_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = small_model()
    (tmp_path / "file").write_text("mine")

    def full(program: Any, args: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ExportError, match=r"file/m.pt2 cannot be written .*Nothing was changed"):
        gatedprune.export(gated, tmp_path / "file" / "m.pt2", "torch-export", batch=1)
    broken(monkeypatch, write=full)
    with pytest.raises(ExportError, match="No space left on device"):
        gatedprune.export(gated, tmp_path / "file", "torch-export", batch=1)
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]


class Two(nn.Module):
    """Two inputs, two results, and a number of samples that may not vary."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.fixed = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3), fixed

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = self.b(self.a(x).relu())
        x = x.reshape(2, -1) if self.fixed else x.flatten(1)
        return x, x.mean(1) + y


def test_several_inputs_and_a_batch_that_is_written_into_the_model(tmp_path: Path) -> None:
    args = (torch.zeros(2, 3, 8, 8), torch.zeros(2))
    gated = gatedprune.wrap(Two(), 0.5, example_inputs=args).eval()
    made = gatedprune.export(gated, tmp_path / "m.pt2", "torch-export")
    assert made.inputs == ((None, 3, 8, 8), (None,))
    fixed = gatedprune.wrap(Two(fixed=True), 0.5, example_inputs=args).eval()
    with pytest.raises(ExportError, match="has the batch size written into it"):
        gatedprune.export(fixed, tmp_path / "n.pt2", "torch-export")
    assert gatedprune.export(fixed, tmp_path / "n.pt2", "torch-export", batch=2).difference is not None


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    gated = small_model()
    with pytest.raises(ConfigError, match=r"must be one of 'onnx', 'torch-export', 'torchscript'. Got 'tflite'"):
        gatedprune.export(gated, tmp_path / "m", "tflite")
    with pytest.raises(ConfigError, match="`batch` of export"):
        gatedprune.export(gated, tmp_path / "m", batch=0)
    with pytest.raises(ModelError, match="is not gated"):
        gatedprune.export(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ExportError, match=r"do not compute in bfloat16: .*\.float\(\)"):
        gatedprune.export(gated.bfloat16(), tmp_path / "m")
    assert not os.listdir(tmp_path)
