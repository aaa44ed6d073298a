"""`bench`: every combination timed, what is missing said, and the numbers that it derives."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from gatedprune.compare import bench as module
from gatedprune.compare.bench import Benchmark, Cell, bench
from gatedprune.compare.static import prune_static
from gatedprune.engine import native
from gatedprune.errors import ConfigError, ModelError
from gatedprune.measure.environment import environment
from gatedprune.measure.latency import Latency
from gatedprune.testing.case import enliven
from gatedprune.wrapping import wrap

from ..tiny import SIZE, create

pytest.importorskip("torch_pruning")


@pytest.fixture(scope="module")
def result() -> Benchmark:
    model = timm.create_model("test_resnet").eval()
    return bench(model, [(64, 96)], ratios=[0.25, 0.5], batches=[1, 2], threads=[1, 2], repeats=2, warmup=1)


def test_every_combination(result: Benchmark) -> None:
    seen = [(c.size, c.ratio, c.batch, c.threads) for c in result.cells]
    assert seen == [((64, 96), r, b, t) for r in (0.25, 0.5) for b in (1, 2) for t in (1, 2)]
    for cell in result.cells:
        assert set(cell.latency) == set(cell.macs) == {"dense", "static", "dynamic"}
        assert cell.latency["dense"].batch == cell.batch and cell.latency["dense"].threads == cell.threads
        assert cell.macs["static"] < cell.macs["dynamic"] < cell.macs["dense"]
        assert cell.error < 1e-4
    more, fewer = (next(c for c in result.cells if c.ratio == r) for r in (0.25, 0.5))
    assert fewer.macs["dynamic"] < more.macs["dynamic"]


def test_predictors_of_low_rank(result: Benchmark) -> None:
    model = timm.create_model("test_resnet").eval()
    found = bench(model, [(64, 96)], ratios=[0.25], rank=4, repeats=1, warmup=0)
    assert found.cells[0].macs["static"] == result.cells[0].macs["static"]
    assert found.cells[0].macs["dynamic"] < result.cells[0].macs["dynamic"]
    assert "predictors of rank 4" in str(found)


def test_runtimes_get_the_threads_of_their_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def runtime(name: str) -> Callable[..., Callable[[Tensor], Tensor]]:
        def make(model: torch.nn.Module, x: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
            made.append((name, threads))
            return model

        return make

    monkeypatch.setattr(module, "RUNTIMES", {n: runtime(n) for n in ("recorded", "onnxruntime", "openvino")})
    found = bench(timm.create_model("test_resnet").eval(), [(64, 64)], threads=[1, 2], repeats=1, warmup=0,
                  runtimes=["recorded", "onnxruntime", "openvino"])  # fmt: skip
    assert made == [("recorded", 1), ("onnxruntime", 1), ("openvino", 1), ("onnxruntime", 2), ("openvino", 2)]
    assert all({"static, recorded", "static, onnxruntime", "static, openvino"} < set(c.latency) for c in found.cells)


def test_a_runtime_runs_what_gatedprune_cut() -> None:
    """Where torch-pruning fails: the model chooses a graph by the size of the image, which tracing does not see."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    x = torch.randn(1, 3, *timm.get_pretrained_cfg("test_resnet").input_size[1:])
    gated = wrap(enliven(timm.create_model("test_resnet")).eval(), ratio=0.5, example_inputs=x)
    static = prune_static(gated, example_inputs=x, by="gatedprune").model
    with torch.no_grad():
        found = module.RUNTIMES["onnxruntime"](static, x, 1)(x)[0]
        torch.testing.assert_close(torch.from_numpy(found), static(x), rtol=1e-3, atol=1e-4)


def test_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """All three are converted before they are timed, and the caller's model stays as it is."""
    seen: dict[str, set[torch.dtype]] = {}
    real = module.measure_latency

    def watched(models: dict[str, Callable[[Tensor], Tensor]], x: Tensor, **options: int) -> dict[str, Latency]:
        with torch.no_grad():
            seen.update({name: {x.dtype, m(x).dtype} for name, m in models.items()})
        return real(models, x, **options)

    monkeypatch.setattr(module, "measure_latency", watched)
    model = timm.create_model("test_resnet").eval()
    found = bench(model, [(64, 96)], dtype=torch.bfloat16, repeats=1, warmup=0)
    assert seen == dict.fromkeys(("dense", "static", "dynamic"), {torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "bfloat16" in str(found) and found.to_dict()["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="timed in float32"):
        bench(model, [(64, 96)], dtype=torch.bfloat16, runtimes=["recorded"])


def cell(dense: float, dynamic: float, macs: int) -> Cell:
    def latency(ms: float) -> Latency:
        return Latency(ms, ms, ms, 3, 1, 1, "cpu")

    times = {"dense": latency(dense), "dynamic": latency(dynamic)}
    return Cell((8, 8), 0.5, 1, 1, {"dense": 100, "dynamic": macs}, times, 0.0, ("no static column: because",))


def test_what_is_derived() -> None:
    one = cell(100.0, 50.0, 40)
    assert one.speedup == 2.0 and one.against_static is None
    assert one.realised == pytest.approx(0.5 / 0.6)
    assert cell(100.0, 40.0, 40).realised == pytest.approx(1.0)
    assert cell(100.0, 50.0, 100).realised is None


def test_a_missing_column_is_explained() -> None:
    text = str(Benchmark("m", (cell(100.0, 50.0, 40),), "torch", "float32", environment()))
    assert "no static column: because" in text and "83%" in text


def test_static_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise ModelError("it cannot be cut")

    monkeypatch.setattr(module, "prune_static", fails)
    found = bench(timm.create_model("test_resnet").eval(), [(64, 64)], repeats=1, warmup=0)
    assert set(found.cells[0].latency) == {"dense", "dynamic"}
    assert "it cannot be cut" in str(found)


def test_what_compiles_is_compiled_for_both_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static and dynamic alike, and none is thrown away when the next is compiled."""
    frames: list[object] = []
    real = torch.compile

    def compiled(model: torch.nn.Module) -> object:
        def eager(graph: torch.fx.GraphModule, inputs: object) -> object:
            frames.append(graph)
            return graph.forward

        return real(model, backend=eager)

    monkeypatch.setattr(torch, "compile", compiled)
    found = bench(timm.create_model("test_resnet").eval(), [(64, 64)], repeats=2, runtimes=["compile"])
    assert set(found.cells[0].latency) == {"dense", "static", "dynamic", "static, compile", "dynamic, compile"}
    assert len(frames) == 2, "one graph each, compiled once"
    assert "dynamic, compile ms" in str(found)


@pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_static_recorded_is_the_static_model(name: str) -> None:
    model = enliven(create(name))
    x = torch.randn(1, 3, SIZE, SIZE)
    recorded = module.RUNTIMES["recorded"](model, x, 1)
    with torch.no_grad():
        torch.testing.assert_close(recorded(x), model(x), rtol=1e-4, atol=1e-4)
    names = [type(m).__name__ for m in model.modules()]
    assert name != "test_resnet" or "BatchNorm2d" in names, "the model itself keeps its norms"
    found = bench(create(name), [x.shape[2:]], repeats=1, warmup=0, runtimes=["recorded"])
    assert "static, recorded ms" in str(found)


def test_bad_requests() -> None:
    model = timm.create_model("test_resnet").eval()
    with pytest.raises(ConfigError, match="at least one size"):
        bench(model, [])
    with pytest.raises(ConfigError, match="Unknown runtime 'tvm'.*compile"):
        bench(model, [(64, 64)], runtimes=["tvm"])


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plot(result: Benchmark, tmp_path: Path) -> None:
    for name in ("plot.svg", "plot.png"):
        result.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
