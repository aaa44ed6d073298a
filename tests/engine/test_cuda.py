"""On a GPU: the compact model is the masked one, computed by plain PyTorch."""

from __future__ import annotations

import pytest
import timm
import torch

from gatedprune import compact, wrap
from gatedprune.errors import BackendError
from gatedprune.testing.case import enliven, excite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MODELS = [
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "test_convnext",
    "test_vit",
    "test_nfnet",
    "test_mambaout",
]


@pytest.mark.parametrize("share", ["sample", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_compact_equals_masked(name: str, share: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, *timm.get_pretrained_cfg(name).input_size[1:], dtype=torch.float64)
    model = enliven(timm.create_model(name)).eval().double()
    gated = excite(wrap(model, example_inputs=x), (x,)).cuda()
    x = x.cuda()
    fast = compact(gated, x, share=share)
    assert fast.backend == "torch"
    with torch.no_grad():
        out, wanted = fast(x), gated(x)
    assert out.is_cuda
    if share == "sample":
        assert all(torch.equal(fast.last_active[n], gate.last_active) for n, gate in gated.gates.items())
        torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    else:
        assert torch.isfinite(out).all()


def test_the_native_engine_is_for_cpus() -> None:
    x = torch.randn(1, 3, 64, 64)
    gated = wrap(timm.create_model("test_resnet").eval(), example_inputs=x).cuda()
    with pytest.raises(BackendError, match="CPU"):
        compact(gated, x.cuda(), backend="native")(x.cuda())
