"""The depth model: any backbone, any size, bounded metres, traceable, gateable, clear about wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import gatedprune
from gatedprune.adapters.depth import DepthModel
from gatedprune.errors import CheckpointError, ConfigError, DataError, ModelError

# Backbone, options, size, up-sampling stages. Maps in NCHW and NHWC, the first at stride 1, 2, 4 or 16.
BACKBONES = [
    ("test_resnet", None, (75, 133), 5),
    ("test_efficientnet", None, (64, 96), 5),
    ("test_convnext", None, (70, 99), 5),
    ("test_vit", {"img_size": (96, 160)}, (96, 160), 6),
    ("swin_tiny_patch4_window7_224", {"img_size": (64, 96)}, (64, 96), 5),
    ("vgg11", None, (65, 67), 5),
]


@pytest.mark.parametrize(("name", "options", "size", "stages"), BACKBONES, ids=[b[0] for b in BACKBONES])
def test_any_backbone(name: str, options: dict | None, size: tuple[int, int], stages: int) -> None:
    model = DepthModel(name, decoder_channels=24, backbone_options=options).eval()
    with torch.no_grad():
        depth = model(torch.rand(2, 3, *size))
    assert depth.shape == (2, 1, *size)
    assert len(model.decoder.stages) == stages
    assert torch.isfinite(depth).all() and depth.std() > 0


def test_five_stages_like_the_paper() -> None:
    model = DepthModel("test_resnet", decoder_channels=(40, 32, 24, 16, 8)).eval()
    assert [stage.conv2.out_channels for stage in model.decoder.stages] == [40, 32, 24, 16, 8]
    sizes = []
    for stage in model.decoder.stages:
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[-2:])))
    model(torch.rand(1, 3, 224, 320))
    assert sizes == [(14, 20), (28, 40), (56, 80), (112, 160), (224, 320)]


def test_depth_stays_within_its_bounds_however_large_the_logits() -> None:
    model = DepthModel("test_resnet", decoder_channels=16, min_depth=2.0, max_depth=50.0).eval()
    for bias, bound in ((1e4, 50.0), (-1e4, 2.0)):
        nn.init.constant_(model.head.bias, bias)
        assert torch.equal(model(torch.rand(1, 3, 32, 32)), torch.full((1, 1, 32, 32), bound))


def test_the_input_is_normalised_as_the_backbone_was_pretrained() -> None:
    model = DepthModel("test_resnet", decoder_channels=16)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.eval()(torch.full((1, 3, 32, 32), 0.5))
    config = model.backbone.pretrained_cfg
    expected = (0.5 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)


def test_the_backbones_own_checkpoint_loads() -> None:
    features = timm.create_model("test_resnet", features_only=True)
    model = DepthModel("test_resnet", decoder_channels=16)
    model.backbone.load_state_dict(features.state_dict())
    assert set(model.state_dict()) >= {f"backbone.{key}" for key in features.state_dict()}


def test_export_traces_it_and_agrees() -> None:
    model = DepthModel("test_resnet", decoder_channels=16).eval()
    image = torch.rand(1, 3, 45, 70)
    exported = torch.export.export(model, (image,)).module()
    torch.testing.assert_close(exported(image), model(image))


@pytest.fixture(scope="module")
def gated() -> nn.Module:
    torch.manual_seed(0)
    model = DepthModel("test_resnet", decoder_channels=16).eval()
    return gatedprune.wrap(model, ratio=0.5, example_inputs=torch.rand(1, 3, 64, 96))


def test_encoder_and_decoder_are_gated(gated: nn.Module) -> None:
    names = list(gated.gates)
    assert {name for name in names if name.startswith("decoder.")} >= {f"decoder.stages.{i}.conv1" for i in range(5)}
    assert any(name.startswith("backbone.") for name in names)
    assert isinstance(gated, DepthModel)


def test_compact_and_static_work_on_it(gated: nn.Module) -> None:
    image = torch.rand(2, 3, 64, 96)
    fast = gatedprune.compact(gated, image)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), gated(image), rtol=1e-4, atol=1e-4)
        static = gatedprune.prune_static(gated, example_inputs=image).model
        assert static(image).shape == (2, 1, 64, 96)
    assert static.decoder.stages[0].conv1.out_channels == gated.gates["decoder.stages.0.conv1"].active_count


def test_weights_from_a_file(tmp_path: Path) -> None:
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = DepthModel("test_resnet", weights=tmp_path / "weights.pth", decoder_channels=16)
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"vit\.pth is not a checkpoint of 'test_resnet'"):
        DepthModel("test_resnet", weights=tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        DepthModel("test_resnet", weights=tmp_path / "missing.pth")


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no connection to the hub")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"no connection to the hub.*--weights FILE.*--no-pretrained"):
        DepthModel("test_resnet", pretrained=True)


def test_configuration_errors() -> None:
    with pytest.raises(ConfigError, match="0 < min_depth < max_depth"):
        DepthModel("test_resnet", min_depth=0)
    with pytest.raises(ConfigError, match="0 < min_depth < max_depth"):
        DepthModel("test_resnet", min_depth=5, max_depth=float("nan"))
    for wrong in ((32, 16), 0, -8, (32, 16, 8, 4, 0)):
        with pytest.raises(ConfigError, match="must be a positive int or 5 of them"):
            DepthModel("test_resnet", decoder_channels=wrong)
    with pytest.raises(ModelError, match=r"no model named 'resnet5'.*resnet50"):
        DepthModel("resnet5")
    with pytest.raises(ModelError, match=r"no feature_info.*features_only=True"):
        DepthModel(nn.Conv2d(3, 8, 3))
    with pytest.raises(ConfigError, match="only apply when `backbone` is a timm name"):
        DepthModel(timm.create_model("test_resnet", features_only=True), pretrained=True)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 32, 32), r"as \(B, 3, H, W\).*\(3, 32, 32\)"),
        (torch.rand(1, 32, 32, 3), "put the channels first"),
        (torch.rand(1, 4, 32, 32), "drop an alpha channel"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"uint8.*image\.float\(\) / 255"),
        ("image.png", "Got str"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(image: object, message: str) -> None:
    model = DepthModel("test_resnet", decoder_channels=16)
    with pytest.raises(DataError, match=message):
        model(image)
