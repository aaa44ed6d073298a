"""On a GPU: mixed precision, compiled training, calibration where the model lies, workers that stay."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch

from gatedprune import wrap
from gatedprune.finetune import FinetuneConfig, finetune, load_finetuned
from gatedprune.training import calibrate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"compile": True},
                                     {"precision": "bf16", "ema": 0.9, "channels_last": True, "workers": 2}],
                         ids=lambda o: "-".join(o))  # fmt: skip
def test_trains(images: Path, tmp_path: Path, mode: str, options: dict) -> None:
    result = finetune(FinetuneConfig("test_resnet", str(images), str(tmp_path / "out"), mode=mode, ratio=0.5, epochs=4,
                                     batch_size=8, calibrate=8, size=(64, 64), lr=0.02, **options),
                      progress=False)  # fmt: skip
    assert len(result.log) == 4 and all(math.isfinite(row["train_loss"]) for row in result.log)
    assert result.log[-1]["train_loss"] < result.log[0]["train_loss"] or result.top1 > 50
    model = load_finetuned(result.folder)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64, 64))).all()


def test_calibration_is_the_same_as_on_a_cpu() -> None:
    torch.manual_seed(0)
    batches = torch.randn(32, 3, 64, 64).split(8)
    gates = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        gated = wrap(timm.create_model("test_resnet").eval(), example_inputs=batches[0][:1]).to(device)
        calibrate(gated, batches)
        gates.append({name: gate.bias.detach().cpu() for name, gate in gated.gates.items()})
    for name, bias in gates[0].items():
        torch.testing.assert_close(gates[1][name], bias, rtol=1e-2, atol=1e-2 * float(bias.abs().max()))
